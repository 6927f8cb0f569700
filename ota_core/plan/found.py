"""What a merge found out on its way, by parts that add up."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Found(BaseModel):
    """Counts and thresholds of the tensors that were merged, experts by their position in the recipe. JSON-able: machines pass it on."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kept: dict[int, dict[str, int]] = {}
    """Elements that FFG kept of each tensor."""
    thresholds: dict[int, dict[str, float]] = {}
    """τ of each tensor."""
    averaged: list[str] = []
    """Tensors that were averaged for want of curvature."""
    compression: dict[str, dict[str, Any]] = {}
    """Expert's name → what its compression lost."""
    scale: float | None = None
    """λ, where the recipe leaves it to the row spaces."""
    scales: dict[str, float] = {}
    """λ of each tensor that holds matrices."""
    residuals: dict[str, float] = {}
    """The largest relative residual of each tensor's row-space regressions."""

    @classmethod
    def sum(cls, parts: Sequence["Found"]) -> "Found":
        """What the parts of one merge, each of other tensors, found together."""
        kept: dict[int, dict[str, int]] = {}
        thresholds: dict[int, dict[str, float]] = {}
        compression: dict[str, dict[str, Any]] = {}
        for part in parts:
            compression |= part.compression
            for expert, counts in part.kept.items():
                kept.setdefault(expert, {}).update(counts)
            for expert, taus in part.thresholds.items():
                thresholds.setdefault(expert, {}).update(taus)
        averaged = sorted({name for part in parts for name in part.averaged})
        residuals = {name: value for part in parts for name, value in part.residuals.items()}
        scales = {name: value for part in parts for name, value in part.scales.items()}
        scale = next((part.scale for part in parts if part.scale is not None), None)
        return cls(
            kept=kept, thresholds=thresholds, averaged=averaged, compression=compression, scale=scale, scales=scales, residuals=residuals
        )  # fmt: skip
