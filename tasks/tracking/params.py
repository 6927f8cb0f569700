"""The parameters that every merge logs under the same names, so that MLflow's compare page draws all methods in one picture.

Its parallel coordinates leave out a run that lacks one of the chosen keys, and an axis is numeric only if every value on it is a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from ota_core.errors import ArtifactError
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.varying import middle

UNUSED = "unused"
"""``compression`` of a method that reads no second moments."""


def comparable_params(
    recipe: MergeRecipe, densities: Mapping[str, float], scale: float | None = None
) -> dict[str, str | int | float]:
    """``density``, ``power``, ``compression``, ``lambda`` and ``expert_count`` of any recipe.

    ``densities``: the realised fraction of each expert's elements that was kept, where masks were made. ``scale``: λ as the merge found it,
    where the recipe says ``auto``; ``lambda_rule`` says so then, because ``lambda`` is a number in every run.

    A method that has no such parameter gets the value that it amounts to: density 1 (every edit is kept), λ 1, and as power of the
    curvature 0 for a mean that asks no curvature, 1 for Fisher merging. The density is one number: the mean over the experts, of
    what was asked for, or of what was realised under a threshold. Where experts differ, ``density_per_expert`` lists them.
    """
    asked = [middle(recipe.setting("density", i)) for i in range(len(recipe.models))]
    thresholds = [recipe.setting("precond_threshold", i) for i in range(len(recipe.models))]
    if recipe.merge_method in {"linear", "task_arithmetic", "fisher", "slerp"}:
        asked = [1.0] * len(asked)
    realised = list(densities.values())
    if any(threshold is not None for threshold in thresholds) and len(realised) == len(asked):
        each = [float(r) if t is not None else 1.0 if d is None else float(d)
                for r, t, d in zip(realised, thresholds, asked, strict=True)]  # fmt: skip
    else:
        each = [1.0 if density is None else float(density) for density in asked]
    power = {"ota": middle(recipe.setting("power")), "fisher": 1.0}.get(recipe.merge_method, 0.0)
    if recipe.auto and scale is None:
        raise ArtifactError("the record of this merge holds no λ, though its recipe leaves it to the merge; merge it again")
    uses_lambda = "lambda" in recipe.effective()["parameters"]
    given = scale if recipe.auto else middle(recipe.setting("lambda")) if uses_lambda else 1.0
    params: dict[str, str | int | float] = {
        "density": each[0] if len(set(each)) == 1 else fmean(each),
        "power": float(power),
        "compression": recipe.setting("compression") if recipe.needs_moments else UNUSED,
        "lambda": float(given if given is not None else 1.0),
        "expert_count": len(recipe.models),
    }
    if recipe.auto:
        params["lambda_rule"] = str(recipe.setting("lambda"))
    if len(set(each)) > 1:
        params["density_per_expert"] = ",".join(f"{density:g}" for density in each)
    return params
