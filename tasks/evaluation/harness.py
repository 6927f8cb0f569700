"""Scores a model on a suite with lm-eval's Python API. The only place that knows lm-eval."""

import importlib.metadata
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    limit = limit or suite.limit
    if suite.apply_chat_template == "auto":  # a model by itself is a comparison of one
        suite, _ = decided(suite, {model.name: model})
    # The code_eval metric reads the consent from the environment.
    consent = environment({"HF_ALLOW_CODE_EVAL": "1"} if suite.allow_code_execution else {})
    with ONE_AT_A_TIME, consent, quiet(progress) as name_task, tempfile.TemporaryDirectory(prefix="ota-scores-") as cache:
        started = time.monotonic()  # not the wait for the others' turns
        backend_class(suite.backend)  # before the tasks, which may take minutes to load
        loaded = load_tasks(suite, data_dir, Path(cache))
        repeats = {entry.task: entry.repeats for entry in suite.all_tasks()}
        results = {}
        if loaded:
            lm = load_model(model, suite, device, served_as)
            for name, task in loaded.items():
                name_task(name)
                results[name] = [_evaluate(lm, suite, name, task, limit, suite.seed + i) for i in range(repeats[name])]
        seconds = time.monotonic() - started  # before the next may start, or both would count what this thread waits for then
    if answers_to is not None and suite.documents:
        write_answers(answers_to, answers_of(suite, results))
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
