"""Which methods look at tensors, rows or columns as a whole, and what of a tensor is held in memory for that."""

from ota_core.plan.views import TensorJob
from ota_core.recipe.recipe import MergeRecipe


def is_vector(job: TensorJob) -> bool:
    """Whether a tensor has one axis at most: methods that look at rows take it as one row."""
    return len(job.shape) < 2


def scope_of(recipe: MergeRecipe, job: TensorJob) -> str:
    """What one factor of nuslerp, model_stock, multislerp or karcher holds for: ``tensor``, ``row`` (along the last axis) or ``column`` (along the first)."""
    setting, method = recipe.setting, recipe.merge_method
    if is_vector(job):
        return "tensor"
    if method == "nuslerp" and not setting("nuslerp_flatten"):
        return "column" if setting("nuslerp_row_wise") else "row"
    return "row" if method == "model_stock" and setting("filter_wise") else "tensor"


def columns_bytes(job: TensorJob) -> int:
    """Memory that a tensor takes which is worked on with a factor for each column: the merged tensor, products and factors of two models."""
    places = job.elements // max(1, job.shape[0]) if job.shape else 1
    return job.elements * job.dtype.itemsize + 8 * 5 * places


def is_whole(recipe: MergeRecipe, job: TensorJob) -> bool:
    """Whether a tensor is merged as one block, refined or not."""
    return recipe.merge_method == "nuslerp" and scope_of(recipe, job) == "column" and not job.copy


def surveys(recipe: MergeRecipe) -> int:
    """Passes over all models that come before the merge's own, for facts of whole tensors, rows or columns."""
    method, setting = recipe.merge_method, recipe.setting
    if method in {"slerp", "ramplus_tl", "multislerp", "karcher"}:
        return 1
    if method == "nuslerp":  # columns are looked at in the merge itself, twice
        return 1 if setting("nuslerp_flatten") or setting("nuslerp_row_wise") else 0
    if method == "model_stock":
        return 0 if setting("filter_wise") else 1
    if method == "sce":  # the weights, and two passes for an exact threshold
        return 3 if setting("density") < 1 else 1
    return 3 if method == "arcee_fusion" else 0
