"""Scores a model on a suite with lm-eval's Python API. The only place that knows lm-eval."""

import importlib.metadata
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from ota_core.errors import CheckpointError
from tasks.evaluation.answers import answers_of, write_answers
from tasks.evaluation.harness_tasks import load_tasks
from tasks.evaluation.loading import backend_class, load_model
from tasks.evaluation.loss_errors import loss_error
from tasks.evaluation.quiet import ONE_AT_A_TIME, Progress, quiet
from tasks.evaluation.results import capability_score, held_out_loss
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError, suite_digest
from tasks.evaluation.template import decided
from tasks.settings import environment


def score_model(
    model: Path,
    suite: Suite,
    *,
    data_dir: Path | None = None,
    device: str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
    served_as: Sequence[str] = (),
    answers_to: Path | None = None,
) -> ModelScores:
    """Score the Hugging Face checkpoint folder ``model`` on every task of the suite that may run.

    ``data_dir`` stands for ``{data}`` in local task files. ``limit`` (documents per task) overrides the suite's. Names, filters,
    metrics and data files are checked before the first request. Seeds are set anew before each task, so that a score does not
    depend on the tasks before it (vllm and sglang, which have seeds of their own, take them once); lm-eval's response cache is never used,
    because it is not keyed by the model. Calls from several threads take turns. ``served_as``: names under which a server, where the suite
    names one, may serve the model. ``answers_to``: a file for what was asked and answered, unless the suite says ``documents: false``. Raises CheckpointError for a model that cannot be loaded, SuiteError for what is wrong with suite, data or
    server.
    """
    if limit is not None and limit < 1:
        raise SuiteError(f"limit is {limit}; expected at least one document per task, or no limit")
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model} holds no config.json; expected the folder of a Hugging Face checkpoint")
    with LoadedModel(model, suite, data_dir=data_dir, device=device, progress=progress, served_as=served_as) as loaded:
        return loaded.score(limit, progress, answers_to)


class LoadedModel:
    """A suite's tasks and a checkpoint on them, loaded once; scored as often as its weights are others. A context manager.

    A score is that of a model that was loaded anew: seeds and few-shot examples begin anew before each task. Arguments, and what entering
    raises, are those of ``score_model``.
    """

    def __init__(
        self, model: Path, suite: Suite, *, data_dir: Path | None = None, device: str = "cpu", progress: Progress | None = None,
        served_as: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if suite.apply_chat_template == "auto":  # a model by itself is a comparison of one
            suite, _ = decided(suite, {model.name: model})
        self._model, self._suite, self._data_dir, self._device, self._served_as = model, suite, data_dir, device, served_as
        self._progress, self._stack = progress, ExitStack()

    def __enter__(self) -> Self:
        suite = self._suite
        with ExitStack() as stack, _alone(suite, self._progress):
            started = time.monotonic()  # not the wait for the others' turns
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="ota-scores-"))
            backend_class(suite.backend)  # before the tasks, which may take minutes to load
            self._tasks = load_tasks(suite, self._data_dir, Path(cache))
            self._lm = load_model(self._model, suite, self._device, self._served_as) if self._tasks else None
            self._loading = time.monotonic() - started  # counts with the first score
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lm = None
        self._stack.close()

    @property
    def module(self) -> Any:
        """The model as the backend has it: torch's with lm-eval's ``hf``; None where no task of the suite may run."""
        return getattr(self._lm, "model", None)

    def score(self, limit: int | None = None, progress: Progress | None = None, answers_to: Path | None = None) -> ModelScores:
        """The scores of the model as it is now. ``limit`` overrides the suite's; ``answers_to`` as in ``score_model``."""
        suite, limit = self._suite, limit or self._suite.limit
        repeats = {entry.task: entry.repeats for entry in suite.all_tasks()}
        results: dict[str, list[dict[str, Any]]] = {}
        with _alone(suite, progress) as name_task:
            started = time.monotonic()
            for name, task in self._tasks.items():
                name_task(name)
                seeds = range(suite.seed, suite.seed + repeats[name])
                results[name] = [_evaluate(self._lm, suite, name, task, limit, seed) for seed in seeds]
            # Before the next may start, or both would count what this thread waits for then.
            seconds, self._loading = time.monotonic() - started + self._loading, 0.0
        if answers_to is not None and suite.documents:
            write_answers(answers_to, answers_of(suite, results))
        return _scores_of(suite, results, limit, seconds)


@contextmanager
def _alone(suite: Suite, progress: Progress | None) -> Iterator[Callable[[str], None]]:
    """lm-eval's turn; gives what names the task for ``progress``."""
    # The code_eval metric reads the consent from the environment.
    consent = environment({"HF_ALLOW_CODE_EVAL": "1"} if suite.allow_code_execution else {})
    with ONE_AT_A_TIME, consent, quiet(progress) as name_task:
        yield name_task


def _scores_of(
    suite: Suite, results: Mapping[str, Sequence[Mapping[str, Any]]], limit: int | None, seconds: float
) -> ModelScores:  # fmt: skip
    scores = {name: capability_score(suite, name, results) for name in suite.capabilities}
    losses = {name: held_out_loss(suite, entry, results[entry.task][0]) for name, entry in suite.losses.items()}
    return ModelScores(
        suite=suite.name,
        suite_digest=suite_digest(suite, limit=limit),
        capabilities={name: score for name, (score, _) in scores.items()},
        samples={name: samples for name, (_, samples) in scores.items()},
        losses={name: value for name, (value, _) in losses.items()},
        loss_stderr={name: error for name, (_, found) in losses.items() if not math.isnan(error := loss_error(found))},
        loss_samples={name: found for name, (_, found) in losses.items()},
        tiers=suite.tiers,
        chat_template=suite.apply_chat_template is True,
        backend=suite.backend.label(),
        limit=limit,
        lm_eval_version=importlib.metadata.version("lm_eval"),
        seconds=round(seconds, 3),
    )


def _evaluate(lm: Any, suite: Suite, name: str, loaded: Mapping[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """One task's results, of answers that are drawn with ``seed``; the examples in its prompts are those of the suite's seed.

    Not by ``simple_evaluate``, which spends seconds on a report of the machine in every call.
    """
    import lm_eval
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if suite.backend.is_server:
        lm._seed = seed  # what lm-eval sends with every request
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=suite.seed)
    try:
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=dict(loaded),
            limit=limit,
            log_samples=True,
            apply_chat_template=suite.apply_chat_template is True,
            fewshot_as_multiturn=suite.apply_chat_template is True,
            confirm_run_unsafe_code=suite.allow_code_execution,
        )
    except OSError as error:
        if not suite.backend.is_server:
            raise
        raise SuiteError(f"{suite.backend.server} stopped answering during '{name}': {type(error).__name__}: {error}") from error
    if results is None:
        raise SuiteError(f"suite {suite.name}: lm-eval gave no results for '{name}'; run in one process, without torchrun")
    return dict(results)
