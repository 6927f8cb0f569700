"""Binds a recipe to its merge rule: a ``Rule`` prepares what it must know of each tensor, then merges blocks.

The arithmetic itself is in ``ota_core.methods``; here the recipe's options become its arguments.
"""

import math
from collections import defaultdict
from threading import Lock
from typing import Any, Protocol

import torch

from ota_core.errors import RecipeError
from ota_core.kernels import row_sums
from ota_core.methods.averages import fisher, linear, slerp, slerp_factors
from ota_core.methods.dare import drop, uniform
from ota_core.methods.ota import any_kept, curvature_weights, masked_ties, mean, ota
from ota_core.methods.task_vectors import add_up, breadcrumbs_ranks, elect_and_add, ties_ranks, trim
from ota_core.plan import MergePlan
from ota_core.prepare import Curvature, blocks, delta, mask_of, prepare_curvature
from ota_core.saliency import kth_largest, magnitude_scores
from ota_core.views import ExpertView, TensorJob

Block = tuple[TensorJob, int, int]
"""A tensor and a half-open range of its rows."""


class Rule(Protocol):
    """One merge rule, bound to a plan."""

    def prepare(self) -> None:
        """Read what must be known before the first block."""
        ...

    def merge(self, block: Block) -> torch.Tensor:
        """The merged rows, float64 (r, C). Called from several threads."""
        ...

    def results(self) -> dict[str, Any]:
        """What the record says of this merge; complete after the last block."""
        ...


def rule_of(plan: MergePlan) -> Rule:
    """The rule of the plan's recipe."""
    method = plan.recipe.merge_method
    if method == "ota":
        return OtaRule(plan)
    if method == "fisher":
        return FisherRule(plan)
    if method == "linear":
        return LinearRule(plan)
    if method == "slerp":
        return SlerpRule(plan)
    return TaskVectorRule(plan)


def base_rows(plan: MergePlan, block: Block) -> torch.Tensor | None:
    """θ₀ of a block, float64 (r, C). A row that the base's vocabulary lacks is the mean of the experts that have it."""
    if plan.base is None:
        return None
    base = plan.base.theta(block[0].name, *block[1:])
    present = plan.base.present(block[0].name, *block[1:])
    if present is None:
        return base
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for expert in plan.experts:
        has = expert.present(block[0].name, *block[1:])
        theta = expert.theta(block[0].name, *block[1:])
        total += theta if has is None else torch.where(has, theta, 0.0)
        count += 1.0 if has is None else has.double()
    return torch.where(present, base, total / count.clamp(min=1.0))


def expert_rows(plan: MergePlan, block: Block, base: torch.Tensor | None) -> list[torch.Tensor]:
    """θ_m of every expert; a row that an expert's vocabulary lacks is the base's."""
    thetas = []
    for expert in plan.experts:
        theta = expert.theta(block[0].name, *block[1:])
        present = expert.present(block[0].name, *block[1:])
        if present is not None:
            theta = torch.where(present, theta, theta if base is None else base)
        thetas.append(theta)
    return thetas


class OtaRule:
    """OTA with FFG: all options of methods.md sections 3 and 4."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._facts = plan, Curvature()
        self._scales: dict[tuple[int, str], float] = {}
        self._kept: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._lock = Lock()
        setting = plan.recipe.setting
        self._lambda, self._denominator, self._fallback = setting("lambda"), setting("denominator"), setting("fallback")
        self._masked_merge, self._power, self._epsilon = setting("masked_merge"), setting("power"), setting("epsilon")

    def prepare(self) -> None:
        """Compression, means, thresholds; with ``rescale`` the norms of every masked task vector."""
        plan = self._plan
        self._facts = prepare_curvature(plan)
        if plan.recipe.setting("rescale"):
            for expert in plan.experts:
                if plan.recipe.ffg(expert.index):
                    jobs = [job for job in plan.merged_jobs() if job.name not in self._facts.averaged]
                    found = plan.stream.map(lambda job, e=expert: self._scale(e, job), jobs, what=f"norms {expert.name}", size=lambda j: j.elements)
                    self._scales |= {(expert.index, job.name): scale for job, scale in zip(jobs, found, strict=True)}

    def _scale(self, expert: ExpertView, job: TensorJob) -> float:
        """‖Δ‖ / ‖mask·Δ‖ of one tensor; 1 where nothing is left."""
        whole, kept = [], []
        for block in blocks(self._plan, [job]):
            difference = delta(self._plan, expert, *block)
            mask = mask_of(self._plan, self._facts, expert, block, difference)
            squares = difference * difference
            whole += row_sums(squares).tolist()
            kept += row_sums(squares if mask is None else torch.where(mask, squares, 0.0)).tolist()
        left = math.fsum(kept)
        return math.sqrt(math.fsum(whole) / left) if left > 0 else 1.0

    def merge(self, block: Block) -> torch.Tensor:
        plan, job = self._plan, block[0]
        base = base_rows(plan, block)
        thetas = expert_rows(plan, block, base)
        if job.name in self._facts.averaged:
            assert base is not None
            return ota(thetas, [torch.ones_like(t) for t in thetas], [None] * len(thetas), base, lam=self._lambda)
        weights, masks = [], []
        for expert, theta in zip(plan.experts, thetas, strict=True):
            v_hat = expert.v_hat(job.canonical, *block[1:]) if expert.has_curvature(job.canonical) else None
            mask = mask_of(plan, self._facts, expert, block, None if base is None else theta - base, v_hat)
            self._count(expert, job, mask)
            masks.append(mask)
            weights.append(self._weight(expert, theta, v_hat))
            present = expert.present(job.name, *block[1:])
            if present is not None:
                weights[-1] = torch.where(present, weights[-1], 0.0)
        scaled = thetas
        if self._scales:
            assert base is not None
            scales = [self._scales.get((expert.index, job.name), 1.0) for expert in plan.experts]
            scaled = [base + scale * (theta - base) for scale, theta in zip(scales, thetas, strict=True)]
        if self._masked_merge == "ties":
            assert base is not None
            factors = [plan.recipe.setting("scaling_factor", expert.index) for expert in plan.experts]
            merged = base + self._lambda * masked_ties([theta - base for theta in scaled], masks, factors)
        else:
            merged = ota(scaled, weights, masks, base, lam=self._lambda, denominator=self._denominator)
        if self._fallback == "mean" and base is not None:
            merged = torch.where(any_kept(masks, base), merged, mean(thetas))
        return merged

    def _weight(self, expert: ExpertView, theta: torch.Tensor, v_hat: torch.Tensor | None) -> torch.Tensor:
        """p_m of a block: from the curvature, or the bare scaling factor with ``masked_merge: linear``; 0 for an expert that takes no part."""
        if v_hat is None:
            return torch.zeros_like(theta)
        scale = self._plan.recipe.setting("scaling_factor", expert.index)
        if self._masked_merge != "precond":
            return torch.full_like(theta, scale)
        mean_weight = self._facts.means.get(expert.index)
        return curvature_weights(v_hat, power=self._power, scale=scale, mean=mean_weight, epsilon=self._epsilon)

    def _count(self, expert: ExpertView, job: TensorJob, mask: torch.Tensor | None) -> None:
        if mask is None or not self._plan.recipe.ffg(expert.index) or job.name != job.canonical:
            return
        kept = int(mask.sum())
        with self._lock:
            self._kept[expert.index][job.name] += kept

    def results(self) -> dict[str, Any]:
        """Densities and thresholds of every expert with FFG, and what compression lost."""
        densities = {}
        for expert in self._plan.experts:
            if self._plan.recipe.ffg(expert.index):
                stored = expert.masks.header["thresholds"] if expert.masks else self._facts.thresholds[expert.index]
                taus = {name: float(tau) for name, tau in stored.items()}
                densities[expert.name] = density_report(self._plan, expert, taus, self._kept[expert.index])
        compression = {name: report.model_dump(exclude={"sqrt_error_per_tensor"}) for name, report in self._facts.reports.items()}
        averaged = sorted(self._facts.averaged)
        found = {"densities": densities, "compression": compression, "averaged_without_curvature": averaged}
        return {key: value for key, value in found.items() if value}


def density_report(plan: MergePlan, expert: ExpertView, taus: dict[str, float], kept: dict[str, int]) -> dict[str, Any]:
    """τ and the realised density of an expert, over all and per tensor. An infinite τ (nothing kept) is spelled "inf" for JSON."""
    jobs = plan.curved(expert)
    total = sum(job.elements for job in jobs)
    count = sum(kept.get(job.name, 0) for job in jobs)
    values = {name: tau if math.isfinite(tau) else "inf" for name, tau in taus.items()}
    same = plan.recipe.setting("scope") == "global" or plan.recipe.setting("precond_threshold", expert.index) is not None
    return {
        "threshold": next(iter(values.values()), None) if same else values,
        "density": count / max(total, 1),
        "kept": count,
        "total": total,
        "per_tensor": {job.name: kept.get(job.name, 0) / max(job.elements, 1) for job in jobs},
    }


class FisherRule:
    """Fisher-weighted averaging with v̂ as the diagonal of the Fisher matrix."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._facts = plan, Curvature()

    def prepare(self) -> None:
        self._facts = prepare_curvature(self._plan)

    def merge(self, block: Block) -> torch.Tensor:
        job = block[0]
        base = base_rows(self._plan, block)
        thetas = expert_rows(self._plan, block, base)
        if job.name in self._facts.averaged:
            return mean(thetas)
        weights = []
        for expert, theta in zip(self._plan.experts, thetas, strict=True):
            if not expert.has_curvature(job.canonical):
                weights.append(torch.zeros_like(theta))
                continue
            weight = expert.v_hat(job.canonical, *block[1:]).double() * self._plan.recipe.setting("weight", expert.index)
            present = expert.present(job.name, *block[1:])
            weights.append(weight if present is None else torch.where(present, weight, 0.0))
        return fisher(thetas, weights, mean(thetas) if base is None else base)

    def results(self) -> dict[str, Any]:
        reports = {name: report.model_dump(exclude={"sqrt_error_per_tensor"}) for name, report in self._facts.reports.items()}
        return {"compression": reports} if reports else {}


class LinearRule:
    """Weighted average of the experts; a base takes no part."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._normalize = plan.recipe.setting("normalize")
        if self._normalize and sum(self._weights) == 0:
            raise RecipeError(f"linear: the weights {self._weights} add up to 0; they cannot be normalised. Set normalize: false or other weights")

    def prepare(self) -> None:
        """Nothing beyond the block is needed."""

    def merge(self, block: Block) -> torch.Tensor:
        return linear(expert_rows(self._plan, block, base_rows(self._plan, block)), self._weights, normalize=self._normalize)

    def results(self) -> dict[str, Any]:
        return {}


class TaskVectorRule:
    """task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties: what is left of each task vector, added up."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._method = plan.recipe.merge_method
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._limits: dict[tuple[int, str], tuple[float, float]] = {}

    def prepare(self) -> None:
        """The limits of |Δ| for the methods that trim, per expert and tensor."""
        if self._method not in {"ties", "breadcrumbs", "breadcrumbs_ties"}:
            return
        for expert in self._plan.experts:
            jobs = self._plan.merged_jobs()
            found = self._plan.stream.map(lambda job, e=expert: self._limit(e, job), jobs, what=f"trim {expert.name}", size=lambda j: j.elements)
            self._limits |= {(expert.index, job.name): limits for job, limits in zip(jobs, found, strict=True)}

    def _limit(self, expert: ExpertView, job: TensorJob) -> tuple[float, float]:
        density = self._plan.recipe.setting("density", expert.index)
        if self._method == "ties":
            dropped, last = ties_ranks(density, job.elements)
        else:
            dropped, last = breadcrumbs_ranks(density, self._plan.recipe.setting("gamma", expert.index), job.elements)
        if last == dropped or job.elements == 0:
            return math.inf, -math.inf

        def visit(see: Any) -> None:
            for block in blocks(self._plan, [job]):
                see(magnitude_scores(delta(self._plan, expert, *block)))

        lowest = kth_largest(visit, last) if last < job.elements else 0.0
        return lowest, kth_largest(visit, dropped + 1) if dropped else math.inf

    def merge(self, block: Block) -> torch.Tensor:
        base = base_rows(self._plan, block)
        assert base is not None
        thetas = expert_rows(self._plan, block, base)
        deltas = [self._left(expert, block, theta - base) for expert, theta in zip(self._plan.experts, thetas, strict=True)]
        combine = elect_and_add if self._method.endswith("ties") else add_up
        merged = combine(deltas, self._weights, normalize=self._plan.recipe.setting("normalize"))
        return base + self._plan.recipe.setting("lambda") * merged

    def _left(self, expert: ExpertView, block: Block, difference: torch.Tensor) -> torch.Tensor:
        job, start, _ = block
        if (expert.index, job.name) in self._limits:
            return trim(difference, *self._limits[expert.index, job.name])
        density = self._plan.recipe.setting("density", expert.index)
        if not self._method.startswith("dare") or density >= 1:
            return difference
        rows, cols = difference.shape
        seed = self._plan.recipe.setting("seed")
        random = uniform(seed, expert.index, job.canonical, start * cols, rows * cols, self._plan.device).view(rows, cols)
        return drop(difference, random, density=density, rescale=self._plan.recipe.setting("rescale"))

    def results(self) -> dict[str, Any]:
        return {"seed": self._plan.recipe.setting("seed")} if self._method.startswith("dare") else {}


class SlerpRule:
    """Spherical interpolation from the base (t = 0) to the expert (t = 1), or from the first model to the second."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._t = plan.recipe.setting("t")
        self._ends = slerp_ends(plan)
        self._factors: dict[str, tuple[float, float]] = {}

    def prepare(self) -> None:
        """The angle between the two models in every tensor."""
        jobs = self._plan.merged_jobs()
        found = self._plan.stream.map(self._angle, jobs, what="angles", size=lambda job: job.elements)
        self._factors = {job.name: factors for job, factors in zip(jobs, found, strict=True)}

    def _angle(self, job: TensorJob) -> tuple[float, float]:
        sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        for block in blocks(self._plan, [job]):
            a, b = (view.theta(job.name, *block[1:]) for view in self._ends)
            for part, product in zip(sums, (a * a, b * b, a * b), strict=True):
                part += row_sums(product).tolist()
        return slerp_factors(math.sqrt(math.fsum(sums[0])), math.sqrt(math.fsum(sums[1])), math.fsum(sums[2]), self._t)

    def merge(self, block: Block) -> torch.Tensor:
        a, b = (view.theta(block[0].name, *block[1:]) for view in self._ends)
        return slerp(a, b, self._factors[block[0].name])

    def results(self) -> dict[str, Any]:
        return {}


def slerp_ends(plan: MergePlan) -> tuple[Any, Any]:
    """The models at t = 0 and t = 1. Raises RecipeError when it is not clear which two are meant."""
    if plan.base is None:
        return plan.experts[0], plan.experts[1]
    others = [e for e in plan.experts if e.checkpoint.path.resolve() != plan.base.checkpoint.path.resolve()]
    if len(others) != 1:
        raise RecipeError(
            f"slerp: base_model and {len(others)} other models are named; expected the base (t = 0) and one other model (t = 1), or two models without a base"
        )
    return plan.base, others[0]
