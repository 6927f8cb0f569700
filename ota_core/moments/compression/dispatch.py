"""One expert's second moments by any method: into a file, or for a merge of this process."""

import math
import os
import tempfile
from pathlib import Path

from ota_core.compute.stream import Stream
from ota_core.errors import OtaError
from ota_core.files.room import Need, check_room
from ota_core.moments.base import Moments
from ota_core.moments.compression.base import DEFAULT_RANK, CompressedMoments, CompressionReport, FactoredMoments
from ota_core.moments.compression.file import FORMS, open_compressed, save_compressed, save_full
from ota_core.moments.compression.header import METHODS, Facts
from ota_core.moments.compression.log8 import CODE, write_log8
from ota_core.moments.compression.rank1 import compress_rank1
from ota_core.moments.compression.rank_k import compress_rank_k, stored_whole


def compress(
    moments: Moments,
    *,
    method: str = "rank1",
    rank: int | None = None,
    stream: Stream,
    scratch: Path | None = None,
    what: str = "compress",
) -> tuple[CompressedMoments, CompressionReport]:
    """Compressed second moments to be read at once, by ``rank1``, ``log8`` or ``rank_k`` (of rank ``rank``, 4 by default), and what they lost.

    Factors stay in memory. The code of ``log8`` is a quarter of v, too much for that: it goes to a file in the folder ``scratch``
    (without one, in the system's folder for temporary files), which has no name any more when this returns and vanishes with the last
    reader, also when the process is killed. Its pages are returned as those of any mapped file. Raises MomentsError on bad values.
    """
    if method == "rank1":
        return compress_rank1(moments, stream=stream, what=what)
    if method == "rank_k":
        return compress_rank_k(moments, rank=rank or DEFAULT_RANK, stream=stream, what=what)
    assert method == "log8", method
    handle, name = tempfile.mkstemp(prefix=".log8-", suffix=".tmp", dir=scratch)
    os.close(handle)
    path = Path(name)
    try:
        report = write_log8(moments, path, stream=stream, what=what)
        compressed = open_compressed(path)
    finally:
        path.unlink(missing_ok=True)
    compressed.path = moments.path  # what messages should name
    stream.droppable.append(compressed.drop_pages)
    return compressed, report


def write_compressed(
    moments: Moments, path: Path, *, method: str, rank: int | None = None, stream: Stream, facts: Facts = None
) -> CompressionReport:
    """Write the file ``path`` by any of ``METHODS``. facts: what else its metadata say, by keys of their own.

    Raises MomentsError on bad values, OtaError for a method or rank that is none.
    """
    if method not in METHODS:
        raise OtaError(f"compression method '{method}' is not known; expected one of {', '.join(METHODS)}")
    if rank is not None and method != "rank_k":
        raise OtaError(f"rank: {rank} has no effect with the method {method}; remove it, or choose rank_k")
    if rank is not None and rank < 1:
        raise OtaError(f"rank: got {rank}, expected a whole number of at least 1")
    size = sum(compressed_bytes(shape, method, rank) for shape in moments.shapes().values())
    check_room([Need(path, size, "the compressed second moments")])
    if isinstance(moments, FactoredMoments) and moments.as_trained:
        return _write_as_trained(moments, path, method, facts)
    if method == "none":
        return save_full(moments, path, stream=stream, facts=facts)
    if method == "log8":
        return write_log8(moments, path, stream=stream, what="compress", facts=facts)
    factors, report = compress(moments, method=method, rank=rank, stream=stream)
    assert isinstance(factors, FactoredMoments)
    save_compressed(factors, path, facts)
    return report


def _write_as_trained(moments: FactoredMoments, path: Path, method: str, facts: Facts) -> CompressionReport:
    """Write factors that an optimizer kept in the place of v. Nothing is lost by that: the errors are 0."""
    if method != moments.method:
        raise OtaError(
            f"{moments.path}: the optimizer (Adafactor) kept row and column means and no full second moments, which is the form {moments.method}; "
            f"{method} cannot be made of it: choose {moments.method}"
        )
    save_compressed(moments, path, facts)
    return CompressionReport.of(moments, moments.size, dict.fromkeys(moments.shapes(), (0.0, 0.0)))


def compressed_bytes(shape: tuple[int, ...], method: str, rank: int | None = None) -> int:
    """Bytes that the second moments of a tensor of this shape take by any of ``METHODS``."""
    forms = FORMS[method].keys("", shape, rank)
    return sum(math.prod(form) * (1 if key == CODE else 4) for key, form in forms.items())


def passes(shape: tuple[int, ...], method: str, rank: int | None = None) -> int:
    """How often the compression of a tensor of this shape reads v; nothing is compressed by ``none``."""
    if method == "rank_k":
        return 1 if stored_whole(shape, rank or DEFAULT_RANK) else 3
    return 0 if method == "none" else 1
