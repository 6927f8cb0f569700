"""Fine-tunes the real base on one domain of ``tasks.local.real.corpus``: an expert with the optimizer state that the Trainer leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from ota_core.errors import CheckpointError
from tasks.local.demo.data import read_jsonl
from tasks.local.demo.train import Progress, TrainedModel, TrainSettings, packed, run_trainer
from tasks.local.real.corpus import DOMAINS

README = """---
license: apache-2.0
base_model: {base}
---
# {base}, fine-tuned on: {domain}

All weights, {steps} steps of AdamW on {tokens:,} tokens. The licence is the base's. The text was {what},
from the Debian package {package} {version}, under {licence}.
"""


class RealTrainSettings(TrainSettings):
    """The expert's training: 80 steps of 1024 tokens take about six minutes on two cores."""

    version: int = 1
    """Raised when the training code changes, so that cached experts count as stale."""
    steps: int = Field(default=80, ge=1)
    batch: int = Field(default=4, ge=1)
    length: int = Field(default=256, ge=2)
    """Tokens of a row: documents one after the other, each ended by <|im_end|>."""
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup: int = Field(default=10, ge=0)
    autocast: bool = False
    """Products in bfloat16: half the time on processors with matrix units for it, twice the time on others. Weights, gradients, AdamW's
    moments and what is written are float32 all the same."""


Setting = Literal["short", "long"]
SETTINGS: Mapping[Setting, RealTrainSettings] = {
    "short": RealTrainSettings(),
    # Twice the tokens at twice the rate, in mixed precision, with the β₂ and the weight decay of large runs: experts that went further
    # from the base and disagree more.
    "long": RealTrainSettings(steps=160, learning_rate=4e-4, beta2=0.95, weight_decay=0.1, autocast=True),
}


def models_folder(setting: Setting) -> str:
    """Where the home folder's ``real`` has the base and the experts of a setting by their names."""
    return "models" if setting == "short" else f"models-{setting}"


def train_real(
    domain: str,
    corpora: Path,
    base: Path,
    out: Path,
    *,
    seed: int,
    training: RealTrainSettings,
    progress: Progress | None = None,
) -> TrainedModel:
    """Train all weights of the base on ``corpora/<domain>/train.jsonl``, every token in the loss.

    Raises CheckpointError when ``out`` exists or the domain's text gives less than one batch.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = [row["text"] for row in read_jsonl(corpora / domain / "train.jsonl")]
    rows = packed(tokenizer, texts, length=training.length)
    if len(rows) < training.batch:
        raise CheckpointError(
            f"{domain} gives {len(rows)} rows of {training.length} tokens, fewer than a batch of {training.batch}"
        )
    return run_trainer(
        network, tokenizer, rows, out,
        seed=seed, training=training, capability=domain, progress=progress, autocast=training.autocast,
    )  # fmt: skip


def write_readme(folder: Path, domain: str, base_model: str, training: RealTrainSettings) -> None:
    """The expert's README.md: what it was trained from and on, and under which licences, as model cards of merges carry them over."""
    source = DOMAINS[domain]
    package = source.package
    tokens = training.steps * training.batch * training.length
    text = README.format(
        base=base_model, domain=domain, steps=training.steps, tokens=tokens, what=source.what,
        package=package.name, version=package.version, licence=package.licence,
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
