"""From what lm-eval gives for a task, once or for several seeds, to scores with their errors. No model is asked here.

A task that is repeated with other seeds counts each document by its mean over the repeats: the standard error is that of these means over
documents, which holds both how documents differ and how answers to one of them do (clusters are the documents: Miller, Adding Error Bars to
Evals, arXiv:2411.00640, sections 2.2 and 3.1).
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from tasks.evaluation.harness_tasks import skip_reason
from tasks.evaluation.loss_errors import standard_error
from tasks.evaluation.scores import ANSWER_LENGTH, CapabilityScore, mlflow_metric_name
from tasks.evaluation.suites import LossEntry, Suite, SuiteError, TaskEntry

log = logging.getLogger(__name__)

Result = Mapping[str, Any]
"""What ``lm_eval.evaluate`` gives for one task or group."""
Samples = dict[str, dict[str, float]]
"""Task to document to score."""

# lm-eval gives some means in single precision.
_REPRODUCED = 1e-6


def capability_score(suite: Suite, name: str, results: Mapping[str, Sequence[Result]]) -> tuple[CapabilityScore, Samples]:
    """The capability's score, and what it is of. ``results``: task to its results, one a repeat."""
    values: list[tuple[float, float, float | None]] = []
    n_samples = 0
    tasks: dict[str, dict[str, float]] = {}
    samples: Samples = {}
    skipped = []
    for entry in suite.capabilities[name].tasks:
        if entry.task not in results:
            skipped.append(skip_reason(entry))
            continue
        runs = results[entry.task]
        found = _samples(entry, runs)
        numbers = _numbers(entry, runs, found)
        score = numbers.get(f"{entry.metric},{entry.filter}")
        if score is None or not 0 <= score <= 1:
            seen = f"gave {score}" if score is not None else f"has no such number; it gives {', '.join(sorted(numbers))}"
            wanted = f"{entry.metric},{entry.filter}"
            raise SuiteError(f"suite {suite.name}: expected {wanted} of task '{entry.task}' within 0..1; it {seen}")
        values.append((entry.weight, score, numbers.get(f"{entry.metric}_stderr,{entry.filter}")))
        tasks[entry.task] = {mlflow_metric_name(key): value for key, value in numbers.items()} | _answer_length(runs)
        n_samples += sum(count["effective"] for count in runs[0]["n-samples"].values())
        samples |= found
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


def held_out_loss(suite: Suite, entry: LossEntry, result: Result) -> tuple[float, dict[str, tuple[float, int]]]:
    """Bits per byte of all documents together, and document to (log-likelihood, bytes). lm-eval gives no error for this number."""
    value = result["results"][entry.task].get(f"{entry.metric},{entry.filter}")
    if value is None or not _is_number(value):
        raise SuiteError(f"suite {suite.name}: expected a finite {entry.metric} of task '{entry.task}'; it gave {value}")
    rows = [row for rows in result["samples"].values() for row in rows if row["filter"] == entry.filter]
    numbers = (row[entry.metric] for row in rows)
    return float(value), {key: (float(nats), int(size)) for key, (nats, size) in zip(document_keys(rows), numbers, strict=True)}


def _numbers(entry: TaskEntry, runs: Sequence[Result], samples: Samples) -> dict[str, float]:
    """All numbers of a task; of repeats their means, with the error of the number that counts alone."""
    each = [
        {key: float(value) for key, value in run["results"][entry.task].items() if "," in key and _is_number(value)}
        for run in runs
    ]
    if len(runs) == 1:
        return each[0]
    means = {key: fmean(one[key] for one in each) for key in each[0] if "_stderr," not in key and all(key in one for one in each)}
    error = _clustered_error(
        [list(one.values()) for one in samples.values()], means.get(f"{entry.metric},{entry.filter}", math.nan)
    )
    return means if math.isnan(error) else means | {f"{entry.metric}_stderr,{entry.filter}": error}


def _clustered_error(tables: Sequence[Sequence[float]], reported: float) -> float:
    """The error of the mean over documents' own means, a table a task of a group; NaN for what is no mean over documents."""
    # lm-eval pools a group's documents, or takes the mean of its tasks' means; which, the reported number tells.
    for parts in ([[value for table in tables for value in table]], list(tables)):
        if all(parts) and abs(fmean(map(fmean, parts)) - reported) < _REPRODUCED:
            return standard_error([[(value - fmean(part)) / len(part) / len(parts) for value in part] for part in parts])
    return math.nan


def _answer_length(runs: Sequence[Result]) -> dict[str, float]:
    """Mean length of what a model wrote, in characters, before any filter, with its error over documents; nothing for a task that only reads."""
    lengths: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        for task, rows in run["samples"].items():
            first = [row for row in rows if row["filter"] == rows[0]["filter"]]
            for key, row in zip(document_keys(first), first, strict=True):
                written = [answer for answers in row["resps"] for answer in answers if isinstance(answer, str)]
                lengths.setdefault((task, key), []).extend(map(len, written))
    means = [fmean(one) for one in lengths.values() if one]
    if not means:
        return {}
    error = _clustered_error([means], fmean(means))
    return {ANSWER_LENGTH: fmean(means)} | ({} if math.isnan(error) else {f"{ANSWER_LENGTH}_stderr": error})


def _is_number(value: Any) -> bool:
    """Python's and numpy's finite numbers; lm-eval also gives "N/A" and NaN."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _samples(entry: TaskEntry, runs: Sequence[Result]) -> Samples:
    """Every document's score in every task below an entry, in lm-eval's order; of repeats their mean."""
    each = [{leaf: _sample_scores(leaf, entry, rows) for leaf, rows in run["samples"].items()} for run in runs]
    return {leaf: {key: fmean(one[leaf][key] for one in each) for key in scores} for leaf, scores in each[0].items()}


def _sample_scores(task: str, entry: TaskEntry, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Document to score, in lm-eval's order."""
    scores: dict[str, float] = {}
    kept = [row for row in rows if row["filter"] == entry.filter and row.get(entry.metric) is not None]
    for key, row in zip(document_keys(kept), kept, strict=True):
        value = row[entry.metric]
        if isinstance(value, list) and value and all(_is_number(item) for item in value):
            value = sum(value) / len(value)  # one verdict for each instruction of a prompt (ifeval's inst_level metrics)
        if not _is_number(value):
            log.warning("task %s: %s has no number for each document; paired tests cannot use it", task, entry.metric)
            return {}
        scores[key] = float(value)
    return scores


def document_keys(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Each document's hash: 16 hex digits; with "#2" and so on for a document that comes again."""
    seen: Counter[str] = Counter()
    for row in rows:
        key = str(row["doc_hash"])[:16]
        seen[key] += 1
        yield key if seen[key] == 1 else f"{key}#{seen[key]}"
