"""Runs one training in a process of its own, on one thread: several side by side, each with its own random generators.

A small model gains little from a second thread, and threads of one training wait for each other at every operation when anything else
runs on the machine.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def _quiet_single_thread() -> None:
    import os

    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def in_process(function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """``function(*args, **options)`` in a fresh process; its result, or its exception, comes back. All must be picklable."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet_single_thread) as pool:
        return pool.submit(function, *args, **options).result()
