"""OTA with Fast Fisher Grafting, and Fisher averaging, which is a case of it, bound to a plan."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from ota_core.files.rows import Rows
from ota_core.fused.ota import Vote, ota_block
from ota_core.fused.sources import BY_CURVATURE, BY_MAGNITUDE
from ota_core.fused.sums import squares_of
from ota_core.methods.numbers import kept_count
from ota_core.plan.found import Found
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import Curvature, WholeFacts, block_mask, mask_of, prepare_curvature
from ota_core.plan.scoring import Scoring, delta, ffg_scoring
from ota_core.plan.tally import thresholds_of
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements, parts
from ota_core.rules.base import Rule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MaskedMagnitude(Scoring):
    """|Δ| of what FFG keeps, 0 elsewhere."""

    facts: Curvature = field(default_factory=Curvature)

    def __init__(self, plan: MergePlan, facts: Curvature) -> None:
        super().__init__(plan, curvature=False, everywhere=True)
        object.__setattr__(self, "facts", facts)

    def compiled(self, experts: Iterable[int], job: TensorJob) -> bool:
        return False

    def of(
        self, expert: ExpertView, block: Block, difference: "torch.Tensor", v_hat: "torch.Tensor | None" = None
    ) -> "torch.Tensor":
        scores = super().of(expert, block, difference)
        mask = mask_of(self.plan, self.facts, expert, block, difference)
        return scores if mask is None else scores.where(mask, 0.0)


class OtaRule(Rule):
    """OTA with FFG: all options of docs/methods.md sections 3 and 4."""

    _curvature = True
    _factor = "scaling_factor"
    """The parameter that scales an expert's curvature weight."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._facts = Curvature()
        self._scales: dict[tuple[int, str], float] = {}
        self._trims: dict[tuple[int, str], float] = {}
        self._kept: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._lock = Lock()
        setting = plan.recipe.setting
        self._denominator: str = setting("denominator")
        self._fallback: str = setting("fallback")
        self._masked_merge, self._power, self._epsilon = setting("masked_merge"), setting("power"), setting("epsilon")

    def _prepare(self) -> None:
        """Compression, means, thresholds; with ``rescale`` the norms of every masked task vector."""
        plan = self._plan
        self._facts = prepare_curvature(plan, self._whole)
        if plan.recipe.setting("rescale"):
            for expert in plan.experts:
                if plan.recipe.ffg(expert.index):
                    self._find_scales(expert)
        if self._masked_merge == "ties" and plan.recipe.setting("ties_density") < 1:
            self._trims = self._trimmed()

    def _trimmed(self) -> dict[tuple[int, str], float]:
        """(Expert, tensor) → the smallest masked |Δ| that takes part in the election: TIES' trim, of each tensor (``ties_density``)."""
        plan, density = self._plan, self._plan.recipe.setting("ties_density")
        jobs = [job for job in plan.merged_jobs() if job.name not in self._facts.averaged]
        members = [([job], {expert.index: kept_count(density, job.elements) for expert in plan.experts}) for job in jobs]
        return thresholds_of(MaskedMagnitude(plan, self._facts), members, what="trim")

    def _find_scales(self, expert: ExpertView) -> None:
        """‖Δ‖ / ‖mask·Δ‖ of every tensor of an expert; 1 where nothing is left."""
        plan = self._plan
        jobs = [job for job in plan.merged_jobs() if job.name not in self._facts.averaged]
        blocks = plan.blocks(jobs)
        found = plan.stream.map(
            partial(self._squares, expert), blocks, what=f"norms {expert.name}", size=block_elements,
            ahead=partial(ffg_scoring(plan).prefetch, [expert.index]),
        )  # fmt: skip
        sums: dict[str, tuple[list[float], list[float]]] = {job.name: ([], []) for job in jobs}
        for block, squares in zip(blocks, found, strict=True):
            for total, part in zip(sums[block[0].name], squares, strict=True):
                total += part
        for name, (whole, kept) in sums.items():
            left, norm = math.fsum(kept), math.fsum(whole)
            # Of next to nothing that is left, the rounding would be blown up.
            enough = left > (plan.recipe.setting("rescale_relative_threshold") or 0.0) ** 2 * norm
            self._scales[expert.index, name] = math.sqrt(norm / left) if enough else 1.0

    def _squares(self, expert: ExpertView, block: Block) -> tuple[list[float], list[float]]:
        """Σ Δ² and Σ mask·Δ² of every row of a block."""
        plan, job = self._plan, block[0]
        if job.canonical in expert.inactive:
            return [], []
        if plan.can_fuse([expert], job):
            assert plan.base is not None
            if expert.masks is None:
                threshold = self._facts.thresholds[expert.index][job.canonical]
                base, theta, (chosen, _) = ffg_scoring(plan).kept(expert, block, threshold)
                return squares_of(base, theta, chosen)
            base, theta = (view.stored(job.name, *block[1:]) for view in (plan.base, expert))
            return squares_of(base, theta, expert.masks.read(job.canonical, *block[1:]))
        import torch

        from ota_core.compute.kernels import row_sums

        whole, kept = [], []
        for part in parts(block, plan.tensor_elements):
            difference = delta(plan, expert, *part)
            mask = mask_of(plan, self._facts, expert, part, difference)
            squares = difference * difference
            whole += row_sums(squares).tolist()
            kept += row_sums(squares if mask is None else torch.where(mask, squares, 0.0)).tolist()
        return whole, kept

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        import torch

        from ota_core.methods.ota import any_kept, masked_ties, mean, ota
        from ota_core.rules.rows import base_rows, expert_rows

        base, scale = base_rows(self._plan, block), self.scale_of(block[0])
        thetas = expert_rows(self._plan, block, base)
        if block[0].name in self._facts.averaged:
            return self._average(thetas, base, scale)
        scaled, weights, masks = self._weighed(block, base, thetas)
        if self._masked_merge == "ties":
            assert base is not None
            merged = base + scale * masked_ties([theta - base for theta in scaled], masks, self._factors(), self._denominator)
        else:
            merged = ota(scaled, weights, masks, base, lam=scale, denominator=self._denominator)
        if self._fallback == "mean" and base is not None:
            merged = torch.where(any_kept(masks, base), merged, mean(thetas))
        return merged

    def _edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        import torch

        from ota_core.methods.ota import any_kept, masked_ties_parts, ota_parts
        from ota_core.rules.rows import base_rows, expert_rows

        base, scale = base_rows(self._plan, block), self.scale_of(block[0])
        assert base is not None
        thetas = expert_rows(self._plan, block, base)
        if block[0].name in self._facts.averaged:
            plain = self._plain_weights()
            return base, [scale * weight * (theta - base) / math.fsum(plain) for weight, theta in zip(plain, thetas, strict=True)]
        scaled, weights, masks = self._weighed(block, base, thetas)
        deltas = [theta - base for theta in scaled]
        if self._masked_merge == "ties":
            found = masked_ties_parts(deltas, masks, self._factors(), self._denominator)
        else:
            found = ota_parts(deltas, weights, masks, denominator=self._denominator)
        found = [scale * edit for edit in found]
        if self._fallback == "mean":  # which no λ scales
            kept = any_kept(masks, base)
            shares = [(theta - base) / len(thetas) for theta in thetas]
            found = [torch.where(kept, edit, share) for edit, share in zip(found, shares, strict=True)]
        return base, found

    def _factors(self) -> list[float]:
        return [self._plan.recipe.setting("scaling_factor", expert.index) for expert in self._plan.experts]

    def _weighed(
        self, block: Block, base: "torch.Tensor | None", thetas: "list[torch.Tensor]"
    ) -> "tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]":
        """The experts' weights (θ, rescaled where the recipe asks), their p and their masks in a block."""
        import torch

        from ota_core.methods.saliency import magnitude_scores

        plan, job = self._plan, block[0]
        weights, masks = [], []
        for expert, theta in zip(plan.experts, thetas, strict=True):
            v_hat = expert.v_hat(job.canonical, *block[1:]) if expert.has_curvature(job.canonical) else None
            mask = mask_of(plan, self._facts, expert, block, None if base is None else theta - base, v_hat)
            if mask is not None:
                self._add_count(expert, job, int(mask.sum()))
            if (least := self._trims.get((expert.index, job.name))) is not None:
                assert base is not None
                large = magnitude_scores(theta - base) >= least
                mask = large if mask is None else mask & large
            masks.append(mask)
            weights.append(self._weight(expert, theta, v_hat))
            present = expert.present(job.name, *block[1:])
            if present is not None:
                weights[-1] = torch.where(present, weights[-1], 0.0)
        if self._scales:
            assert base is not None
            scales = [self._scales.get((expert.index, job.name), 1.0) for expert in plan.experts]
            thetas = [base + scale * (theta - base) for scale, theta in zip(scales, thetas, strict=True)]
        return thetas, weights, masks

    def _average(self, thetas: "list[torch.Tensor]", base: "torch.Tensor | None", scale: float) -> "torch.Tensor":
        """A tensor that is averaged for want of curvature."""
        import torch

        from ota_core.methods.ota import ota

        weights = [torch.full_like(t, share) for t, share in zip(thetas, self._plain_weights(), strict=True)]
        return ota(thetas, weights, [None] * len(thetas), base, lam=scale)

    def _plain_weights(self) -> list[float]:
        """What the experts weigh in a tensor without curvature."""
        return [self._plan.recipe.setting("weight", expert.index) for expert in self._plan.experts]

    def _can_fuse(self, job: TensorJob) -> bool:
        if self._masked_merge == "ties" and (self._trims or self._denominator == "all"):
            return False
        if job.name in self._facts.averaged and len(set(self._plain_weights())) > 1:
            return False
        return self._plan.can_fuse(self._plan.experts, job, base=self._plan.base is not None)

    def _exact_edit(self, job: TensorJob) -> bool:
        options = self._masked_merge != "precond" or self._fallback == "mean" or self._plan.recipe.setting("rescale")
        return options or job.name in self._facts.averaged or super()._exact_edit(job)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        plan, job = self._plan, block[0]
        base = plan.base.stored(job.name, *block[1:]) if plan.base else None
        if job.name in self._facts.averaged:
            self._average_fused(block, base, out)
            return
        # Without a base, and with ``fallback: mean``, those that take no part count in the mean.
        voters = [e for e in plan.experts if base is None or self._fallback == "mean" or e.has_curvature(job.canonical)]
        counts, bad = ota_block(
            base,
            [self._vote(expert, block) for expert in voters],
            out,
            power=self._power,
            epsilon=self._epsilon,
            lam=self.scale_of(job),
            denominator=self._denominator,
            masked_merge=self._masked_merge,
            fallback=self._fallback,
            rescale=bool(self._scales),
        )
        if bad is not None:
            voters[bad].refuse(*block)
        for expert, count in zip(voters, counts, strict=True):
            self._add_count(expert, job, count)

    def _average_fused(self, block: Block, base: Rows | None, out: Rows) -> None:
        """``_average`` as the compiled pass has it: every expert with the same weight."""
        votes = [Vote(theta=expert.stored(block[0].name, *block[1:]), v=None) for expert in self._plan.experts]
        ota_block(base, votes, out, power=1.0, epsilon=0.0, lam=self.scale_of(block[0]), denominator="all")

    def _vote(self, expert: ExpertView, block: Block) -> Vote:
        job, plan = block[0], self._plan
        theta = expert.stored(job.name, *block[1:])
        if not expert.has_curvature(job.canonical):
            return Vote(theta=theta, v=None, takes_part=False)
        threshold, kept = None, None
        if plan.recipe.ffg(expert.index):
            if expert.masks is not None:
                kept = expert.masks.read(job.canonical, *block[1:])
            elif plan.recipe.setting("mask_curvature") == "full" and expert.full_moments is not expert.moments:
                kept, _ = block_mask(plan, self._facts, expert, block)
            else:
                threshold = self._facts.thresholds[expert.index][job.canonical]
        return Vote(
            theta=theta,
            v=expert.v_source(*block),
            scale=plan.recipe.setting(self._factor, expert.index),
            mean=self._facts.means.get(expert.index, 1.0),
            stretch=self._scales.get((expert.index, job.name), 1.0),
            threshold=threshold,
            kept=kept,
            metric=BY_MAGNITUDE if plan.recipe.setting("metric") == "magnitude" else BY_CURVATURE,
        )

    def _weight(self, expert: ExpertView, theta: "torch.Tensor", v_hat: "torch.Tensor | None") -> "torch.Tensor":
        """p_m of a block: from the curvature, or the bare scaling factor with ``masked_merge: linear``; 0 for an expert that takes no part."""
        from ota_core.methods.ota import curvature_weights

        if v_hat is None:
            return theta.new_zeros(theta.shape)
        scale = self._plan.recipe.setting(self._factor, expert.index)
        if self._masked_merge != "precond":
            return theta.new_full(theta.shape, scale)
        mean_weight = self._facts.means.get(expert.index)
        return curvature_weights(v_hat, power=self._power, scale=scale, mean=mean_weight, epsilon=self._epsilon)

    def _add_count(self, expert: ExpertView, job: TensorJob, kept: int) -> None:
        if self._plan.recipe.ffg(expert.index) and job.name == job.canonical:
            with self._lock:
                self._kept[expert.index][job.name] += kept

    def _forget(self) -> None:
        with self._lock:
            self._kept.clear()

    def found(self) -> Found:
        thresholds = {
            expert.index: expert.masks.header["thresholds"] if expert.masks else self._facts.thresholds[expert.index]
            for expert in self._plan.experts
            if self._plan.recipe.ffg(expert.index)
        }
        return Found(
            **self._common(),
            kept={expert: dict(counts) for expert, counts in self._kept.items()},
            thresholds={expert: {name: float(tau) for name, tau in taus.items()} for expert, taus in thresholds.items()},
            averaged=sorted(self._facts.averaged),
            compression={
                name: report.model_dump(exclude={"sqrt_error_per_tensor"}) for name, report in self._facts.reports.items()
            },
        )

    def results(self, found: Found) -> dict[str, Any]:
        """Densities and thresholds of every expert with FFG, and what compression lost."""
        densities = {}
        for expert in self._plan.experts:
            if self._plan.recipe.ffg(expert.index):
                taus = found.thresholds[expert.index]
                densities[expert.name] = density_report(self._plan, expert, taus, found.kept.get(expert.index, {}))
        everything = {"densities": densities, "compression": found.compression, "averaged_without_curvature": found.averaged}
        return {key: value for key, value in everything.items() if value} | super().results(found)


class FisherRule(OtaRule):
    """Fisher-weighted averaging (Matena & Raffel 2021, arXiv 2111.09832, equation 4), v̂ as the diagonal of the Fisher matrix.

    Σ w·v̂·θ / Σ w·v̂ is OTA with power 1, the weight as its scale and no mask; θ₀, or the plain mean, where the sum is 0.
    """

    _factor = "weight"

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._power, self._lambda = 1.0, 1.0

    def _plain_weights(self) -> list[float]:
        return [1.0] * len(self._plan.experts)

    def _average_fused(self, block: Block, base: Rows | None, out: Rows) -> None:
        votes = [Vote(theta=expert.stored(block[0].name, *block[1:]), v=None, takes_part=False) for expert in self._plan.experts]
        ota_block(base, votes, out, power=1.0, epsilon=0.0, lam=1.0, denominator="kept", fallback="mean")

    def _average(self, thetas: "list[torch.Tensor]", base: "torch.Tensor | None", scale: float) -> "torch.Tensor":
        from ota_core.methods.ota import mean

        return mean(thetas)

    def results(self, found: Found) -> dict[str, Any]:
        return ({"compression": found.compression} if found.compression else {}) | Rule.results(self, found)


class GraftRule(OtaRule):
    """The masked edit of a single expert on the base (FFG, docs/methods.md section 3): θ₀ + λ·mask·Δ."""

    def _can_fuse(self, job: TensorJob) -> bool:
        return self._plan.recipe.needs_moments and super()._can_fuse(job)

    def _weight(self, expert: ExpertView, theta: "torch.Tensor", v_hat: "torch.Tensor | None") -> "torch.Tensor":
        return theta.new_ones(theta.shape)  # a lone expert's weight cancels, also where no curvature is known


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
