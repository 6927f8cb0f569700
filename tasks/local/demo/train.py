"""Real training for the demo: a small Llama base and one expert per capability, with the Hugging Face Trainer and AdamW.

A finished expert is what a user's run leaves in ``checkpoint-<step>``: weights, config, generation config, tokenizer,
``optimizer.pt``, ``trainer_state.json`` and the rest, plus ``training.json`` (``TrainedModel``). The Trainer seeds the generators
of the whole process and uses torch's threads: train one model at a time in a process.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ota_core.artifact import write_text_atomic
from ota_core.errors import CheckpointError, OtaError
from ota_core.frozen import Frozen
from tasks.local.demo.data import CAPABILITIES, DataSettings, read_jsonl
from tasks.storage.layout import write_expert_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TRAINING = "training.json"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Words and punctuation take the space before them. Digits stand alone, so that numbers are written in place values and a digit is
# the same token after a bracket, a comma or a space.
PIECES = r" ?[A-Za-z]+|[0-9]|, (?=[0-9])| ?[^\sA-Za-z0-9]+|\s"
PACKED = 64
"""Tokens in a row of the base's text."""

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, the step's loss)."""


class ModelSettings(Frozen):
    """Shape of the base. The defaults give 2.1 million parameters."""

    vocabulary: int = Field(default=768, ge=300)
    """Upper bound of the number of tokens; 259 are bytes and special tokens."""
    hidden: int = Field(default=192, ge=8)
    intermediate: int = Field(default=512, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    tie: bool = False


class TrainSettings(Frozen):
    """One run of the Trainer. Batches count examples."""

    steps: int = Field(ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=20, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)


class DemoSettings(Frozen):
    """All that decides the demo's checkpoints, apart from the seed; the caller fingerprints it to cache the training."""

    version: int = 1
    """Raised when the training code changes, so that cached experts count as stale."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    base: TrainSettings = TrainSettings(steps=700, batch=16, learning_rate=2e-3, warmup=40, beta2=0.98)
    expert: TrainSettings = TrainSettings(steps=350, learning_rate=8e-4)


SMOKE = DemoSettings(
    data=DataSettings(train=60, validation=5, test=8, base=200, places=4),
    model=ModelSettings(vocabulary=300, hidden=16, intermediate=32, layers=2, heads=2),
    base=TrainSettings(steps=3, batch=4, warmup=0),
    expert=TrainSettings(steps=3, batch=4, warmup=0),
)
"""For tests of what surrounds the training: seconds for everything; the models have learned nothing."""


class TrainedModel(Frozen):
    """What a finished folder holds, as far as later stages ask."""

    path: Path = Field(exclude=True)
    """The folder. Not written to ``training.json``, so that the folder can be moved."""
    capability: str | None
    """None for the base."""
    step: int
    beta2: float
    optimizer: str = "adamw_torch"
    parameters: int
    loss: float
    """Mean training loss of the run."""
    seconds: float
    cpu_seconds: float


def train_base(
    data: Path, out: Path, *, seed: int, model: ModelSettings, training: TrainSettings, progress: Progress | None = None
) -> TrainedModel:
    """Make a tokenizer from ``data/base/train.jsonl`` and train a Llama from scratch on it: a complete folder without optimizer.

    ``data`` is a folder of ``tasks.local.demo.data.write_data``. Raises CheckpointError when ``out`` exists.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [row["text"] for row in read_jsonl(data / "base" / "train.jsonl")]
    tokenizer = make_tokenizer(texts, size=model.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=128,
        tie_word_embeddings=model.tie,
        initializer_range=model.hidden**-0.5,  # the usual 0.02 suits widths of thousands; here copying would emerge late
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config).float()
    rows = packed(tokenizer, texts, length=PACKED)
    return run_trainer(network, tokenizer, rows, out, seed=seed, training=training, capability=None, progress=progress)


def train_expert(
    capability: str, data: Path, base: Path, out: Path, *, seed: int, training: TrainSettings, progress: Progress | None = None
) -> TrainedModel:
    """Fine-tune the base on one capability's train split; the loss is on the answers alone. Float32 weights, same tokenizer.

    Raises OtaError for an unknown capability and CheckpointError when ``out`` exists.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if capability not in CAPABILITIES:
        raise OtaError(f"unknown capability {capability!r}; known are {', '.join(CAPABILITIES)}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = []
    for row in read_jsonl(data / capability / "train.jsonl"):
        masked = len(tokenizer(row["prompt"])["input_ids"])
        rows.append(_row(tokenizer, f"{row['prompt']} {row['answer']}{tokenizer.eos_token}", masked=masked))
    return run_trainer(network, tokenizer, rows, out, seed=seed, training=training, capability=capability, progress=progress)


def write_manifest(folder: Path, trained: TrainedModel, base_model: str) -> None:
    """``expert.json`` of an expert that was trained just now, over ``base_model``. Raises StorageError as ``write_expert_json``."""
    write_expert_json(
        folder,
        capability=trained.capability,
        base_model=base_model,
        trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
        step=trained.step,
        beta2=trained.beta2,
        optimizer=trained.optimizer,
    )


def make_tokenizer(texts: Sequence[str], *, size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most ``size`` tokens: any text can be written. Texts begin with <s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=128, padding_side="left"
    )


def packed(tokenizer: Any, texts: Sequence[str], *, length: int) -> list[dict[str, list[int]]]:
    """All texts one after the other, cut into rows of ``length`` tokens; the rest at the end is dropped."""
    ids = [i for text in texts for i in tokenizer(text + tokenizer.eos_token)["input_ids"]]
    cuts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": cut, "labels": cut} for cut in cuts]


def _row(tokenizer: Any, text: str, *, masked: int) -> dict[str, list[int]]:
    """Token ids, and labels that leave the first ``masked`` tokens out of the loss."""
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def run_trainer(
    network: "PreTrainedModel",
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    out: Path,
    *,
    seed: int,
    training: TrainSettings,
    capability: str | None,
    progress: Progress | None,
    autocast: bool = False,
) -> TrainedModel:
    """Train ``network`` on ``rows`` (input_ids and labels) and leave what the Trainer saves at ``out``, with ``training.json``.

    ``capability`` None: a base, without optimizer.pt. ``autocast``: products in bfloat16; weights, gradients and the optimizer's
    state stay float32. Raises CheckpointError when ``out`` exists.
    """
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    if out.exists():
        raise CheckpointError(f"{out} exists already; delete it to train again")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)

    class Telling(Trainer):
        """A callback learns of the loss only where it is logged, and what is logged is saved."""

        def training_step(self, *args: Any, **options: Any) -> "torch.Tensor":
            loss: torch.Tensor = super().training_step(*args, **options)
            if progress is not None:
                progress(self.state.global_step + 1, training.steps, loss.item())
            return loss

    arguments = TrainingArguments(
        output_dir=str(temporary),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=training.steps,
        save_only_model=capability is None,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=autocast,
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Telling(
        model=network,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = trainer.train()
        trained = TrainedModel(
            path=out,
            capability=capability,
            step=result.global_step,
            beta2=training.beta2,
            parameters=sum(p.numel() for p in network.parameters()),
            loss=result.training_loss,
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
        checkpoint = temporary / f"checkpoint-{training.steps}"
        write_text_atomic(checkpoint / TRAINING, trained.model_dump_json(indent=2) + "\n")
        os.replace(checkpoint, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return trained
