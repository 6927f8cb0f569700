"""Standard errors of held-out losses, of their differences, and of what is recovered, over documents that all models read.

Bits per byte is a ratio of sums over a corpus' documents, Σ bits / Σ bytes. To first order a document moves a ratio R = Σx / Σy by
e = (x − R·y) / Σy, and the variance of R is n / (n − 1) · Σe² (Cochran, Sampling Techniques, 3rd ed., eq. 6.13, for a sample from an unlimited
population). A number made of several ratios moves by the sum of its ratios' effects, weighed by its derivatives (Taylor linearisation:
Särndal, Swensson, Wretman, Model Assisted Survey Sampling, 1992, section 5.5): effects are added document by document before they are squared,
so that what models share cancels. Corpora are independent of each other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from tasks.evaluation.scores import ModelScores

Documents = Mapping[str, tuple[float, int]]
"""Document to the log-likelihood of its text (natural logarithm) and its bytes."""


def ratio_effects(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """What each document moves Σ numerators / Σ denominators by, to first order."""
    total = math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    return [(x - ratio * y) / total for x, y in zip(numerators, denominators, strict=True)]


def standard_error(corpora: Iterable[Sequence[float]]) -> float:
    """The error of a number from its documents' effects, a sequence a corpus; NaN where a corpus has fewer than two documents."""
    variances = [len(e) / (len(e) - 1) * math.fsum(one * one for one in e) if len(e) > 1 else math.nan for e in corpora]
    return math.sqrt(math.fsum(variances)) if variances else math.nan


def loss_error(documents: Documents) -> float:
    """The error of one model's bits per byte on one corpus; NaN for fewer than two documents."""
    if not documents:
        return math.nan
    return standard_error([ratio_effects([_bits(one) for one in documents.values()], [size for _, size in documents.values()])])


def difference_error(first: ModelScores, second: ModelScores, capabilities: Sequence[str]) -> float:
    """The error of the difference of two models' bits per byte, mean over ``capabilities``; NaN where documents were not kept."""
    corpora = []
    for name in capabilities:
        rows = _paired(name, first, second)
        effects = ratio_effects([_bits(a) - _bits(b) for a, b in rows], [size for (_, size), _ in rows]) if rows else []
        corpora.append([one / len(capabilities) for one in effects])
    return standard_error(corpora)


def recovered_error(base: ModelScores, merge: ModelScores, experts: Sequence[tuple[str, ModelScores]]) -> float:
    """The error of (base − merge) / (base − expert), mean over experts, each on its own capability: (capability, the expert's scores).

    The bytes cancel: on each capability it is a ratio of sums, too. One expert a capability. NaN where documents were not kept.
    """
    corpora = []
    for name, expert in experts:
        rows = _paired(name, base, merge, expert)
        gains = ([_bits(b) - _bits(m) for b, m, _ in rows], [_bits(b) - _bits(e) for b, _, e in rows])
        corpora.append([one / len(experts) for one in ratio_effects(*gains)] if rows else [])
    return standard_error(corpora)


def _bits(document: tuple[float, int]) -> float:
    return -document[0] / math.log(2)


def _paired(name: str, *models: ModelScores) -> list[tuple[tuple[float, int], ...]]:
    """Each document of a capability as these models read it; none where a model's documents were not kept."""
    found = [one.loss_samples.get(name, {}) for one in models]
    if not all(found):
        return []
    assert all(one.keys() == found[0].keys() for one in found), f"{name}: scores of one suite are of the same documents"
    return [tuple(one[key] for one in found) for key in found[0]]
