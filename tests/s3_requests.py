"""What a test asks of S3, request by request; see ``tests.servers`` for the server."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from tasks.storage import s3
from tests.servers import S3Test


class Request(NamedTuple):
    """One request to S3."""

    operation: str
    key: str
    range: str
    condition: str
    """``If-Match``."""


class Requests(list[Request]):
    """Requests that left this process; ``before`` is told how many there were, and may raise to break one."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[int], None] = lambda count: None

    def bytes(self, name: str = "") -> int:
        """Bytes asked for of objects whose key ends so."""
        return sum(last - first for _, first, last in self._ranges(name))

    def different_bytes(self, name: str = "") -> int:
        """The same, what was asked for again counted once: a machine that is busy may ask again."""
        found, ends = 0, dict[str, int]()
        for key, first, last in sorted(self._ranges(name)):
            found += max(0, last - max(first, ends.get(key, 0)))
            ends[key] = max(last, ends.get(key, 0))
        return found

    def _ranges(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Object, first byte, and the one after the last."""
        for one in self:
            if one.key.endswith(name) and one.range:
                first, _, last = one.range.removeprefix("bytes=").partition("-")
                yield one.key, int(first), int(last) + 1


@contextmanager
def requests(*operations: str) -> Iterator[Requests]:
    """Everything that is asked of S3 meanwhile, or these operations alone."""
    seen, lock = Requests(), threading.Lock()

    def note(model: Any, params: dict[str, Any], **_: Any) -> None:
        if operations and model.name not in operations:
            return
        headers = params["headers"]
        with lock:
            seen.append(Request(model.name, params["url_path"].strip("/"), headers.get("Range", ""), headers.get("If-Match", "")))
            count = len(seen)
        seen.before(count)

    clients = [s3.client(), s3.client(patient=True)]
    for client in clients:
        client.meta.events.register("before-call.s3", note)
    try:
        yield seen
    finally:
        for client in clients:
            client.meta.events.unregister("before-call.s3", note)


@pytest.fixture
def gets(s3_server: S3Test) -> Iterator[Requests]:
    """What is read of objects."""
    with requests("GetObject") as seen:
        yield seen
