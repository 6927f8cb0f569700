"""What an outline of a torch file holds: everything of the zip file but the bytes of large storages."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ota_core.files.pickled.torch_file import LOCAL_HEADER
from tasks.storage import s3
from tasks.storage.s3_body import read_exactly

Extent = tuple[int, int]

# A record up to this size is filled in: a request costs more than its bytes.
_SMALL_RECORD = 64 * 1024
# Ranges with less than this between them are fetched with one request.
_GAP = 32 * 1024
_LARGEST_REQUEST = 8 * s3.MIB
_TAIL = 64 * 1024


def zip_ranges(
    client: Any, one: s3.S3Object, fetch_all: Callable[[Sequence[Extent]], None], file: int
) -> tuple[tuple[Extent, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Fill in the zip's directory, the headers of its records and its small records: (the ranges filled, the bounds of large storages, their
    CRC-32).

    ``fetch_all`` brings ranges into the open ``file``. None where the file is no sound zip file of stored records.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Ranged(client, one), _TAIL)) as archive:
            infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    except zipfile.BadZipFile:
        return None
    ends = [*(info.header_offset for info in infos[1:]), end]
    large = []
    wanted = [(end, one.size)]
    for info, stop in zip(infos, ends, strict=True):
        # Between the records' headers lie a record's header, its bytes and perhaps a few bytes of description.
        if info.compress_type != zipfile.ZIP_STORED or stop - info.header_offset < LOCAL_HEADER + info.file_size:
            return None
        if "/data/" in info.filename and info.file_size > _SMALL_RECORD:
            large.append(info)
            stop -= info.file_size
        wanted.append((info.header_offset, stop))
    extents = coalesced(wanted)
    fetch_all([piece for extent in extents for piece in _pieces(extent)])
    cuts = []
    for info in large:
        header = os.pread(file, LOCAL_HEADER, info.header_offset)
        first = (
            info.header_offset + LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        cuts += [first, first + info.file_size]
    return tuple(extents), tuple(cuts), tuple(info.CRC for info in large)


def coalesced(extents: Iterable[Extent]) -> list[Extent]:
    """The same ranges in order, those with little between them as one."""
    joined: list[Extent] = []
    for start, stop in sorted(extents):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def _pieces(extent: Extent) -> list[Extent]:
    start, stop = extent
    return [(first, min(first + _LARGEST_REQUEST, stop)) for first in range(start, stop, _LARGEST_REQUEST)]


class _Ranged(io.RawIOBase):
    """An object as a seekable file, for Python's zipfile: each read is a ranged GET."""

    def __init__(self, client: Any, one: s3.S3Object) -> None:
        self._client, self._one, self._position = client, one, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._one.size}[whence]
        if origin + offset < 0:
            raise OSError("a seek before the beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._one.size)
        if stop <= self._position:
            return 0
        content = read_exactly(self._client, self._one, self._position, stop)
        buffer[: len(content)] = content
        self._position = stop
        return len(content)
