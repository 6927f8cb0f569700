"""The one form that all results of an analysis have: a number a row, with what it is a number of."""

from typing import NamedTuple

from ota_core.plan.roles import Place

BINS = 20
"""Bins of the histograms of kept fractions: equal, over 0 … 1, the last one closed."""


class Row(NamedTuple):
    """One number."""

    analysis: str
    """localisation, moe, sparsity, curvature_overlap, task_vector, compression or preflight."""
    expert: str
    other: str | None
    """The other expert of a pair."""
    layer: int | None
    role: str
    variant: str
    """curvature or magnitude (localisation, sparsity), a compression, or empty."""
    measure: str
    at: float | None
    """Lower edge of a histogram's bin; of a Jaccard, the density of the masks that are compared; of ``moe``,
    the number of the expert of a mixture."""
    value: float
    """NaN where a measure is not defined: the cosine with a vector of zeros, a rank correlation with what is all the same."""
    unit: str
    """fraction, count, norm, bytes/parameter, or empty for a pure number."""
    elements: int
    """What the number is taken over: elements, or rows or columns."""


_UNITS = {
    "density": "fraction", "rows": "count", "columns": "count", "empty_rows": "fraction", "empty_columns": "fraction",
    "cosine_sqrt_v": "", "spearman": "", "jaccard": "fraction", "norm": "norm", "relative_norm": "fraction", "cosine": "",
    "sign_conflict": "fraction", "sqrt_error": "fraction", "bytes_per_param": "bytes/parameter", "mask_jaccard": "fraction",
    "saliency_spearman": "", "row_space": "fraction", "interference": "", "fit": "fraction", "reach": "fraction", "disturbance": "", "lambda": "",
}  # fmt: skip


def row(
    analysis: str,
    expert: str,
    place: Place,
    measure: str,
    value: float,
    elements: int,
    *,
    other: str | None = None,
    variant: str = "",
    at: float | None = None,
) -> Row:
    """A row, with the unit of its measure."""
    return Row(
        analysis, expert, other, place.layer, place.role, variant, measure, at, float(value), _UNITS[measure], int(elements)
    )
