"""Whether second moments in a file of their own belong to the weights that they are used with, told by a digest of a few bytes.

The digest covers name, type and shape of every tensor of the weights, and some rows from the middle of ``SAMPLES`` trained matrices. It
does not depend on how the weights are cut into files, and costs a few small reads, so that a merge need not read its weights twice. It
tells checkpoints apart, also those of one training, which differ nearly everywhere; it is no proof against somebody who wants to deceive.
"""

import hashlib
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, adapter_of
from ota_core.files.safetensors_io import FORMAT_KEY
from ota_core.moments.compression.header import read_header
from ota_core.moments.safetensors_file import open_file

WEIGHTS = "weights"
"""In the metadata of a file of second moments: the digest of the weights that they belong to."""
SAMPLES, SAMPLE_BYTES = 8, 4096


def weights_digest(weights: Checkpoint, trained: Collection[str]) -> str:
    """``sample:`` and 32 hex digits of a checkpoint's weights. trained: the names of what has second moments; others may be as in the base."""
    digest = hashlib.sha256()
    held = weights.names()
    for name in held:
        info = weights.info(name)
        digest.update(f"{name} {info.dtype.code} {list(info.shape)}\n".encode())
    known = [name for name in held if name in trained] or held
    # Of vectors, norms above all, training in bfloat16 may leave every element as it was.
    known = [name for name in known if len(weights.info(name).shape) > 1] or known
    for name in dict.fromkeys(known[i * len(known) // SAMPLES] for i in range(SAMPLES)):
        info = weights.info(name)
        rows, cols = matrix_shape(info.shape)
        count = min(rows, max(1, SAMPLE_BYTES // max(1, cols * info.dtype.itemsize)))
        start = (rows - count) // 2
        digest.update(weights.read_rows(name, start, start + count).held.tobytes())
    return f"sample:{digest.hexdigest()[:32]}"


def check_belongs(moments: Path, expert: Path, source_of: SourceOf | None = None) -> None:
    """Raises MomentsError where the file says which weights it belongs to, and those in the folder ``expert`` are others.

    source_of: where the bytes of v and weights come from, if not from the files themselves.
    """
    if moments.suffix != ".safetensors" or not moments.is_file() or adapter_of(expert) is not None:
        return
    with open_file(moments, source_of) as file:
        said = file.metadata.get(WEIGHTS)
        if said is None or FORMAT_KEY not in file.metadata:
            return
        names = read_header(moments, file.metadata).shapes
    with closing(Checkpoint(expert, source_of)) as weights:
        seen = weights_digest(weights, names)
    if seen != said:
        raise MomentsError(
            f"{moments} belongs to other weights: it was made for those with the digest {said}, and {expert} holds weights with the digest "
            f"{seen}. Name the second moments of these weights, or harvest again with --weights, if these are the same in another data type"
        )
