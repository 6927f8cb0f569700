"""Two models' scores on the same documents: how large a difference is, and how likely by chance.

Noise is judged by pairs, a document's score by the candidate minus its score by the reference, with the sign-flip permutation
test (Fisher, The Design of Experiments, 1935, section 21; for binary scores it is McNemar's exact test). Under "no difference"
each document's sign is a fair coin, whatever the distribution of the scores.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import OtaError, raise_all
from tasks.evaluation.scores import ModelScores, mlflow_metric_name
from tasks.evaluation.suites import Suite, TaskEntry

# lm-eval gives some means in single precision.
_REPRODUCED = 1e-6
# Flips held in memory at once: about 40 MB in scipy, whatever the number of documents.
_FLIPS_AT_ONCE = 2**18
# Sums over the same numbers in another order.
_TIED = 1e-9


class GateError(OtaError):
    """Scores that the gate cannot compare, or a decision that does not allow what is asked for."""


Documents = Callable[[str, str], bool]
"""Whether a document counts, by its capability and its hash."""
Pairs = list[tuple[float, NDArray[np.float64]]]
"""Parts of a capability that are averaged each by itself: (weight in the score, (n, 2) candidate's and reference's scores)."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same documents, in the mean of some capabilities' scores."""

    pairs: Pairs
    """The weights add up to 1."""

    @property
    def n(self) -> int:
        """Documents."""
        return sum(len(pair) for _, pair in self.pairs)

    @property
    def means(self) -> tuple[float, float]:
        """The candidate's score and the reference's, 0…1."""
        mine, theirs = (math.fsum(weight * float(pair[:, i].mean()) for weight, pair in self.pairs) for i in (0, 1))
        return mine, theirs

    @property
    def parts(self) -> NDArray[np.float64]:
        """Each document's part in the difference candidate − reference (n,), which is their sum."""
        return np.concatenate([weight / len(pair) * (pair[:, 0] - pair[:, 1]) for weight, pair in self.pairs])

    @property
    def error(self) -> float:
        """The standard error of the difference, over documents as pairs."""
        variances = [weight**2 * float(np.var(pair[:, 0] - pair[:, 1], ddof=1)) / len(pair) for weight, pair in self.pairs]
        return math.sqrt(math.fsum(variances))

    def lower_bound(self, confidence: float) -> float:
        """What the difference is not below, at this one-sided confidence.

        The paired interval of Agresti and Min (Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 24, 2005): two documents more for each part, shared out evenly over won, lost and two kinds of ties. So it holds with few
        documents too, and equal answers on ten documents do not pass for proof that two models are equal.
        """
        middle, variance = 0.0, 0.0
        for weight, pair in self.pairs:
            gains, n = pair[:, 0] - pair[:, 1], len(pair) + 2
            mean = float(gains.sum()) / n
            middle += weight * mean
            variance += weight**2 * ((float(np.square(gains).sum()) + 1) / n - mean**2) / n
        return middle - NormalDist().inv_cdf(confidence) * math.sqrt(variance)


def paired(
    suite: Suite, capabilities: Sequence[str], label: str, candidate: ModelScores, reference: ModelScores,
    documents: Documents | None = None,
) -> Paired:  # fmt: skip
    """The documents of these capabilities as pairs; ``documents`` says which count, all by default. ``label``: the reference's, for messages.

    Raises GateError for other documents, fewer than two, and scores that are not the suite's weighted means over documents.
    """
    return Paired([
        (weight / len(capabilities), pair)
        for capability in capabilities
        for weight, pair in _pairs(suite, capability, label, candidate, reference, documents)
    ])  # fmt: skip


def differences(
    suite: Suite, capabilities: Sequence[str], label: str, candidate: ModelScores, reference: ModelScores
) -> tuple[NDArray[np.float64], float]:
    """``parts`` and ``error`` of all documents of these capabilities as pairs. Raises GateError as ``paired``."""
    found = paired(suite, capabilities, label, candidate, reference)
    return found.parts, found.error


def sign_flips(parts: NDArray[np.float64], *, resamples: int, seed: int) -> float:
    """One-sided p-value of a sum as low as that of ``parts`` (n,), when each has either sign with equal chance.

    Exact where all 2^k sign patterns of the k documents that differ are no more than ``resamples``, else by that many random
    ones. A document that does not differ adds nothing to any of them.
    """
    differing = np.sort(parts[parts != 0])  # sorted: no order of documents shows
    if not len(differing):
        return 1.0
    from scipy.stats import permutation_test

    if len(differing) == 1:  # scipy wants two; a zero adds nothing
        differing = np.append(differing, 0.0)
    # The sum of the gains orders the patterns as their whole sum does: the two differ by half the sum of all sizes, which no flip
    # changes. It cancels nothing, so that scipy's tolerance for ties, relative to the observed value, holds also near no difference.
    result = permutation_test(
        (differing,), _gains, permutation_type="samples", alternative="less", vectorized=True,
        n_resamples=resamples, batch=max(1, _FLIPS_AT_ONCE // len(differing)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def max_t(parts: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """One-sided p-values (k,) that k candidates are better than their common reference, corrected for looking at all of them.

    parts: (k, n), each document's part in each candidate's difference. The single-step max-T method (Westfall and Young, Resampling-Based
    Multiple Testing, 1993, section 2.3): a document's sign flips for all candidates at once, which keeps how much alike they are, and a
    candidate's sum in units of its own root sum of squares, which no flip changes, is compared with the largest of all candidates. The
    chance that any candidate without a gain has a p-value of at most a is at most a. Exact where 2^m patterns of the m documents on which
    anybody differs are no more than ``resamples``.
    """
    norms = np.sqrt(np.square(parts).sum(axis=1))
    scaled = np.divide(parts, norms[:, None], out=np.zeros_like(parts), where=norms[:, None] > 0)
    scaled = scaled[:, np.any(scaled != 0, axis=0)]
    seen = scaled.sum(axis=1)
    m = scaled.shape[1]
    exact = m < 62 and 2**m <= resamples
    patterns = itertools.product((1.0, -1.0), repeat=m) if exact else None
    rng, total, reached = np.random.default_rng(seed), 2**m if exact else resamples, np.zeros(len(parts))
    at_once = max(1, _FLIPS_AT_ONCE // max(m, 1))
    for start in range(0, total, at_once):
        rows = min(at_once, total - start)
        signs = np.array(list(itertools.islice(patterns, rows))) if patterns else rng.choice((1.0, -1.0), size=(rows, m))
        largest = (signs.reshape(rows, m) @ scaled.T).max(axis=1)
        reached += (largest[:, None] >= seen - _TIED).sum(axis=0)
    return np.asarray(reached / total if exact else (reached + 1) / (total + 1))


def _gains(parts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(np.sum(np.maximum(parts, 0.0), axis=axis))


def _pairs(
    suite: Suite, capability: str, label: str, candidate: ModelScores, reference: ModelScores, documents: Documents | None
) -> Pairs:
    """The documents of a capability as pairs. The weights add up to 1. Raises GateError, also when the scores are not reproduced."""
    models = {f"'{capability}' of the candidate": candidate, f"'{capability}' of the {label}": reference}
    first, second = (scores.samples.get(capability, {}) for scores in models.values())
    raise_all(list(_other_documents(capability, label, first, second)), GateError)
    if capability not in suite.capabilities:
        raise GateError(f"suite {suite.name} has no capability '{capability}'; pass the suite that the models were scored on")
    ran = [entry for entry in suite.capabilities[capability].tasks if entry.task in candidate.capabilities[capability].tasks]
    if {entry.task for entry in ran} != candidate.capabilities[capability].tasks.keys():
        strange = sorted(candidate.capabilities[capability].tasks.keys() - {entry.task for entry in ran})
        raise GateError(
            f"suite {suite.name} has no task {', '.join(strange)} in {capability}; pass the suite that the models were scored on"
        )
    leaves = _leaves(ran, first)
    total = math.fsum(entry.weight for entry in ran)
    pairs: Pairs = []
    for entry in ran:
        tables = [_table(first[leaf], second[leaf], capability, documents) for leaf in leaves[entry.task]]
        reported = [_reported(scores, capability, entry) for scores in models.values()]
        pairs += [(entry.weight / total * share, pair) for share, pair in _parts(capability, entry, tables, reported)]
    for i, (which, scores) in enumerate(models.items()):
        seen = math.fsum(weight * float(pair[:, i].mean()) for weight, pair in pairs)
        score = scores.capabilities[capability].score
        if score is None or abs(seen - score) > _REPRODUCED:
            raise GateError(
                f"the weights of suite {suite.name} give {which} a score of {seen:.6f}, it was reported as {score}; "
                "pass the suite that the models were scored on"
            )
    pairs = [(weight, pair[pair[:, 2] > 0, :2]) for weight, pair in pairs]
    short = min(len(pair) for _, pair in pairs)
    if short < 2:
        raise GateError(
            f"{capability} has a task with {short} document; the noise of one cannot be told, raise the limit to 2 or more"
        )
    return pairs


def _parts(capability: str, entry: TaskEntry, tables: list[NDArray[np.float64]], reported: list[float]) -> Pairs:
    """A task's or group's documents in the parts whose plain mean is the number that was reported for both models."""
    # lm-eval pools a group's documents, or takes the mean of its tasks' means; which, the reported number tells.
    for parts in ([np.concatenate(tables)], tables) if tables else ():
        means = np.mean([part[:, :2].mean(axis=0) for part in parts], axis=0)
        if np.allclose(means, reported, rtol=0, atol=_REPRODUCED):
            return [(1 / len(parts), part) for part in parts]
    raise GateError(
        f"the documents of task {entry.task} do not give its {entry.metric} for {capability}: it is no mean over documents, "
        "so that the gate cannot compare it in pairs; choose a metric with one number a document for the suite"
    )


def _other_documents(
    capability: str, label: str, first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    if not first and not second:
        yield f"{capability} holds no document's score; benchmark candidate and {label} again"
    for task in sorted({*first, *second}):
        mine, theirs = first.get(task, {}), second.get(task, {})
        if not mine and not theirs:
            yield f"{capability}, task {task} holds no document's score; choose a metric with one number a document for the suite"
        if mine.keys() != theirs.keys():
            yield (
                f"{capability}, task {task}: {len(mine)} documents of the candidate, {len(theirs)} of the {label}, "
                f"{len(mine.keys() & theirs.keys())} of them the same; benchmark both on the same data"
            )


def _table(
    mine: Mapping[str, float], theirs: Mapping[str, float], capability: str, documents: Documents | None
) -> NDArray[np.float64]:
    """(n, 3): both scores of each document and whether it counts (1 or 0), in the order of the documents' hashes."""
    rows = [[mine[key], theirs[key], documents is None or documents(capability, key)] for key in sorted(mine)]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _leaves(entries: Sequence[TaskEntry], samples: Mapping[str, object]) -> dict[str, list[str]]:
    """Task or group of the suite to the tasks that hold its documents.

    Samples name the tasks, not their group. Of several groups in one capability, a task belongs to the one with the longest
    name that its own begins with, as lm-eval's are called; whether that is right shows when the groups' numbers come out.
    """
    names = [entry.task for entry in entries]
    found: dict[str, list[str]] = {name: [name] if name in samples else [] for name in names}
    groups = [name for name in names if name not in samples]
    for leaf in sorted(samples.keys() - set(names)):
        fitting = groups if len(groups) == 1 else [name for name in groups if leaf.startswith(f"{name}_")]
        if fitting:
            found[max(fitting, key=len)].append(leaf)
    return found


def _reported(scores: ModelScores, capability: str, entry: TaskEntry) -> float:
    """The number of a task as lm-eval gave it; NaN, which nothing reproduces, when it is not there."""
    numbers = scores.capabilities[capability].tasks.get(entry.task, {})
    return numbers.get(mlflow_metric_name(f"{entry.metric},{entry.filter}"), math.nan)
