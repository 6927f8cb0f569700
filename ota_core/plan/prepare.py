"""What must be known of whole tensors or whole experts before the first block is merged: compression, means, thresholds, norms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ota_core.errors import MomentsError, raise_all
from ota_core.fused.sums import power_sums
from ota_core.methods.numbers import kept_count, threshold_of_product
from ota_core.moments.compression import CompressionReport, compress, compression_of
from ota_core.moments.relaid import RelaidMoments, relaid
from ota_core.plan.plan import MergePlan
from ota_core.plan.scoring import delta, ffg_scoring
from ota_core.plan.tally import Group, kth_largest, taus_of, thresholds_of
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements, parts, tensor_on
from ota_core.recipe.methods import FFG

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Curvature:
    """The facts of one OTA or Fisher merge that go beyond a block."""

    thresholds: dict[int, dict[str, float]] = field(default_factory=dict)
    """Expert → tensor → τ on the score, for experts with FFG whose masks are made on the fly."""
    means: dict[int, float] = field(default_factory=dict)
    """Expert → mean of v̂^power over the whole expert, with ``normalise: global``."""
    averaged: set[str] = field(default_factory=set)
    """Tensors that are averaged because an expert moved them without curvature (``missing_curvature: mean``)."""
    reports: dict[str, CompressionReport] = field(default_factory=dict)
    """Expert's name → what its compression lost."""


class WholeFacts(BaseModel):
    """What every part of a merge must know of the whole, experts by their position in the recipe. JSON-able: machines pass it on."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    thresholds: dict[int, float] = {}
    """τ of experts whose FFG ranks the whole expert by a density; infinite where nothing is kept."""
    means: dict[int, float] = {}
    """Mean of v̂^power, with ``normalise: global``."""
    scale: float | None = None
    """λ, where the recipe leaves it to the row spaces."""
    scales: dict[str, float] = {}
    """λ of each tensor that holds matrices."""
    groups: list[dict[int, float]] = []
    """Where values differ between tensors: τ of each group that is ranked together, in their order (``plan.groups``)."""


def prepare_curvature(plan: MergePlan, whole: WholeFacts | None = None) -> Curvature:
    """Compress where the recipe asks, find tensors without curvature, means and thresholds. Raises MomentsError.

    ``whole``: what was found out before of whole experts, for a part of a merge.
    """
    facts = Curvature()
    if plan.recipe.needs_moments:
        facts.averaged = _without_curvature(plan)
        facts.reports = compress_experts(plan)
    if plan.recipe.merge_method not in FFG:
        return facts
    if plan.recipe.setting("normalise") == "global":
        facts.means = whole.means if whole else {e.index: mean_of(plan, e, weight_sums(plan, e)) for e in plan.experts}
    facts.thresholds = thresholds(plan, masked_here(plan), whole)
    return facts


def compress_experts(plan: MergePlan) -> dict[str, CompressionReport]:
    """Compress the second moments that the recipe wants compressed and that are not yet: expert's name → what that lost."""
    reports: dict[str, CompressionReport] = {}
    for expert in plan.experts:
        assert expert.moments is not None
        method = plan.recipe.setting("compression", expert.index)
        if method != (compression_of(expert.moments) or "none"):
            # In the layout of the expert's own checkpoint, as the stage does that compresses an expert by itself.
            own, layout = (m.inner, m.layout) if isinstance(m := expert.moments, RelaidMoments) else (m, None)
            made, reports[expert.name] = compress(
                own, method=method, rank=plan.recipe.setting("rank", expert.index), stream=plan.stream, scratch=plan.scratch,
                what=f"compress {expert.name}",
            )  # fmt: skip
            expert.moments = relaid(made, layout)
    return reports


def masked_here(plan: MergePlan) -> list[ExpertView]:
    """The experts whose FFG masks are made on the fly."""
    return [expert for expert in plan.experts if plan.recipe.ffg(expert.index) and expert.masks is None]


def _without_curvature(plan: MergePlan) -> set[str]:
    """Mark tensors that an expert holds no curvature of and never moved; return those to be averaged, or raise for the others."""
    problems: list[str] = []
    averaged: set[str] = set()
    for expert in plan.experts:
        lacking = [job for job in plan.merged_jobs() if not expert.has_curvature(job.canonical)]
        if plan.base is None:
            moved = [True] * len(lacking)
        else:
            moved = plan.stream.map(partial(_moved, plan, expert), lacking, what=f"check {expert.name}")
        bad = [job.name for job, did in zip(lacking, moved, strict=True) if did]
        expert.inactive = expert.inactive | {job.canonical for job, did in zip(lacking, moved, strict=True) if not did}
        if bad and plan.recipe.setting("missing_curvature") == "mean":
            averaged.update(bad)
        elif bad:
            assert expert.moments is not None
            problems.append(
                f"expert '{expert.name}': {len(bad)} tensors changed in training but have no second moments in {expert.moments.path}: {', '.join(bad)}. "
                "Give the complete optimizer state, set missing_curvature: mean to average these tensors, or estimate second moments (ota estimate)"
            )
    raise_all(problems, MomentsError)
    return averaged


def _moved(plan: MergePlan, expert: ExpertView, job: TensorJob) -> bool:
    if not plan.can_fuse([expert], job):
        return any(bool(delta(plan, expert, *part).any()) for part in parts((job, 0, job.rows), plan.tensor_elements))
    assert plan.base is not None
    for part in plan.blocks([job]):
        base, theta = (view.stored(job.name, *part[1:]) for view in (plan.base, expert))
        differs = base.to_float32() != theta.to_float32()
        for present in (base.present, theta.present):
            if present is not None:
                differs &= present[:, None]
        if differs.any():
            return True
    return False


def weight_sums(plan: MergePlan, expert: ExpertView) -> dict[str, float]:
    """Σ v̂^power of every tensor that is worked on here and carries curvature in this expert."""
    jobs = [job for job in plan.curved(expert) if plan.is_here(job)]
    cut, work = plan.blocks(jobs), partial(_power_sums, plan, expert)
    rows: dict[str, list[float]] = {job.name: [] for job in jobs}
    ahead = partial(_prefetch_curvature, expert)
    sums = plan.stream.map(work, cut, what=f"normalise {expert.name}", size=block_elements, ahead=ahead)
    for block, found in zip(cut, sums, strict=True):
        rows[block[0].name] += found
    return {name: math.fsum(sums) for name, sums in rows.items()}


def _prefetch_curvature(expert: ExpertView, block: Block) -> None:
    expert.prefetch_curvature(*block)


def _power_sums(plan: MergePlan, expert: ExpertView, block: Block) -> list[float]:
    """Σ v̂^power of each row of a block."""
    exponent = plan.recipe.setting("power")
    if plan.device == "cpu":
        found = power_sums(expert.v_source(*block), block[2] - block[1], block_elements(block) // (block[2] - block[1]), exponent)
        if found is None:
            expert.refuse(*block)
        return found
    from ota_core.compute.kernels import power, row_sums

    sums: list[float] = []
    for job, start, stop in parts(block, plan.tensor_elements):
        sums += row_sums(power(expert.v_hat(job.canonical, start, stop).double(), exponent)).tolist()
    return sums


def mean_of(plan: MergePlan, expert: ExpertView, sums: Mapping[str, float]) -> float:
    """Mean of v̂^power over the whole expert, from the sums of all its tensors. Raises MomentsError when it is 0."""
    mean = math.fsum(sums.values()) / max(sum(job.elements for job in plan.curved(expert)), 1)
    if mean == 0:
        assert expert.moments is not None
        raise MomentsError(f"{expert.moments.path}: all second moments are 0; normalise: global cannot divide by their mean")
    return mean


def ffg_group(plan: MergePlan, experts: Sequence[ExpertView]) -> Group:
    """All tensors together that are here: what scope ``global`` ranks, for the experts with a density."""
    curved = {expert.index: plan.curved(expert) for expert in experts}
    names = {job.name for jobs in curved.values() for job in jobs}
    ranks = {}
    for expert in experts:
        k = kept_count(plan.recipe.setting("density", expert.index), sum(job.elements for job in curved[expert.index]))
        ranks[expert.index] = (k,) if k else ()
    return Group(jobs=[job for job in plan.merged_jobs() if job.name in names], experts=tuple(curved), ranks=ranks)


def thresholds(plan: MergePlan, experts: Sequence[ExpertView], whole: WholeFacts | None = None) -> dict[int, dict[str, float]]:
    """τ of every tensor that FFG masks in each of these experts, exactly (docs/methods.md section 3).

    With scope ``per_tensor``, of the tensors that are worked on here. ``whole`` gives τ of experts that are ranked as a whole.
    """
    recipe = plan.recipe
    found: dict[int, dict[str, float]] = {}
    ranked = []
    for expert in experts:
        product = recipe.setting("precond_threshold", expert.index)
        if product is None:
            ranked.append(expert)
        else:
            found[expert.index] = dict.fromkeys((job.name for job in plan.curved(expert)), threshold_of_product(product))
    if not ranked:
        return found
    if recipe.setting("scope") == "global":
        if whole:
            taus = whole.thresholds
        else:
            taus = taus_of(kth_largest(ffg_scoring(plan), [ffg_group(plan, ranked)], what="thresholds")[0])
        for expert in ranked:
            tau = taus[expert.index]
            found[expert.index] = dict.fromkeys((job.name for job in plan.curved(expert)), tau)
        return found
    return found | _thresholds_per_tensor(plan, ranked)


def _thresholds_per_tensor(plan: MergePlan, experts: Sequence[ExpertView]) -> dict[int, dict[str, float]]:
    density = {expert.index: plan.recipe.setting("density", expert.index) for expert in experts}
    curved = {expert.index: {job.name for job in plan.curved(expert)} for expert in experts}
    members = [
        ([job], {e.index: kept_count(density[e.index], job.elements) for e in experts if job.name in curved[e.index]})
        for job in plan.canonical_jobs()
    ]
    found: dict[int, dict[str, float]] = {expert.index: {} for expert in experts}
    for (expert, name), tau in thresholds_of(ffg_scoring(plan), members, what="thresholds").items():
        found[expert][name] = tau
    return found


def mask_of(
    plan: MergePlan,
    facts: Curvature,
    expert: ExpertView,
    block: Block,
    difference: "torch.Tensor | None",
    v_hat: "torch.Tensor | None" = None,
) -> "torch.Tensor | None":
    """The expert's mask of a block, bool (r, C); None where it keeps everything. ``difference``: its task vector, where there is a base."""
    import torch

    from ota_core.methods.saliency import keep

    job, start, stop = block
    present = expert.present(job.name, start, stop)
    cols = max(1, job.elements // max(job.rows, 1))
    if job.canonical in expert.inactive:
        return torch.zeros(stop - start, cols, dtype=torch.bool, device=plan.device)
    if not plan.recipe.ffg(expert.index):
        return None if present is None else present.expand(stop - start, cols)
    if expert.masks is not None:
        kept = tensor_on(plan.device, expert.masks.read(job.canonical, start, stop))
    else:
        assert difference is not None and plan.base is not None
        kept = keep(ffg_scoring(plan).of(expert, block, difference, v_hat), facts.thresholds[expert.index][job.canonical])
        in_base = plan.base.present(job.name, start, stop)
        kept = kept if in_base is None else kept & in_base  # there is no edit of what the base lacks
    return kept if present is None else kept & present


def block_mask(plan: MergePlan, facts: Curvature, expert: ExpertView, block: Block) -> tuple[NDArray[np.bool_], int]:
    """The FFG mask of a block of a tensor that carries curvature, bool (r, C) on the CPU, and how many elements it keeps."""
    kept, count = ffg_scoring(plan).keep(expert, block, facts.thresholds[expert.index][block[0].canonical])
    return kept.reshape(block[2] - block[1], -1), count
