"""Scores a model on a suite with lm-eval's Python API. The only place that knows lm-eval."""

import importlib.metadata
import logging
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from tasks.evaluation.harness_tasks import load_tasks, skip_reason
from tasks.evaluation.loss_errors import loss_error
from tasks.evaluation.quiet import ONE_AT_A_TIME, Progress, quiet
from tasks.evaluation.scores import CapabilityScore, ModelScores, mlflow_metric_name
from tasks.evaluation.suites import LossEntry, Suite, SuiteError, TaskEntry, suite_digest
from tasks.settings import environment

log = logging.getLogger(__name__)


def score_model(
    model: Path,
    suite: Suite,
    *,
    data_dir: Path | None = None,
    device: str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
) -> ModelScores:
    """Score the Hugging Face checkpoint folder ``model`` on every task of the suite that may run.

    ``data_dir`` stands for ``{data}`` in local task files. ``limit`` (documents per task) overrides the suite's. Names, filters,
    metrics and data files are checked before the first request. Seeds are set anew before each task, so that a score does not
    depend on the tasks before it; lm-eval's response cache is never used, because it is not keyed by the model. Calls from
    several threads take turns. Raises CheckpointError for a model that cannot be loaded, SuiteError for what is wrong with suite
    or data.
    """
    if limit is not None and limit < 1:
        raise SuiteError(f"limit is {limit}; expected at least one document per task, or no limit")
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model} holds no config.json; expected the folder of a Hugging Face checkpoint")
    limit = limit or suite.limit
    # The code_eval metric reads the consent from the environment.
    consent = environment({"HF_ALLOW_CODE_EVAL": "1"} if suite.allow_code_execution else {})
    with ONE_AT_A_TIME, consent, quiet(progress) as name_task, tempfile.TemporaryDirectory(prefix="ota-scores-") as cache:
        started = time.monotonic()  # not the wait for the others' turns
        loaded = load_tasks(suite, data_dir, Path(cache))
        results = {}
        if loaded:
            lm = _load_model(model, suite, device)
            for name, task in loaded.items():
                name_task(name)
                results[name] = _evaluate(lm, suite, name, task, limit)
        seconds = time.monotonic() - started  # before the next may start, or both would count what this thread waits for then
    scores = {name: _capability(suite, name, results) for name in suite.capabilities}
    losses = {name: _loss(suite, entry, results[entry.task]) for name, entry in suite.losses.items()}
    return ModelScores(
        suite=suite.name,
        suite_digest=suite_digest(suite, limit=limit),
        capabilities={name: score for name, (score, _) in scores.items()},
        samples={name: samples for name, (_, samples) in scores.items()},
        losses={name: value for name, (value, _) in losses.items()},
        loss_stderr={name: error for name, (_, found) in losses.items() if not math.isnan(error := loss_error(found))},
        loss_samples={name: found for name, (_, found) in losses.items()},
        limit=limit,
        lm_eval_version=importlib.metadata.version("lm_eval"),
        seconds=round(seconds, 3),
    )


def _load_model(model: Path, suite: Suite, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM
    from safetensors import SafetensorError

    # An absolute path can never be taken for a name on the hub.
    try:
        lm = HFLM(
            pretrained=str(model.resolve()), device=device, batch_size=suite.batch_size, dtype=suite.dtype or "auto"
        )  # fmt: skip
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{model} cannot be loaded for the benchmark: {type(error).__name__}: {error}") from error
    if suite.apply_chat_template and not getattr(lm.tokenizer, "chat_template", None):
        raise SuiteError(f"suite {suite.name} sets apply_chat_template, but the tokenizer of {model} has no chat template")
    return lm


def _evaluate(lm: Any, suite: Suite, name: str, loaded: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """One task's results. Not by ``simple_evaluate``, which spends seconds on a report of the machine in every call."""
    import lm_eval
    import numpy as np
    import torch

    random.seed(suite.seed)
    np.random.seed(suite.seed)
    torch.manual_seed(suite.seed)
    results = lm_eval.evaluate(
        lm=lm,
        task_dict=dict(loaded),
        limit=limit,
        log_samples=True,
        apply_chat_template=suite.apply_chat_template,
        fewshot_as_multiturn=suite.apply_chat_template,
        confirm_run_unsafe_code=suite.allow_code_execution,
    )
    if results is None:
        raise SuiteError(f"suite {suite.name}: lm-eval gave no results for '{name}'; run in one process, without torchrun")
    return dict(results)


def _capability(
    suite: Suite, name: str, results: Mapping[str, Mapping[str, Any]]
) -> tuple[CapabilityScore, dict[str, dict[str, float]]]:
    """The capability's score, and task to document hash to score."""
    values: list[tuple[float, float, float | None]] = []
    n_samples = 0
    tasks: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, float]] = {}
    skipped = []
    for entry in suite.capabilities[name].tasks:
        if entry.task not in results:
            skipped.append(skip_reason(entry))
            continue
        result = results[entry.task]
        numbers = {key: float(value) for key, value in result["results"][entry.task].items() if "," in key and _is_number(value)}
        score = numbers.get(f"{entry.metric},{entry.filter}")
        if score is None or not 0 <= score <= 1:
            seen = f"gave {score}" if score is not None else f"has no such number; it gives {', '.join(sorted(numbers))}"
            wanted = f"{entry.metric},{entry.filter}"
            raise SuiteError(f"suite {suite.name}: expected {wanted} of task '{entry.task}' within 0..1; it {seen}")
        values.append((entry.weight, score, numbers.get(f"{entry.metric}_stderr,{entry.filter}")))
        tasks[entry.task] = {mlflow_metric_name(key): value for key, value in numbers.items()}
        n_samples += sum(count["effective"] for count in result["n-samples"].values())
        samples |= {leaf: _sample_scores(leaf, entry, rows) for leaf, rows in result["samples"].items()}
    total = sum(weight for weight, _, _ in values)
    errors = [weight * error for weight, _, error in values if error is not None]
    capability = CapabilityScore(
        score=sum(weight * score for weight, score, _ in values) / total if values else None,
        stderr=math.hypot(*errors) / total if values and len(errors) == len(values) else None,
        n_samples=n_samples,
        tasks=tasks,
        skipped=tuple(skipped),
    )
    return capability, samples


def _loss(suite: Suite, entry: LossEntry, result: Mapping[str, Any]) -> tuple[float, dict[str, tuple[float, int]]]:
    """Bits per byte of all documents together, and document to (log-likelihood, bytes). lm-eval gives no error for this number."""
    value = result["results"][entry.task].get(f"{entry.metric},{entry.filter}")
    if value is None or not _is_number(value):
        raise SuiteError(f"suite {suite.name}: expected a finite {entry.metric} of task '{entry.task}'; it gave {value}")
    rows = [row for rows in result["samples"].values() for row in rows if row["filter"] == entry.filter]
    numbers = (row[entry.metric] for row in rows)
    return float(value), {key: (float(nats), int(size)) for key, (nats, size) in zip(_document_keys(rows), numbers, strict=True)}


def _is_number(value: Any) -> bool:
    """Python's and numpy's finite numbers; lm-eval also gives "N/A" and NaN."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _sample_scores(task: str, entry: TaskEntry, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Document to score, in lm-eval's order."""
    scores: dict[str, float] = {}
    kept = [row for row in rows if row["filter"] == entry.filter and row.get(entry.metric) is not None]
    for key, row in zip(_document_keys(kept), kept, strict=True):
        value = row[entry.metric]
        if isinstance(value, list) and value and all(_is_number(item) for item in value):
            value = sum(value) / len(value)  # one verdict for each instruction of a prompt (ifeval's inst_level metrics)
        if not _is_number(value):
            log.warning("task %s: %s has no number for each document; paired tests cannot use it", task, entry.metric)
            return {}
        scores[key] = float(value)
    return scores


def _document_keys(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Each document's hash: 16 hex digits; with "#2" and so on for a document that comes again."""
    seen: Counter[str] = Counter()
    for row in rows:
        key = str(row["doc_hash"])[:16]
        seen[key] += 1
        yield key if seen[key] == 1 else f"{key}#{seen[key]}"
