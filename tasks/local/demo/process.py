"""Runs one training in a process of its own, on one thread: several side by side, each with its own random generators.

A small model gains little from a second thread, and threads of one training wait for each other at every operation when anything else
runs on the machine.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")
_to_parent: Connection | None = None
"""In the process of a training: where it says how far it is."""


def _begin(to_parent: Connection | None) -> None:
    """Quiet and single-threaded, before torch loads."""
    global _to_parent
    import os

    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _to_parent = to_parent


def _telling(function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """The function, with a ``progress`` that the calling process hears."""
    assert _to_parent is not None
    with _to_parent as connection:
        return function(*args, **options, progress=lambda *said: connection.send(said))


def in_process(
    function: Callable[..., Result], *args: Any, progress: Callable[..., None] | None = None, **options: Any
) -> Result:
    """``function(*args, **options)`` in a fresh process; its result, or its exception, comes back. All must be picklable.

    ``progress`` is called here, in this thread, with what the function gives to the ``progress`` that it is called with there.
    """
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False) if progress else (None, None)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(told,)) as pool:
        if progress is None or heard is None or told is None:
            return pool.submit(function, *args, **options).result()
        result: Future[Result] = pool.submit(_telling, function, *args, **options)
        told.close()  # the process has its own; once that is closed, or the process is gone, nothing more is to come
        with heard:
            while True:
                try:
                    said = heard.recv()
                except EOFError:
                    break
                progress(*said)
        return result.result()
