"""Keeps lm-eval and what it calls quiet, and turns its progress bars into reports to a caller.

lm-eval has no public way to either, so that its modules' ``tqdm`` is replaced; a test watches that they still have one.
"""

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with the task's name, the requests answered so far and their number."""

ONE_AT_A_TIME = threading.Lock()
"""For who loads models to score or to try them: seeds, log levels and HF_ALLOW_CODE_EVAL belong to the whole process, and a model fills the
device anyway."""

MODULES = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface", "lm_eval.models.api_models")
"""Where lm-eval draws bars."""


class _Bar:
    """Stands in for tqdm inside lm-eval: draws nothing, and reports requests."""

    def __init__(
        self, report: Callable[[int, int], None], iterable: Iterable[Any] = (), *, total: int | None = None, **_: Any
    ) -> None:
        self._report, self._iterable, self._total, self._done = report, iterable, total or 0, 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, n: int = 1) -> None:
        self._done += n
        self._report(self._done, self._total)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def quiet(progress: Progress | None) -> Iterator[Callable[[str], None]]:
    """lm-eval, transformers and datasets without chatter or bars of their own; their errors stay visible.

    Gives a function that names the task which ``progress`` is told. Changes the state of the whole process: one caller at a time.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    current = [""]

    def report(done: int, total: int) -> None:
        if progress:
            progress(current[0], done, total)

    def bar(*args: Any, **kwargs: Any) -> _Bar:
        return _Bar(report, *args, **kwargs)

    with contextlib.ExitStack() as before:
        for module in map(importlib.import_module, MODULES):
            before.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = bar  # type: ignore[attr-defined]
        # Requests that wait side by side have a bar of their own, which tells no number.
        several = importlib.import_module("lm_eval.models.api_models")
        before.callback(setattr, several, "tqdm_asyncio", several.tqdm_asyncio)
        several.tqdm_asyncio = SimpleNamespace(gather=partial(several.tqdm_asyncio.gather, disable=True))  # type: ignore[attr-defined]
        for logger in map(logging.getLogger, ("lm_eval", "transformers", "datasets")):
            before.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if transformers_logging.is_progress_bar_enabled():
            before.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        if not datasets.are_progress_bars_disabled():
            before.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield lambda name: current.__setitem__(0, name)
