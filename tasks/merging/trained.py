"""Which parameters training changed: those whose weights differ from the base's."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.compare import same_tensor
from ota_core.plan.vocabulary.match import tied_tensors


def changed_parameters(
    folder: Path, base: Path, tensors: Mapping[str, Sequence[str]], source_of: SourceOf | None
) -> frozenset[str]:
    """Parameters of which a tensor differs from the base's, or is not there.

    tensors: parameter to the tensors of the checkpoint that hold it. The base's values are rounded to the type of the expert's, as training
    does that begins with them. Raises CheckpointError.
    """
    with closing(Checkpoint(folder, source_of)) as expert, closing(Checkpoint(base, source_of)) as start:
        tied = tied_tensors(start)

        def moved(tensor: str) -> bool:
            return not same_tensor(expert, tensor, start, tensor if tensor in start else tied.get(tensor, tensor))

        return frozenset(name for name, held in tensors.items() if any(map(moved, held)))
