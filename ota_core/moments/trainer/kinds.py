"""Where the entry of one parameter in an optimizer's state holds v. Told by the entry's keys and types, never by a file's name.

The keys were looked up in the libraries' sources and in states that they wrote (tests/fixtures/optimizers).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from ota_core.files.pickled.unpickle import SavedParts, SavedTensor
from ota_core.moments.trainer.refusals import not_v
from ota_core.moments.trainer.stored import Coded, Stored, Whole

BNB = "__bnb_optimizer_quant_state__"  # bitsandbytes since 0.46 hides its own keys in here from FSDP
FACTORS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))  # transformers' Adafactor, torch's
# Averages of squared gradients: Adam and its kin; RMSprop and Adadelta; torch's Adafactor, for vectors.
AVERAGES = ("exp_avg_sq", "square_avg", "variance")


class NoSecondMoment(Exception):
    """An entry holds no v that can be read; the text says why, as the end of a sentence about the parameter."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Adafactor's means of v along its rows and columns, of the shapes (…, R) and (…, C)."""

    row: SavedTensor
    col: SavedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return (*self.row.shape, self.col.shape[-1])


def second_moment(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Stored | Factors:
    """v of one parameter. entry: its state, not empty; group: its parameter group. Raises NoSecondMoment."""
    hidden = entry.get(BNB)
    if isinstance(hidden, dict):
        entry = {**entry, **hidden}
    if reason := not_v(entry, group):
        raise NoSecondMoment(reason)
    for row, col in FACTORS:
        if row in entry and col in entry:
            return _factors(entry[row], entry[col], f"{row} and {col}")
    if "state2" in entry:
        return _bitsandbytes(entry)
    key = next(key for key in AVERAGES if key in entry)  # not_v refuses an entry without any
    tensor = entry[key]
    if isinstance(tensor, SavedParts) and {"codes", "scale"} <= tensor.parts.keys():
        return _torchao(tensor, key)
    return _whole(tensor, key)


def _whole(tensor: Any, key: str) -> Whole:
    if not isinstance(tensor, SavedTensor):
        raise NoSecondMoment(f"has {key} as a {type(tensor).__name__}; a tensor was expected")
    if not tensor.is_floating_point:
        raise NoSecondMoment(f"has {key} as {tensor.dtype}, not a dense float tensor")
    return Whole(tensor)


def _bitsandbytes(entry: Mapping[str, Any]) -> Stored:
    """State 2 is v, also of AdEMAMix; small tensors and the 32-bit optimizers keep it in float32."""
    codes = entry["state2"]
    if isinstance(codes, SavedTensor) and not codes.contiguous:
        # bitsandbytes counts elements in the order of memory, whatever the strides say.
        raise NoSecondMoment(
            "has a transposed state2, as bitsandbytes makes it of a parameter that is not contiguous: its order is not told"
        )
    if not isinstance(codes, SavedTensor) or codes.dtype != "uint8":
        return _whole(codes, "state2")
    table, scale = entry.get("qmap2"), entry.get("absmax2")
    if scale is None and "max2" in entry:
        raise NoSecondMoment(
            "has 8-bit codes with one scale for the whole tensor (block_wise=False of old bitsandbytes), which are not read"
        )
    if not _flat_floats(scale) or not _flat_floats(table) or table.numel != 256:
        raise NoSecondMoment("has 8-bit codes in state2, but not the 256 values qmap2 and the scales absmax2 that belong to them")
    elements, blocks = codes.numel, scale.numel
    # 256 today, 2048 in old versions; the last block may be shorter, so that the count alone leaves only one power of two.
    block = 1
    while blocks and -(-elements // block) > blocks:
        block *= 2
    if -(-elements // block) != blocks:
        raise NoSecondMoment(f"has {blocks} scales absmax2 for {elements} codes; no block size gives that")
    return Coded(codes.shape, codes, table, scale, block)


def _torchao(tensor: SavedParts, key: str) -> Coded:
    """The parts of torchao's tensor subclasses; its blocks divide the tensor."""
    codes, scale, table = tensor.parts["codes"], tensor.parts["scale"], tensor.parts.get("qmap")
    shape, elements = tensor.shape, prod(tensor.shape)
    if table is None:
        typed, share = isinstance(codes, SavedTensor) and codes.dtype == "float8_e4m3fn", 1
    else:
        typed = isinstance(codes, SavedTensor) and codes.dtype == "uint8" and _flat_floats(table) and table.numel in {16, 256}
        share = 2 if typed and table.numel == 16 else 1
    sound = typed and _flat_floats(scale) and codes.contiguous and codes.numel * share == elements
    if not sound or not scale.numel or elements % scale.numel:
        raise NoSecondMoment(
            f"has {key} of the shape {list(shape)} as a {tensor.kind} whose codes, scales and table of values do not fit together"
        )
    return Coded(shape, codes, table, scale, elements // scale.numel)


def _flat_floats(tensor: Any) -> TypeGuard[SavedTensor]:
    return isinstance(tensor, SavedTensor) and tensor.dtype == "float32" and tensor.contiguous


def _factors(row: Any, col: Any, keys: str) -> Factors:
    if keys.startswith("row_var") and isinstance(row, SavedTensor) and isinstance(col, SavedTensor):
        # torch keeps the axis that it has averaged over, with the length 1.
        if len(row.shape) < 2 or len(col.shape) < 2 or row.shape[-1] != 1 or col.shape[-2] != 1:
            raise NoSecondMoment(f"has {keys} of the shapes {list(row.shape)} and {list(col.shape)}, which do not fit together")
        row, col = row.without(-1), col.without(-2)
    good = all(isinstance(part, SavedTensor) and part.is_floating_point and part.shape for part in (row, col))
    if not good or row.shape[:-1] != col.shape[:-1]:
        seen = [list(part.shape) if isinstance(part, SavedTensor) else type(part).__name__ for part in (row, col)]
        raise NoSecondMoment(f"has {keys} of the shapes {seen[0]} and {seen[1]}, which do not fit together")
    return Factors(row, col)
