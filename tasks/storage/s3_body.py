"""Bodies of ranged GETs, asked again where the connection breaks in the middle; botocore itself retries requests alone."""

import mmap
import time
from collections.abc import Iterator
from typing import Any

from ota_core.errors import StorageError
from tasks.storage import s3

BODY_ATTEMPTS = 5


def pieces(client: Any, one: s3.S3Object, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of an object in order, in pieces of at most 1 MiB. A body that breaks off is asked again from there.

    Raises StorageError after too many breaks, for a body of the wrong length, or when the object is no longer the listed one;
    otherwise what boto3 raises (see ``s3.s3_errors``).
    """
    position, breaks = start, 0
    while position < stop:
        try:
            body = s3.read_range(client, one, position, stop)
        except s3.StrangeAnswer:
            breaks += 1
            if breaks == BODY_ATTEMPTS:
                raise
            time.sleep(0.2 * 2**breaks)
            continue
        while position < stop:
            try:
                piece = body.read(s3.MIB)
            except s3.BODY_ERRORS as error:
                breaks += 1
                if breaks == BODY_ATTEMPTS:
                    raise StorageError(
                        f"{one.uri}: the connection broke {breaks} times at byte {position:,} of {one.size:,} ({error}); run again",
                        reason="unavailable",
                    ) from error
                time.sleep(0.2 * 2**breaks)
                break
            if not piece or position + len(piece) > stop:
                what = f"{one.uri}: the server sent too few or too many bytes for {start}-{stop - 1}; run again"
                raise StorageError(what, reason="unavailable")
            position += len(piece)
            yield piece


def read_exactly(client: Any, one: s3.S3Object, start: int, stop: int) -> memoryview:
    """The bytes [start, stop) of an object, in memory of their own. Raises StorageError."""
    buffer = _memory(stop - start)
    position = 0
    with s3.s3_errors("read", one.uri, client):
        for piece in pieces(client, one, start, stop):
            buffer[position : position + len(piece)] = piece
            position += len(piece)
    return buffer


def _memory(size: int) -> memoryview:
    """Memory of the kernel's, not of malloc's: with many threads malloc keeps several times of what was freed."""
    return memoryview(mmap.mmap(-1, size) if size >= mmap.PAGESIZE else bytearray(size))
