"""Which parameters training changed: those whose weights differ from the base's."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from ota_core.compute.blocks import row_blocks
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint
from ota_core.plan.vocabulary import tied_tensors

BLOCK = 1 << 20


def changed_parameters(folder: Path, base: Path, tensors: Mapping[str, Sequence[str]], source_of: SourceOf | None) -> frozenset[str]:
    """Parameters of which a tensor differs from the base's, or is not there.

    tensors: parameter to the tensors of the checkpoint that hold it. A tensor is read until the first difference. The base's values are
    rounded to the type of the expert's, as training does that starts from them. Raises CheckpointError.
    """
    with closing(Checkpoint(folder, source_of)) as expert, closing(Checkpoint(base, source_of)) as start:
        tied = tied_tensors(start)
        try:
            return frozenset(
                name
                for name, held in tensors.items()
                if any(not _same(expert, start, tensor, tensor if tensor in start else tied.get(tensor, tensor)) for tensor in held)
            )
        finally:
            expert.drop_pages()
            start.drop_pages()


def _same(expert: Checkpoint, base: Checkpoint, tensor: str, in_base: str) -> bool:
    if in_base not in base or base.info(in_base).shape != expert.info(tensor).shape:
        return False
    alike = base.info(in_base).dtype == expert.info(tensor).dtype
    for block in row_blocks(expert.info(tensor).shape, BLOCK):
        mine, theirs = expert.read_rows(tensor, *block), base.read_rows(in_base, *block)
        if alike:
            if mine.held.tobytes() != theirs.held.tobytes():
                return False
        elif not bool((mine.tensor() == theirs.tensor().to(mine.tensor().dtype)).all()):
            return False
    return True
