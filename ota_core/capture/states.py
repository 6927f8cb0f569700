"""Where an optimizer keeps the second moment of one parameter, and how it is read out of there: float32, the parameter's shape."""

from collections.abc import Mapping
from typing import Any

import torch

from ota_core.errors import MomentsError

State = Mapping[str, Any]
"""What an optimizer keeps for one parameter."""
INSTEAD = (
    "measure the curvature after the training with `ota estimate`, or train with an optimizer that keeps v, such as adamw_torch"
)
# Keys of optimizers that keep no mean of squared gradients, and what they keep instead.
_OTHERS = {
    "momentum_buffer": "SGD with momentum and Muon keep a mean of gradients, no second moment",
    "sum": "Adagrad keeps a sum over all steps, no running mean",
    "state1": "this 8-bit optimizer (Lion, SGD or RMSprop) keeps one state, not Adam's two",
    "exp_avg": "Lion keeps a mean of gradients, no second moment",
}


def has_second_moment(state: State) -> bool:
    """Whether ``second_moment`` reads this state."""
    return any(keys <= state.keys() for keys in _KEPT)


def why_not(state: State) -> str:
    """What an optimizer keeps that keeps no second moment, and what to do."""
    reason = next((text for key, text in _OTHERS.items() if key in state), "")
    return f"{reason or 'no second moment is among them'} (its state has the keys {', '.join(sorted(map(str, state))) or 'none'})"


def second_moment(state: State, whole: Any) -> torch.Tensor:
    """v of one parameter. whole: gathers one tensor of the state from all processes that hold a part of it.

    Adam's own v as it is, that of 8-bit optimizers decoded, Adafactor's as the product that it steers by (arXiv 1804.04235, algorithm 4).
    """
    if "exp_avg_sq" in state or "square_avg" in state or "variance" in state:
        v: torch.Tensor = whole(next(state[key] for key in ("exp_avg_sq", "square_avg", "variance") if key in state))
        # torchao keeps codes in a class of its own, under the usual name.
        return (v.dequantize() if type(v).__module__.startswith("torchao") else v).float()
    if "state2" in state:
        return _bitsandbytes(state).float()
    rows, cols = (
        (state["exp_avg_sq_row"], state["exp_avg_sq_col"]) if "exp_avg_sq_row" in state else (state["row_var"], state["col_var"])
    )
    rows, cols = whole(rows).float(), whole(cols).float()
    if "exp_avg_sq_row" in state:  # transformers: (…, R) and (…, C); torch: (…, R, 1) and (…, 1, C)
        rows, cols = rows.unsqueeze(-1), cols.unsqueeze(-2)
    mean = rows.mean(dim=-2, keepdim=True)
    product: torch.Tensor = torch.where(mean > 0, rows / mean, 0.0) * cols
    return product


_KEPT: tuple[set[str], ...] = (
    {"exp_avg_sq"}, {"square_avg"}, {"variance"}, {"state2"}, {"exp_avg_sq_row", "exp_avg_sq_col"}, {"row_var", "col_var"},
)  # fmt: skip


def _bitsandbytes(state: State) -> torch.Tensor:
    """``state2``: v itself, or a byte for each element whose value is ``qmap2`` times the largest of its block, ``absmax2``."""
    codes: torch.Tensor = state["state2"]
    if codes.dtype != torch.uint8:
        return codes
    values = state["qmap2"].float()[codes.reshape(-1).long()]
    scales = state["absmax2"].float()
    block = _block_size(values.numel(), scales.numel())
    decoded: torch.Tensor = values * scales.repeat_interleave(block)[: values.numel()]
    return decoded.reshape(codes.shape)


def _block_size(elements: int, blocks: int) -> int:
    """The power of two that cuts so many elements into so many blocks: 256 in bitsandbytes today, 2048 before."""
    fits = [size for size in (256, 2048, 4096, 1024, 512, 128, 64) if -(-elements // size) == blocks]
    if not fits:
        raise MomentsError(f"an 8-bit state has {blocks} scales for {elements} elements; one for each block of 256 was expected")
    return fits[0]


def beta2_of(group: Mapping[str, Any], step: int | None) -> float | None:
    """β₂ by the optimizer's parameter group: Adam's, RMSprop's α, or Adafactor's 1 − t^decay at step t. None where it has none."""
    if len(group.get("betas") or ()) >= 2:
        return float(group["betas"][1])
    if "alpha" in group:
        return float(group["alpha"])
    decay = group.get("decay_rate", group.get("beta2_decay"))
    return None if decay is None or step is None else 1.0 - float(step) ** float(decay)
