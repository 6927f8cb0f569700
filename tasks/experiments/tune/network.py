"""An empty model in memory for the merge that is learned, and what a block of text costs it, or base and experts to measure against."""

import math
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ota_core.engine.output import copy_companions
from ota_core.plan.plan import MergePlan
from tasks.evaluation.gradients.documents import Block
from tasks.evaluation.gradients.network import tokenizer_of, unusable

# What leaves a network's weights unset, and the default type while it is built, hold for the whole process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Teacher:
    """An expert's predictions on one block: of each of T tokens the K most likely ones, on the CPU."""

    ids: torch.Tensor
    """int64 (T, K)."""
    logs: torch.Tensor
    """Their log-probabilities, float32 (T, K)."""


def empty_network(plan: MergePlan, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """(network of the merged model, its weights not set; its tokenizer), by the configuration that the merge would write.

    Code that a model's folder brings along does not run. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with tempfile.TemporaryDirectory(prefix="ota-tune-") as temporary:
        copy_companions(plan, Path(temporary))
        try:
            config = AutoConfig.from_pretrained(temporary, local_files_only=True, trust_remote_code=False)
            with _ONE_AT_A_TIME, no_init_weights(), torch.device(device):
                network = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # the architectures' own code runs here and raises what it likes
            raise unusable(plan.source_folder(), error) from error
        tokenizer = tokenizer_of(Path(temporary), plan.source_folder())
    network.tie_weights()
    return network.eval(), tokenizer


def loss_of(network: Any, block: Block, teacher: Teacher | None = None) -> torch.Tensor:
    """Bits per byte of a block's text; with a teacher the bits per token that its predictions are away from (Kullback-Leibler). Scalar.

    Of the teacher's other tokens the probability counts as that of one.
    """
    logs = _logs(network, block)
    if teacher is None:
        ids = torch.tensor(block.ids[block.first :], device=logs.device)
        return -logs.gather(1, ids[:, None]).sum() / (math.log(2) * block.size)
    ids, kept = teacher.ids.to(logs.device), teacher.logs.to(logs.device)
    found = logs.gather(1, ids)
    total = (kept.exp() * (kept - found)).sum(1)
    if ids.shape[1] < logs.shape[1]:
        rest, own = _rest(kept), _rest(found)
        total = total + rest.exp() * (rest - own)
    return total.mean() / math.log(2)


def answered(network: Any, block: Block, tokens: int) -> Block:
    """A prompt with the network's own most likely answer, of so many tokens at most; a block that has its text already as it is."""
    if block.first < len(block.ids):
        return block
    ids = torch.tensor([block.ids], device=network.device)
    with torch.no_grad():
        found = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return Block(tuple(found[0].tolist()), block.first, 0.0)


def teacher_of(network: Any, block: Block, top: int) -> Teacher:
    """A network's predictions on a block."""
    with torch.no_grad():
        logs = _logs(network, block)
        kept = logs.topk(min(top, logs.shape[1]), dim=1)
    return Teacher(ids=kept.indices.cpu(), logs=kept.values.cpu())


def losses_of(network: Any, blocks: Sequence[Block], teachers: Sequence[Teacher | None] | None = None) -> list[float]:
    """``loss_of`` of every block, without a gradient."""
    with torch.no_grad():
        return [float(loss_of(network, *pair)) for pair in zip(blocks, teachers or [None] * len(blocks), strict=True)]


def _logs(network: Any, block: Block) -> torch.Tensor:
    """Log-probabilities of every token at each of the T places that are predicted, float32 (T, V)."""
    ids = torch.tensor([block.ids], device=network.device)
    logits = network(input_ids=ids, use_cache=False).logits[0, block.first - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Log-probability of all other tokens together, float32 (T,). At least 1e-7, as float32 leaves no less of 1."""
    return (1 - logs.exp().sum(1)).clamp(min=1e-7).log()
