"""Runs one training in a process of its own, by default on one thread: several side by side, each with its own random generators.

A small model gains little from a second thread, and threads of one training wait for each other at every operation when anything else
runs on the machine.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def _quiet(threads: int) -> None:
    import os

    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()


def in_process(function: Callable[..., Result], *args: Any, threads: int = 1, **options: Any) -> Result:
    """``function(*args, **options)`` in a fresh process with so many threads of torch; its result, or its exception, comes back.

    All must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet, initargs=(threads,)) as pool:
        return pool.submit(function, *args, **options).result()
