"""Runs the same work over many blocks on a few threads, within a memory budget. Results never depend on the cut or the order."""

import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock, local
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from ota_core.errors import OtaError

if TYPE_CHECKING:
    from ota_core.compute.gpu import Lanes

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the units done and the units in all."""

# Tensors of this many elements stay in a core's cache with the intermediate results of a rule on tensors.
CACHE_ELEMENTS = 1 << 16
# A block that is handed to a thread: large enough that handing it over costs nothing, small enough that all threads end together.
BLOCK_ELEMENTS = 1 << 20
# Mapped pages are given back after this many bytes at the latest, whatever the budget: more of them make nothing faster.
MAPPED_BYTES = 192 * 2**20
# More threads than these wait for the memory or the disk rather than compute.
MAX_THREADS = 8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str | int, what: str, least: str) -> int:
    """Bytes of a size such as ``2GiB`` or ``800MB``; an integer is taken as it is. Raises OtaError, below ``least`` too."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not match:
        raise OtaError(f"{what}: got '{text}', expected a size such as 2GiB or 800MB")
    size = int(float(match[1]) * _UNITS[match[2] or ""])
    if least and size < parse_size(least, what, ""):
        raise OtaError(f"{what}: got '{text}', expected at least {least}")
    return size


def parse_memory(text: str | int) -> int:
    """Bytes of a budget for memory. Raises OtaError."""
    return parse_size(text, "memory", "64MiB")


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, mapped pages included, in GiB."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def pick_device(device: str) -> str:
    """The torch device that ``cpu``, ``cuda`` or ``auto`` means here. Raises OtaError when cuda is asked and there is none."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda" and not device.startswith("cuda:"):
        raise OtaError(f"device: got '{device}', expected cpu, cuda or auto")
    if not torch.cuda.is_available():
        raise OtaError("device: cuda is asked for, but torch sees no GPU here; use --device cpu or auto")
    return device


class Limits(TypedDict, total=False):
    """What a stage may take of the machine, and who is told of its progress: nothing that decides a result."""

    memory: str | int
    """A size such as ``2GiB``, the default, or bytes."""
    device: str
    """``cpu``, the default, ``cuda`` or ``auto``: see ``pick_device``."""
    block_elements: int | None
    """Elements of a block; None for what fits the memory."""
    threads: int | None
    progress: Progress | None


@dataclass(kw_only=True)
class Stream:
    """How blocks are worked on: their size, the number of threads, who is told of the progress, whose pages are dropped."""

    block_elements: int = BLOCK_ELEMENTS
    threads: int = field(default_factory=lambda: min(MAX_THREADS, len(os.sched_getaffinity(0))))
    memory: int = 2 * 2**30
    progress: Progress | None = None
    lanes: "Lanes | None" = None
    """Where blocks are worked on by GPUs."""
    droppable: list[Callable[[], None]] = field(default_factory=list)
    """Called when ``mapped_bytes`` have been read through memory maps since the last time."""
    settle: Callable[[], None] | None = None
    """Called by each thread after an item of its own; what it raises ends the work."""
    _read: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def mapped_bytes(self) -> int:
        """The share of the budget that mapped pages may take: a quarter, at most ``MAPPED_BYTES``."""
        return min(self.memory // 4, MAPPED_BYTES)

    def count_read(self, size: int) -> None:
        """Note bytes read from mapped files; give the pages back when they would grow over the budget."""
        with self._lock:
            self._read += size
            if self._read < self.mapped_bytes:
                return
            self._read = 0
        for drop in self.droppable:
            drop()

    def map(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        what: str,
        size: Callable[[Item], int] = lambda _: 1,
        ahead: Callable[[Item], None] | None = None,
        at_once: int | None = None,
    ) -> list[Result]:
        """``work`` of every item, in the order of the items. The first error stops the rest and is raised.

        ``at_once``: fewer than all threads, for items that take much memory. ``size`` weighs an item in the progress. ``ahead`` is told of the item whose turn comes when the one that is started now is done.
        """
        todo: Sequence[Item] = list(items)
        if not todo:
            return []
        total, done = sum(size(item) for item in todo), 0
        if self.progress:
            self.progress(what, 0, total)
        threads = min(at_once or self.threads, self.threads)
        with _torch_threads.single(), ThreadPoolExecutor(threads) as pool:
            futures: dict[Future[Result], int] = {}
            results: dict[int, Result] = {}
            queue = iter(enumerate(todo))

            def step(index: int, item: Item) -> Result:
                if ahead is not None and index + threads < len(todo):
                    ahead(todo[index + threads])
                _torch_threads.settle()
                with self.lanes.mine() if self.lanes else nullcontext():
                    result = work(item)
                    if self.settle is not None:
                        self.settle()
                    return result

            def submit(count: int) -> None:
                for index, item in islice(queue, count):
                    futures[pool.submit(step, index, item)] = index

            try:
                submit(4 * threads)
                while futures:
                    finished, _ = wait(futures, return_when=FIRST_COMPLETED)
                    for future in finished:
                        index = futures.pop(future)
                        results[index] = future.result()
                        done += size(todo[index])
                    if self.progress:
                        self.progress(what, done, total)
                    submit(len(finished))
            except BaseException:
                for future in futures:
                    future.cancel()
                wait(futures, return_when=FIRST_EXCEPTION)
                raise
        return [results[i] for i in range(len(todo))]


class _TorchThreads:
    """torch's own threads would fight with the streams'. The first stream takes the process's setting and the last restores it.

    OpenMP keeps the number for each thread besides, so that every thread of a stream says it for itself: in one that does not, a small
    product of matrices waits for helpers ten times longer than it computes.

    torch may come while a stream runs, when a block is one that no compiled loop covers; a stream of compiled loops never loads it.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, 0
        self._own = local()

    @contextmanager
    def single(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            self.settle()
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._before:
                    sys.modules["torch"].set_num_threads(self._before)
                    self._before = 0

    def settle(self) -> None:
        """One thread for torch from here on, where it is loaded."""
        torch: Any = sys.modules.get("torch")
        if not hasattr(torch, "set_num_threads"):  # a module that is being imported lacks what comes last
            return
        with self._lock:
            if self._before == 0:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)
        if not getattr(self._own, "settled", False):
            torch.set_num_threads(1)
            self._own.settled = True


_torch_threads = _TorchThreads()
