"""Whether two checkpoints hold the same values."""

from ota_core.compute.blocks import row_blocks
from ota_core.files.checkpoint import Checkpoint

BLOCK = 1 << 20


def same_tensor(one: Checkpoint, name: str, other: Checkpoint, in_other: str) -> bool:
    """Whether a tensor of ``one`` holds the values of one of ``other``, rounded to the type of the first where the types differ.

    Reads until the first difference. False where shapes differ or a name is missing.
    """
    if name not in one or in_other not in other or one.info(name).shape != other.info(in_other).shape:
        return False
    alike = one.info(name).dtype == other.info(in_other).dtype
    for block in row_blocks(one.info(name).shape, BLOCK):
        mine, theirs = one.read_rows(name, *block), other.read_rows(in_other, *block)
        if alike and mine.held.tobytes() == theirs.held.tobytes():
            continue
        if alike or not bool((mine.tensor() == theirs.tensor().to(mine.tensor().dtype)).all()):
            return False
    return True


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both hold the same tensors with the same values."""
    return one.names() == other.names() and all(same_tensor(one, name, other, name) for name in one.names())
