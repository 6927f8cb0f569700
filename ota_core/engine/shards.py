"""A merge spread over machines: output shards are independent but for a few facts of whole experts, which sums of the parts give.

    for each shard    survey(...)                     counts of the scores' upper bits, sums of the curvature
    once              Survey.sum, opened_bins(...)    which bins hold the thresholds
    for each shard    survey(..., opened=...)         counts above and inside those bins
    once              whole_facts(...)                thresholds and means, to the bit those of one process
    for each shard    shard_scales(...)               λ of its matrices; only with ``lambda: auto``
    once              with_scales(...)                λ of the merge
    for each shard    merge_shard(...)                its weight file
    once              finish(...)                     index, configuration, model card

Whoever works on a shard reads the bytes of its tensors alone. Recipes without a global density and without ``normalise: global`` need no
survey (``needs_survey``). Second moments must be compressed before, once an expert: a shard would otherwise compress the whole expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ota_core.compute.stream import Progress
from ota_core.engine.engine import Opens, complete_folder, noted_cards
from ota_core.engine.output import Shards, needs, plan_files, write_weights
from ota_core.engine.survey import Survey, bins_varied, facts_varied, survey_varied
from ota_core.engine.ties import check_ties
from ota_core.errors import ArtifactError, OtaError, RecipeError
from ota_core.files.room import check_room
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.moments.compression import compression_of
from ota_core.plan.found import Found
from ota_core.plan.inputs import MergeInputs
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.plan.prepare import WholeFacts, ffg_group, masked_here, mean_of, weight_sums
from ota_core.plan.scoring import ffg_scoring
from ota_core.plan.tally import Brackets, bins_of, count_brackets, count_high, read_off, taus_of
from ota_core.plan.views import ExpertView
from ota_core.recipe.methods import FFG
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.lambdas import scales_of
from ota_core.rules.rule import rule_of


@dataclass(frozen=True, kw_only=True)
class MergeInParts:
    """A merge and how its parts are run; the parts of one merge share recipe, inputs and shard size."""

    recipe: MergeRecipe
    inputs: MergeInputs
    shard_size: int = MAX_SHARD_BYTES
    memory: str | int = "2GiB"
    device: str = "cpu"
    threads: int | None = None
    progress: Progress | None = None

    @contextmanager
    def opened(self, shard: str | None = None) -> Iterator[tuple[MergePlan, Shards]]:
        """The plan of the whole merge, or of one shard, and the shards' files. Raises OtaError with all problems found."""
        with open_plan(
            self.recipe,
            self.inputs,
            device=self.device,
            memory=self.memory,
            threads=self.threads,
            progress=self.progress,
        ) as plan:
            _check_compressed(plan)
            shards = plan_files(plan, self.shard_size)
            if shard is not None:
                shards = [one for one in shards if one[0] == shard]
                if not shards:
                    raise OtaError(
                        f"this merge has no file '{shard}'; its shards depend on the shard size, which all parts must share"
                    )
                plan.part = frozenset(spec.name for spec in shards[0][1])
            yield plan, shards


def _check_compressed(plan: MergePlan) -> None:
    for expert in plan.experts if plan.recipe.needs_moments else ():
        assert expert.moments is not None
        wanted = plan.recipe.setting("compression", expert.index)
        if wanted != "none" and compression_of(expert.moments) != wanted:
            raise RecipeError(
                f"expert '{expert.name}': the recipe says compression: {wanted}, a merge in shards needs its second moments compressed "
                "before; run `ota compress` on them, or let the flow do it"
            )


def shard_files(job: MergeInParts) -> list[str]:
    """The names of the output's weight files, each a part of the merge."""
    with job.opened() as (plan, shards):
        check_ties(plan)
        return [file for file, _ in shards]


def needs_survey(recipe: MergeRecipe, inputs: MergeInputs) -> bool:
    """Whether a shard of this merge must know facts of whole experts."""
    if recipe.merge_method not in FFG:
        return False
    # Of slices, the parts say whether they rank anything; a survey of none is cheap.
    ranked = recipe.sliced or any(
        recipe.ffg(i) and expert.masks is None and recipe.setting("density", i) is not None
        for i, expert in enumerate(inputs.experts)
    )
    return recipe.setting("normalise") == "global" or (ranked and recipe.setting("scope") == "global")


def survey(job: MergeInParts, shard: str, *, opened: Mapping[int, int] | None = None) -> Survey:
    """Count one shard: all upper bits and the sums, or with ``opened`` what lies above and inside each expert's bin. Raises OtaError."""
    with job.opened(shard) as (plan, _):
        if plan.recipe.varies:
            return survey_varied(plan, opened, f"survey {shard}")
        experts = _ranked(plan)
        names = tuple(expert.index for expert in experts)
        what = f"survey {shard}"
        if opened is not None:
            group = ffg_group(plan, experts)
            bins = np.array([[opened.get(expert, -1)] for expert in names], np.int64)
            return Survey(experts=names, brackets=count_brackets(ffg_scoring(plan), group, bins, what=what), sums={})
        high = count_high(ffg_scoring(plan), ffg_group(plan, experts), what=what) if experts else None
        sums: dict[int, dict[str, float]] = {}
        if plan.recipe.setting("normalise") == "global":
            sums = {expert.index: weight_sums(plan, expert) for expert in plan.experts}
        return Survey(experts=names, high=high, sums=sums)


def _ranked(plan: MergePlan) -> list[ExpertView]:
    """The experts whose threshold is a rank among all their scores."""
    if plan.recipe.merge_method not in FFG or plan.recipe.setting("scope") != "global":
        return []
    return [expert for expert in masked_here(plan) if plan.recipe.setting("density", expert.index) is not None]


def opened_bins(job: MergeInParts, first: Survey) -> dict[int, int]:
    """Expert → the bin that holds its threshold, from round 1 of all shards together. Empty when no second round is needed."""
    if first.high is None:
        return {}
    with job.opened() as (plan, _):
        if plan.recipe.varies:
            return bins_varied(plan, first)
        group = ffg_group(plan, _ranked(plan))
        bins = bins_of(group, first.high).max(axis=1, initial=-1).tolist()
    return {expert: bin for expert, bin in zip(group.experts, bins, strict=True) if bin >= 0}


def whole_facts(job: MergeInParts, first: Survey, second: Survey | None) -> WholeFacts:
    """Thresholds and means, from both rounds of all shards together (the second one where ``opened_bins`` asked for it)."""
    with job.opened() as (plan, _):
        if plan.recipe.varies:
            return facts_varied(plan, first, second)
        means = {expert.index: mean_of(plan, expert, first.sums[expert.index]) for expert in plan.experts} if first.sums else {}
        if first.high is None:
            return WholeFacts(means=means)
        group = ffg_group(plan, _ranked(plan))
        brackets = Brackets.empty(np.full((len(group.experts), 1), -1, np.int64))
        if second is not None and second.brackets is not None:
            brackets = second.brackets
        scores = read_off(group, brackets)
        if scores is None:
            raise ArtifactError("the second survey does not hold the bins that the first one asks for; survey all shards again")
        return WholeFacts(thresholds=taus_of(scores), means=means)


def shard_scales(job: MergeInParts, shard: str, whole: WholeFacts | None) -> dict[str, list[float]]:
    """Tensor → λ of each of its matrices, of one shard. ``whole``: thresholds and means, where ``needs_survey`` says so. Raises OtaError."""
    _check_surveyed(job, shard, whole)
    with job.opened(shard) as (plan, _):
        rule = rule_of(plan, whole or WholeFacts())
        rule.prepare()
        return rule.matrix_scales()


def with_scales(whole: WholeFacts | None, scales: Sequence[Mapping[str, list[float]]]) -> WholeFacts:
    """The facts with λ, from the matrices of all shards: to the bit that of one process. Raises RecipeError where nobody moved a matrix."""
    found = scales_of({name: values for one in scales for name, values in one.items()})
    return (whole or WholeFacts()).model_copy(update={"scale": found.all, "scales": dict(found.tensors)})


def _check_surveyed(job: MergeInParts, shard: str, whole: WholeFacts | None) -> None:
    if whole is None and needs_survey(job.recipe, job.inputs):
        raise OtaError(f"{shard}: thresholds and means of the whole experts are missing; survey all shards first")


def merge_shard(job: MergeInParts, shard: str, folder: Path, whole: WholeFacts | None) -> Found:
    """Write one weight file of the merge into ``folder``. ``whole``: where ``needs_survey`` says so, or with ``lambda: auto``. Raises OtaError."""
    _check_surveyed(job, shard, whole)
    if job.recipe.auto and (whole is None or whole.scale is None):
        raise OtaError(f"{shard}: λ of the whole merge is missing; find it from the matrices of all shards first")
    with job.opened(shard) as (plan, shards):
        rule = rule_of(plan, whole or WholeFacts())
        rule.prepare()
        check_room(needs(plan, folder, whole=False))
        write_weights(plan, rule, folder, shards)
        return rule.found()


def finish(
    job: MergeInParts, folder: Path, found: Sequence[Found], opens: Opens | None = None
) -> tuple[str, dict[str, Any], list[str]]:
    """Index, configuration, tokenizer and model card beside the shards. Returns the merge's fingerprint, results and notes."""
    with job.opened() as (plan, shards):
        identity, results = complete_folder(
            plan, rule_of(plan), Found.sum(found), folder, shards, job.shard_size, opens, noted_cards(plan)
        )
        return identity, results, plan.notes
