"""What must be known of whole tensors or whole experts before the first block is merged: compression, means, thresholds, norms."""

import math
from dataclasses import dataclass, field
from functools import partial

import torch

from ota_core.blocks import row_blocks
from ota_core.compression import CompressedMoments, CompressionReport, compress
from ota_core.errors import MomentsError, raise_all
from ota_core.fused import BY_CURVATURE, BY_MAGNITUDE, count_scores
from ota_core.kernels import count_high, count_low, power, row_sums
from ota_core.plan import MergePlan
from ota_core.saliency import Histogram, curvature_scores, keep, kept_count, kth_largest, magnitude_scores, threshold_of_product
from ota_core.views import ExpertView, TensorJob

Block = tuple[TensorJob, int, int]
"""A tensor of the output and a half-open range of its rows."""


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


def prepare_curvature(plan: MergePlan) -> Curvature:
    """Compress where the recipe asks, find tensors without curvature, means and thresholds. Raises MomentsError."""
    facts = Curvature()
    facts.averaged = _without_curvature(plan)
    for expert in plan.experts:
        assert expert.moments is not None
        method = plan.recipe.setting("compression")
        held = expert.moments.method if isinstance(expert.moments, CompressedMoments) else "none"
        if method != held:
            expert.moments, facts.reports[expert.name] = compress(
                expert.moments, method=method, rank=plan.recipe.setting("rank"), stream=plan.stream, scratch=plan.scratch,
                what=f"compress {expert.name}",
            )  # fmt: skip
    if plan.recipe.merge_method != "ota":
        return facts
    for expert in plan.experts:
        if plan.recipe.setting("normalise") == "global":
            facts.means[expert.index] = _mean_weight(plan, expert)
        if plan.recipe.ffg(expert.index) and expert.masks is None:
            facts.thresholds[expert.index] = thresholds(plan, expert)
    return facts


def blocks(plan: MergePlan, jobs: list[TensorJob], multiple: int = 1) -> list[Block]:
    """Every block of these tensors. ``multiple``: rows of a block, but a tensor's last, are a multiple of this."""
    result = []
    for job in jobs:
        cols = max(1, job.elements // max(job.rows, 1))
        step = max(1, plan.stream.block_elements // cols)
        step = -(-step // multiple) * multiple
        result += [(job, a, b) for a, b in row_blocks(job.shape, step * cols)]
    return result


def block_size(block: Block) -> int:
    """Elements of a block, for the progress."""
    job, start, stop = block
    return (stop - start) * max(1, job.elements // max(job.rows, 1))


def delta(plan: MergePlan, expert: ExpertView, job: TensorJob, start: int, stop: int) -> torch.Tensor:
    """Task vector of a block, float64 (r, C); 0 in rows that the expert or the base lacks."""
    assert plan.base is not None
    difference = expert.theta(job.name, start, stop) - plan.base.theta(job.name, start, stop)
    for view in (expert, plan.base):
        present = view.present(job.name, start, stop)
        if present is not None:
            difference = torch.where(present, difference, 0.0)
    return difference


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
        expert.inactive = {job.canonical for job, did in zip(lacking, moved, strict=True) if not did}
        if bad and plan.recipe.setting("missing_curvature") == "mean":
            averaged.update(bad)
        elif bad:
            assert expert.moments is not None
            problems.append(
                f"expert '{expert.name}': {len(bad)} tensors changed in training but have no second moments in {expert.moments.path}: {', '.join(bad)}. "
                "Give the complete optimizer state, or set missing_curvature: mean to average these tensors"
            )
    raise_all(problems, MomentsError)
    return averaged


def _moved(plan: MergePlan, expert: ExpertView, job: TensorJob) -> bool:
    return any(bool(delta(plan, expert, job, a, b).any()) for a, b in row_blocks(job.shape, plan.stream.block_elements))


def _mean_weight(plan: MergePlan, expert: ExpertView) -> float:
    exponent = plan.recipe.setting("power")
    jobs = plan.curved(expert)

    def work(block: Block) -> list[float]:
        job, start, stop = block
        return row_sums(power(expert.v_hat(job.canonical, start, stop).double(), exponent)).tolist()

    sums = plan.stream.map(work, blocks(plan, jobs), what=f"normalise {expert.name}", size=block_size)
    total = sum(job.elements for job in jobs)
    mean = math.fsum(value for part in sums for value in part) / max(total, 1)
    if mean == 0:
        assert expert.moments is not None
        raise MomentsError(f"{expert.moments.path}: all second moments are 0; normalise: global cannot divide by their mean")
    return mean


def scores(
    plan: MergePlan,
    expert: ExpertView,
    job: TensorJob,
    start: int,
    stop: int,
    difference: torch.Tensor,
    v_hat: torch.Tensor | None = None,
) -> torch.Tensor:
    """FFG scores of a block, float32 (r, C). difference: its task vector, float64 (r, C); v_hat: the merge's v̂ where it was read already."""
    if plan.recipe.setting("metric") == "magnitude":
        return magnitude_scores(difference)
    if plan.recipe.setting("mask_curvature") == "full":
        v_hat = expert.v_hat(job.canonical, start, stop, full=True)
    elif v_hat is None:
        v_hat = expert.v_hat(job.canonical, start, stop)
    return curvature_scores(v_hat, difference)


def thresholds(plan: MergePlan, expert: ExpertView) -> dict[str, float]:
    """τ of every tensor that FFG masks in this expert, exactly (methods.md section 3)."""
    recipe = plan.recipe
    jobs = plan.curved(expert)
    product = recipe.setting("precond_threshold", expert.index)
    if product is not None:
        return {job.name: threshold_of_product(product) for job in jobs}
    density = recipe.setting("density", expert.index)

    what = f"threshold {expert.name}"
    if recipe.setting("scope") == "global":

        def count_all(histogram: Histogram, high: int | None) -> None:
            plan.stream.map(
                lambda b: _count_block(plan, expert, b, histogram, high), blocks(plan, jobs), what=what, size=block_size
            )

        tau = kth_largest(count_all, kept_count(density, sum(job.elements for job in jobs)))
        return {job.name: tau for job in jobs}

    def of_tensor(job: TensorJob) -> float:
        def count(histogram: Histogram, high: int | None) -> None:
            for block in blocks(plan, [job]):
                _count_block(plan, expert, block, histogram, high)

        return kth_largest(count, kept_count(density, job.elements))

    taus = plan.stream.map(of_tensor, jobs, what=what, size=lambda job: job.elements)
    return {job.name: tau for job, tau in zip(jobs, taus, strict=True)}


def _count_block(plan: MergePlan, expert: ExpertView, block: Block, histogram: Histogram, high: int | None) -> None:
    """Add a block's scores to a histogram: compiled in one pass where that can be, else through tensors; the same counts."""
    assert plan.base is not None
    if plan.can_fuse([expert], block[0]):
        start, theta, counts = plan.base.single(*block), expert.single(*block), histogram.local()
        if plan.recipe.setting("metric") == "magnitude":  # v is not looked at, so it is not read: anything of its size will do
            count_scores(start, theta, theta, 1.0, BY_MAGNITUDE, high, counts)
        else:
            v, factor = expert.v_raw(*block, full=plan.recipe.setting("mask_curvature") == "full")
            count_scores(start, theta, v.reshape(-1), factor, BY_CURVATURE, high, counts)
        return
    _count_scores(scores(plan, expert, *block, delta(plan, expert, *block)), histogram, high)


def count_magnitudes(plan: MergePlan, expert: ExpertView, block: Block, histogram: Histogram, high: int | None) -> None:
    """The same for |Δ|, whatever the recipe's metric."""
    if plan.can_fuse([expert], block[0]):
        assert plan.base is not None
        theta = expert.single(*block)
        # The metric takes no v; the weights stand in for it.
        count_scores(plan.base.single(*block), theta, theta, 1.0, BY_MAGNITUDE, high, histogram.local())
        return
    _count_scores(magnitude_scores(delta(plan, expert, *block)), histogram, high)


def _count_scores(values: torch.Tensor, histogram: Histogram, high: int | None) -> None:
    if high is None:
        count_high(values, histogram.local())
    else:
        count_low(values, high, histogram.local())


def mask_of(
    plan: MergePlan,
    facts: Curvature,
    expert: ExpertView,
    block: Block,
    difference: torch.Tensor | None,
    v_hat: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The expert's mask of a block, bool (r, C); None where it keeps everything. ``difference``: its task vector, where there is a base."""
    job, start, stop = block
    present = expert.present(job.name, start, stop)
    cols = max(1, job.elements // max(job.rows, 1))
    if job.canonical in expert.inactive:
        return torch.zeros(stop - start, cols, dtype=torch.bool, device=plan.device)
    if not plan.recipe.ffg(expert.index):
        return None if present is None else present.expand(stop - start, cols)
    if expert.masks is not None:
        kept = expert.masks.read(job.canonical, start, stop).to(plan.device)
    else:
        assert difference is not None
        kept = keep(scores(plan, expert, job, start, stop, difference, v_hat), facts.thresholds[expert.index][job.canonical])
    return kept if present is None else kept & present
