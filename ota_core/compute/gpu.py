"""Work on GPUs: every worker thread has a CUDA stream of its own, so that one block is copied while another computes.

A block goes from its file into pinned memory, over the thread's stream to the GPU, through the rule's tensors, and back into pinned
memory. The streams of several threads overlap: copy engines in both directions and the arithmetic run side by side. With device ``cuda``
the threads share out all GPUs that torch sees; blocks are independent, so that the GPUs never wait for each other.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Blocks of one GPU under way: one is copied to it, one computes, one is copied back.
BLOCKS_UNDER_WAY = 3
# Large enough that starting a kernel costs nothing beside running it.
BLOCK_ELEMENTS = 1 << 22


def gpus_of(name: str) -> list[int]:
    """The GPUs that a device stands for: all of them for ``cuda``, one for ``cuda:1``, none for ``cpu``."""
    device = torch.device(name)
    if device.type != "cuda":
        return []
    return [device.index] if device.index is not None else list(range(torch.cuda.device_count()))


class Lanes:
    """A CUDA stream for every thread that asks, on the GPUs in turn."""

    def __init__(self, gpus: list[int]) -> None:
        self._gpus, self._lock, self._given = gpus, threading.Lock(), 0
        self._local = threading.local()

    @contextmanager
    def mine(self) -> Iterator[None]:
        """This thread's stream, and its GPU, are the current ones inside. What was started on it has ended when this returns."""
        stream = getattr(self._local, "stream", None)
        if stream is None:
            with self._lock:
                gpu = self._gpus[self._given % len(self._gpus)]
                self._given += 1
            stream = self._local.stream = torch.cuda.Stream(device=gpu)
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()


def to_device(rows: torch.Tensor, device: str) -> torch.Tensor:
    """Rows of a file on the GPU, in their own type.

    Through pinned memory, and without waiting for the copy: torch keeps the pinned block until the stream is done with it.
    """
    return rows.pin_memory().to(device, non_blocking=True)


def wait() -> None:
    """Until all that this thread's stream was given is done."""
    torch.cuda.current_stream().synchronize()


def output_rows(rows: int, columns: int, dtype: str) -> torch.Tensor:
    """Where merged rows that come from a GPU are put: pinned memory. dtype: as torch names it."""
    return torch.empty(rows, columns, dtype=getattr(torch, dtype), pin_memory=True)
