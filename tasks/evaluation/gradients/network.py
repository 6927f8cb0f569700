"""Models in memory for losses and their gradients."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from ota_core.errors import CheckpointError
from tasks.evaluation.gradients.documents import Block


@contextmanager
def loaded(folder: Path, dtype: torch.dtype | None, device: str) -> Iterator[Any]:
    """A checkpoint as a network that draws nothing at random, let go of afterwards. dtype None: as it is stored. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()  # who calls has bars of its own
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the architectures' own code runs here and raises what it likes
        raise unusable(folder, error) from error
    finally:
        if drawn:
            logging.enable_progress_bar()
    try:
        yield cast(Any, network).to(device).eval()
    finally:
        del network
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def tokenizer_of(folder: Path, named: Path | None = None) -> Any:
    """A checkpoint's tokenizer. named: the checkpoint as errors should call it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise unusable(named or folder, error) from error


def unusable(folder: Path, error: Exception) -> CheckpointError:
    """What to say where transformers cannot load a model or its tokenizer."""
    reason = str(error).strip().splitlines() or ["no reason given"]
    return CheckpointError(
        f"{folder} cannot be used as a causal language model with its tokenizer: {type(error).__name__}: {reason[0]:.300} Correct its files; gradients "
        "are taken of models that transformers loads"
    )


def mean_loss(network: Any, blocks: Sequence[Block]) -> torch.Tensor:
    """Mean cross-entropy, in nats, of all tokens that are predicted in a batch of blocks, as the Trainer counts it: scalar, float32."""
    longest = max(len(one.ids) for one in blocks)
    ids = torch.zeros(len(blocks), longest, dtype=torch.long)
    there = torch.zeros_like(ids)
    places = [(row, at) for row, one in enumerate(blocks) for at in range(one.first, len(one.ids))]
    for row, one in enumerate(blocks):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        there[row, : len(one.ids)] = 1
    rows, columns = torch.tensor(places).T
    logits = network(input_ids=ids.to(network.device), attention_mask=there.to(network.device), use_cache=False).logits
    chosen = logits[rows.to(logits.device), columns.to(logits.device) - 1].float()
    return torch.nn.functional.cross_entropy(chosen, ids[rows, columns].to(logits.device))
