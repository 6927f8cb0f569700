"""Whether experts will merge, before they are merged: how alike they are in pairs, and what a recipe's merged edit does to the inputs of each.

An expert's edit δ of a matrix answers to the inputs that its training saw: its rows span them (docs/methods.md section 8). Everything here
is inner products of what edits do to these inputs, H_i[x, y] = ⟨x δ_iᵀ, y δ_iᵀ⟩, with x and y the experts' edits, the merged edit, and the
merged edits without one of the experts:

- row-space overlap of i and j: ‖δ_j δ_iᵀ‖² / (‖δ_i δ_iᵀ‖ ‖δ_j δ_jᵀ‖), the cosine between the Grams of their inputs: 0 for none in common, 1 for the same;
- interference of j on i: ‖δ_j δ_iᵀ‖ / ‖δ_i δ_iᵀ‖, how strongly j's edit acts on i's inputs, where i's own acts with strength 1;
- reach of i: ⟨X δ_iᵀ, δ_i δ_iᵀ⟩ / ‖δ_i δ_iᵀ‖² of the merged edit X: how far it goes, on i's inputs, the way that i's own edit goes; 1 is as far;
- disturbance of i: what X does to i's inputs beside that, ‖(X − reach · δ_i) δ_iᵀ‖ / ‖δ_i δ_iᵀ‖;
- fit of i: 1 − (1 − reach)² − disturbance² = 1 − ‖(X − δ_i) δ_iᵀ‖² / ‖δ_i δ_iᵀ‖²: 1 where X does to i's inputs all that i's own edit does and no more, 0
  where it is as far from that as the base; at least −1, so that one matrix does not decide the mean;
- λ: the scale of the merged edit that ``lambda: auto`` finds (``ota_core.rules.lambdas``), by the same sums.

Each is the plain mean over the matrices. Legend: M experts, X = 1 + M merged edits and M own ones, P directions of an expert's inputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ota_core.analysis.kernels import count_common, count_conflicts
from ota_core.analysis.pieces import named_pairs, stacked
from ota_core.analysis.run import Analysis
from ota_core.analysis.table import Row, row
from ota_core.compute.exact import PairDots
from ota_core.compute.stream import Limits
from ota_core.errors import CheckpointError, RecipeError
from ota_core.plan.inputs import MergeInputs
from ota_core.plan.matrices import Matrices, all_matrices
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.plan.prepare import Curvature, mask_of
from ota_core.plan.roles import WHOLE
from ota_core.plan.scoring import delta
from ota_core.plan.views import Block, block_elements, parts
from ota_core.recipe.parameters import USED
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from ota_core.rules.base import Rule
from ota_core.rules.lambdas import EXACT, PART, directions_of, row_groups
from ota_core.rules.rule import rule_of

if TYPE_CHECKING:
    import torch

PREFLIGHT = "preflight"
"""``analysis`` of all rows."""
WORST = -1.0
"""The lowest fit of a matrix."""


def preflight(recipe: MergeRecipe, inputs: MergeInputs, *, scratch: Path | None = None, **limits: Unpack[Limits]) -> Analysis:
    """Measure a recipe's experts and its merged edit, before a row-space regression. Rows over the whole model alone:

    of pairs ``cosine`` and ``sign_conflict`` of the edits, ``cosine_sqrt_v`` and ``mask_jaccard`` where the merge has curvature and masks,
    ``row_space``, and ``interference`` (of ``other`` on ``expert``); of experts ``norm``, and ``reach``, ``disturbance`` and ``fit``, these
    also with the variant ``without <name>``; ``lambda`` of the merge as it is set (variant ``recipe``) and as its row spaces say (``auto``). Raises OtaError.
    """
    if recipe.base_model is None:
        raise RecipeError(
            "base_model is missing: whether experts will merge is read from their edits, the difference of each to the base"
        )
    plain = prior_of(recipe)
    with open_plan(plain, inputs, **limits) as plan:
        plan.scratch = scratch
        rule = rule_of(plan)
        rule.prepare()
        left_out: list[str] = []
        rows = [*_pairs(plan, rule, left_out), *_row_spaces(plan, rule, recipe, left_out)]
        settings = {
            "merge_method": recipe.merge_method,
            "experts": [expert.name for expert in plan.experts],
            "refined": recipe.refined,
        }
        return Analysis(rows=rows, settings=settings, left_out=left_out, notes=[*plan.notes])


def prior_of(recipe: MergeRecipe) -> MergeRecipe:
    """The same without row-space regression, at λ = 1 where the method has one: what λ and regression start from."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    if recipe.merge_method == "rowspace":
        raw["merge_method"], raw["parameters"] = "task_arithmetic", {"normalize": True} | raw["parameters"]
    dropped = {"refine", "ridge", "input_curvature", "lambda"}
    raw["parameters"] = {key: value for key, value in raw["parameters"].items() if key not in dropped}
    if "lambda" in USED[raw["merge_method"]]:
        raw["parameters"]["lambda"] = 1.0
    return parse_recipe(raw)


def without(recipe: MergeRecipe, expert: int) -> MergeRecipe:
    """The recipe with no weight for one expert, which merges the others alone."""
    weight = "scaling_factor" if recipe.merge_method == "ota" else "weight"
    models = [entry.model_dump(mode="json", by_alias=True, exclude_none=True) for entry in recipe.models]
    models[expert]["parameters"][weight] = 0.0
    return parse_recipe(recipe.model_dump(mode="json", by_alias=True, exclude_none=True) | {"models": models})


def _pairs(plan: MergePlan, rule: Rule, left_out: list[str]) -> Iterator[Row]:
    """One pass over every element: edits, curvature and masks of every pair."""
    names, experts = [expert.name for expert in plan.experts], len(plan.experts)
    jobs = plan.canonical_jobs()
    curved = {job.name for job in jobs if all(expert.has_curvature(job.canonical) for expert in plan.experts)}
    masked = bool(curved) and all(plan.recipe.ffg(expert.index) for expert in plan.experts)
    facts = Curvature(thresholds=rule.found().thresholds) if masked else Curvature()
    if not curved:
        left_out.append(f"curvature overlap: {plan.recipe.merge_method} reads no second moments")
    if not masked:
        left_out.append("mask overlap: the merge has no FFG mask of every expert")
    edits, roots, lock = PairDots(experts), PairDots(experts), Lock()
    both, opposite, common = (np.zeros((experts, experts), np.int64) for _ in range(3))

    def work(block: Block) -> None:
        mine, bent = PairDots(experts), PairDots(experts)
        moved, apart, kept = (np.zeros((experts, experts), np.int64) for _ in range(3))
        for piece in parts(block, plan.tensor_elements):
            deltas = [delta(plan, expert, *piece) for expert in plan.experts]
            rows = stacked(deltas)
            if not mine.add_rows(rows):
                raise CheckpointError(
                    f"tensor '{block[0].name}' of some model holds a NaN or infinite weight; ota inspect tells of which"
                )
            count_conflicts(rows.reshape(experts, -1), moved, apart)
            if block[0].name in curved:
                bent.add_rows(stacked([expert.v_hat(block[0].canonical, *piece[1:]).double().sqrt() for expert in plan.experts]))
            if masked and block[0].name in curved:
                masks = [mask_of(plan, facts, one, piece, own) for one, own in zip(plan.experts, deltas, strict=True)]
                count_common(np.stack([_flat(mask, own) for mask, own in zip(masks, deltas, strict=True)]), kept)
        edits.add(mine)
        roots.add(bent)
        with lock:
            for total, part in ((both, moved), (opposite, apart), (common, kept)):
                np.add(total, part, out=total)

    plan.stream.map(
        work, plan.blocks(jobs), what="pairs of experts", size=block_elements,
        ahead=lambda block: plan.prefetch(block, curvature=bool(curved)),
    )  # fmt: skip
    elements = sum(job.elements for job in jobs)
    for i, name in enumerate(names):
        yield _row(name, "norm", math.sqrt(edits.get(i, i)), elements)
    for a, b, one, other in named_pairs(names):
        yield _row(one, "cosine", edits.cosine(a, b), elements, other=other)
        yield _row(one, "sign_conflict", opposite[a, b] / both[a, b] if both[a, b] else math.nan, int(both[a, b]), other=other)
        if curved:
            yield _row(one, "cosine_sqrt_v", roots.cosine(a, b), elements, other=other)
        if masked:
            either = int(common[a, a] + common[b, b] - common[a, b])
            yield _row(one, "mask_jaccard", common[a, b] / either if either else math.nan, elements, other=other)


def _flat(mask: "torch.Tensor | None", like: "torch.Tensor") -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (like == like if mask is None else mask).reshape(-1).cpu().numpy()
    return found


@dataclass(frozen=True)
class _Products:
    """Of one matrix H, float64 (M, X, X), and ‖δ_i‖², float64 (M,). X: merged, where asked merged without each, own."""

    inner: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def own(self) -> int:
        """Where the experts' own edits begin among X."""
        return int(self.inner.shape[1]) - len(self.sizes)

    def scale(self, edit: int = 0) -> float | None:
        """λ of a merged edit, by the experts that are in it; None where it is nothing, or they moved nothing."""
        moved = [i for i in np.flatnonzero(self.sizes).tolist() if i != edit - 1]
        numerator = math.fsum(self.inner[i, edit, self.own + i] / self.sizes[i] for i in moved)
        denominator = math.fsum(self.inner[i, edit, edit] / self.sizes[i] for i in moved)
        return numerator / denominator if denominator > 0 else None

    def strength(self, i: int, j: int) -> float:
        """‖δ_j δ_iᵀ‖²: how strongly j's edit acts on i's inputs."""
        return float(self.inner[i, self.own + j, self.own + j])

    def of(self, i: int, edit: int, scale: float) -> dict[str, float]:
        """What a merged edit at this scale does to expert i's inputs, beside what i's own edit does: reach, disturbance and fit."""
        inner, own = self.inner[i], self.own + i
        reach = scale * float(inner[edit, own] / inner[own, own])
        beside = max(0.0, scale**2 * float(inner[edit, edit] / inner[own, own]) - reach**2)
        return {"reach": reach, "disturbance": math.sqrt(beside), "fit": max(WORST, 1.0 - (1.0 - reach) ** 2 - beside)}


def _row_spaces(plan: MergePlan, rule: Rule, recipe: MergeRecipe, left_out: list[str]) -> Iterator[Row]:
    """The measures of every matrix, and their means. Matrices that nobody moved are in none of them."""
    names, experts = [expert.name for expert in plan.experts], len(plan.experts)
    rules = [rule]
    if experts > 2 and {"weight", "scaling_factor"} & USED[recipe.merge_method]:
        rules += [rule.reweighted(without(plan.recipe, i)) for i in range(experts)]
    single = [(matrices, index) for matrices in all_matrices(plan) for index in range(matrices.count)]
    single.sort(key=lambda one: -one[0].rows * one[0].columns)
    products = plan.stream.map(
        lambda one: _products(plan, rules, *one), single, what="row spaces", size=lambda one: one[0].rows * one[0].columns
    )
    scaled = [one for one in products if one.scale() is not None]
    if not scaled:
        left_out.append("row spaces: no expert moved a matrix that multiplies activations")
        return
    elements = sum(matrices.rows * matrices.columns for matrices, _ in single)
    asked = recipe.setting("lambda") if "lambda" in USED[recipe.merge_method] else 1.0
    auto = [
        fmean(known) if (known := [scale for one in scaled if (scale := one.scale(edit)) is not None]) else 0.0
        for edit in range(len(rules))
    ]

    def means(i: int, edit: int, members: Sequence[_Products]) -> dict[str, float]:
        shared = auto[edit] if recipe.auto else float(asked)
        found = [one.of(i, edit, one.scale(edit) or 0.0 if asked == "auto_per_tensor" else shared) for one in members]
        return {measure: fmean(one[measure] for one in found) for measure in found[0]}

    yield _row(None, "lambda", auto[0], elements, variant="auto")
    yield _row(None, "lambda", auto[0] if recipe.auto else float(asked), elements, variant="recipe")
    for i, name in enumerate(names):
        mine = [one for one in scaled if one.strength(i, i) > 0]
        if not mine:
            left_out.append(f"the fit of {name}: it moved no matrix that multiplies activations")
            continue
        for edit, variant in enumerate(["", *(f"without {other}" for other in names)][: len(rules)]):
            for measure, value in means(i, edit, mine).items():
                yield _row(name, measure, value, elements, variant=variant)
        for j, other in enumerate(names):
            if i == j:
                continue
            ratios = [math.sqrt(one.strength(i, j) / one.strength(i, i)) for one in mine]
            yield _row(name, "interference", fmean(ratios), elements, other=other)
    for a, b, name, other in named_pairs(names):
        cosines = [
            (one.strength(a, b) + one.strength(b, a)) / 2 / math.sqrt(lengths)
            for one in scaled
            if (lengths := one.strength(a, a) * one.strength(b, b)) > 0
        ]
        if cosines:
            yield _row(name, "row_space", fmean(cosines), elements, other=other)


def _products(plan: MergePlan, rules: Sequence[Rule], matrices: Matrices, index: int) -> _Products:
    """H of one matrix: exactly where it has few outputs, else by random probes and evenly spaced rows, as λ is found."""
    import torch

    sketches = [directions_of(plan, expert, matrices, index) for expert in plan.experts]
    sizes = np.array([size for _, size in sketches])
    width = sketches[0][0].shape[1]
    directions = torch.cat([one for one, _ in sketches], 1)

    def read(part: Block) -> "torch.Tensor":
        """All edits of these rows, float64 (X, r, C)."""
        return torch.stack([rule.edit(part) for rule in rules] + [delta(plan, expert, *part) for expert in plan.experts])

    block, count = matrices.block(index), len(rules) + len(plan.experts)
    inner = torch.zeros(len(plan.experts), count, count, dtype=torch.float64, device=directions.device)

    def add(done: "torch.Tensor") -> None:
        """done: what the edits do to every expert's directions, (X, r, M·P)."""
        for i in range(len(plan.experts)):
            rows = done[:, :, i * width : (i + 1) * width].reshape(count, -1)
            inner[i] += rows @ rows.T

    if matrices.input_first:
        total = torch.zeros(count, matrices.outputs, directions.shape[1], dtype=torch.float64, device=directions.device)
        for part in parts(block, PART):
            rows = slice(part[1] - block[1], part[2] - block[1])
            total += read(part).transpose(1, 2) @ directions[rows]
        add(total)
    else:
        for part in parts(block, PART) if matrices.outputs <= EXACT else row_groups(block):
            add(read(part) @ directions)
    return _Products(inner.cpu().numpy(), sizes)


def _row(expert: str | None, measure: str, value: float, elements: int, **more: Any) -> Row:
    return row(PREFLIGHT, expert or "", WHOLE, measure, value, elements, **more)
