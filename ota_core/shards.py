"""A merge spread over machines: output shards are independent but for a few facts of whole experts, which sums of the parts give.

    for each shard    survey(...)                     counts of the scores' upper bits, sums of the curvature
    once              Survey.sum, opened_bins(...)    which bins hold the thresholds
    for each shard    survey(..., opened=...)         counts of the lower bits in those bins
    once              whole_facts(...)                thresholds and means, to the bit those of one process
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
import torch

from ota_core.compression import CompressedMoments
from ota_core.engine import Progress, complete_folder, pick_device
from ota_core.errors import ArtifactError, OtaError, RecipeError
from ota_core.found import Found
from ota_core.inputs import MergeInputs
from ota_core.output import Shards, plan_files, write_weights
from ota_core.plan import MergePlan, open_plan
from ota_core.prepare import WholeFacts, ffg_group, ffg_scoring, masked_here, mean_of, taus_of, weight_sums
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from ota_core.rules import rule_of
from ota_core.safetensors_io import SafetensorsFile
from ota_core.saliency import BINS
from ota_core.stream import parse_memory
from ota_core.tally import Histograms, Place, bins_of, count, flat, open_bins, place, settle
from ota_core.views import ExpertView
from ota_core.writer import MAX_SHARD_BYTES, SafetensorsWriter, TensorSpec

FORMAT = "survey/1"


@dataclass(frozen=True, kw_only=True)
class Job:
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
            device=pick_device(self.device),
            memory=parse_memory(self.memory),
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
    wanted = plan.recipe.setting("compression") if plan.recipe.merge_method in NEEDS_MOMENTS else None
    for expert in plan.experts:
        if wanted not in {None, "none"} and not (
            isinstance(expert.moments, CompressedMoments) and expert.moments.method == wanted
        ):
            raise RecipeError(
                f"expert '{expert.name}': the recipe says compression: {wanted}, a merge in shards needs its second moments compressed "
                "before; run `ota compress` on them, or let the flow do it"
            )


def shard_files(job: Job) -> list[str]:
    """The names of the output's weight files, each a part of the merge."""
    with job.opened() as (_, shards):
        return [file for file, _ in shards]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a shard adds to the facts of whole experts, which are named by their position in the recipe."""

    experts: tuple[int, ...] = ()
    """Rows of the histograms."""
    histograms: Histograms | None = None
    sums: Mapping[int, Mapping[str, float]]
    """Expert → tensor → Σ v̂^power, with ``normalise: global``."""

    @staticmethod
    def sum(surveys: Sequence["Survey"]) -> "Survey":
        """The survey of all shards together. Raises ArtifactError when they are not of one merge."""
        first = surveys[0]
        if any(one.experts != first.experts for one in surveys):
            raise ArtifactError("surveys of different merges cannot be added up; take them all from one recipe")
        total = None
        if first.histograms is not None:
            total = Histograms.empty(first.histograms.slots)
            for one in surveys:
                assert one.histograms is not None and np.array_equal(one.histograms.slots, total.slots)
                total.add(one.histograms)
        sums: dict[int, dict[str, float]] = {}
        for one in surveys:
            for expert, tensors in one.sums.items():
                sums.setdefault(expert, {}).update(tensors)
        return Survey(experts=first.experts, histograms=total, sums=sums)

    def save(self, path: Path) -> None:
        """Write a safetensors file: slots int8, high and low int64, and the sums in the metadata (as hexadecimal floats, exact)."""
        tensors = {}
        if self.histograms is not None:
            found = self.histograms
            tensors = {"slots": torch.from_numpy(found.slots), "high": torch.from_numpy(found.high)}
            if found.low.shape[1]:
                tensors["low"] = torch.from_numpy(found.low)
        metadata = {"ota_format": FORMAT, "experts": ",".join(map(str, self.experts))}
        metadata |= {f"sum {m} {name}": value.hex() for m, sums in self.sums.items() for name, value in sums.items()}
        writer = SafetensorsWriter(path, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], metadata)
        for name, tensor in tensors.items():
            writer.write_rows(name, 0, tensor.reshape(-1, BINS))
        writer.close()

    @staticmethod
    def load(path: Path) -> "Survey":
        """Read what ``save`` wrote. Raises ArtifactError for another format."""
        with SafetensorsFile(path) as file:
            if file.metadata.get("ota_format") != FORMAT:
                raise ArtifactError(
                    f"{path}: format {file.metadata.get('ota_format')!r}, expected {FORMAT}; survey the shard again"
                )
            held = {
                name: file.read_rows(name, 0, int(np.prod(info.shape[:-1]))).reshape(info.shape).clone().numpy()
                for name, info in file.infos.items()
            }
            experts = tuple(int(m) for m in file.metadata["experts"].split(",") if m)
            sums: dict[int, dict[str, float]] = {}
            for key, value in file.metadata.items():
                if key.startswith("sum "):
                    _, expert, name = key.split(" ", 2)
                    sums.setdefault(int(expert), {})[name] = float.fromhex(value)
        if not held:
            return Survey(experts=experts, sums=sums)
        low = held.get("low", np.zeros((len(experts), 0, BINS), np.int64))
        return Survey(experts=experts, histograms=Histograms(held["slots"], held["high"], low), sums=sums)


def needs_survey(recipe: MergeRecipe, inputs: MergeInputs) -> bool:
    """Whether a shard of this merge must know facts of whole experts."""
    if recipe.merge_method != "ota":
        return False
    ranked = any(
        recipe.ffg(i) and expert.masks is None and recipe.setting("density", i) is not None
        for i, expert in enumerate(inputs.experts)
    )
    return recipe.setting("normalise") == "global" or (ranked and recipe.setting("scope") == "global")


def survey(job: Job, shard: str, *, opened: Mapping[int, Sequence[int]] | None = None) -> Survey:
    """Count one shard: all upper bits and the sums, or with ``opened`` the lower bits of each expert's bins. Raises OtaError."""
    with job.opened(shard) as (plan, _):
        experts = _ranked(plan)
        histograms = None
        if experts:
            group = ffg_group(plan, experts)
            slots = open_bins([(opened or {}).get(expert, ()) for expert in group.experts])
            histograms = count(plan, ffg_scoring(plan), group, slots, count_high=opened is None, what=f"survey {shard}")
        sums: dict[int, dict[str, float]] = {}
        if plan.recipe.setting("normalise") == "global" and opened is None:
            sums = {expert.index: weight_sums(plan, expert) for expert in plan.experts}
        return Survey(experts=tuple(expert.index for expert in experts), histograms=histograms, sums=sums)


def _ranked(plan: MergePlan) -> list[ExpertView]:
    """The experts whose threshold is a rank among all their scores."""
    if plan.recipe.merge_method != "ota" or plan.recipe.setting("scope") != "global":
        return []
    return [expert for expert in masked_here(plan) if plan.recipe.setting("density", expert.index) is not None]


def opened_bins(job: Job, first: Survey) -> dict[int, list[int]]:
    """Expert → the bins that hold its thresholds, from the first survey of all shards together. Empty when no second round is needed."""
    if first.histograms is None:
        return {}
    with job.opened() as (plan, _):
        group = ffg_group(plan, _ranked(plan))
        bins = bins_of(group, place(group, first.histograms))
    return {expert: found for expert, found in zip(group.experts, bins, strict=True) if found}


def whole_facts(job: Job, first: Survey, second: Survey | None) -> WholeFacts:
    """Thresholds and means, from both rounds of all shards together (the second one where ``opened_bins`` asked for it)."""
    with job.opened() as (plan, _):
        means = {expert.index: mean_of(plan, expert, first.sums[expert.index]) for expert in plan.experts} if first.sums else {}
        if first.histograms is None:
            return WholeFacts(means=means)
        group = ffg_group(plan, _ranked(plan))
        places = place(group, first.histograms)
        if second is not None and second.histograms is not None:
            places = settle(group, places, second.histograms)
        if any(one.score is None for one in flat(places)):
            raise ArtifactError("the second survey does not hold the bins that the first one asks for; survey all shards again")
        return WholeFacts(thresholds=taus_of({expert: _scores(found) for expert, found in places.items()}), means=means)


def _scores(places: Sequence[Place]) -> list[float]:
    return [one.score for one in places if one.score is not None]


def merge_shard(job: Job, shard: str, folder: Path, whole: WholeFacts | None) -> Found:
    """Write one weight file of the merge into ``folder``. ``whole``: where ``needs_survey`` says so. Raises OtaError."""
    if whole is None and needs_survey(job.recipe, job.inputs):
        raise OtaError(f"{shard}: thresholds and means of the whole experts are missing; survey all shards first")
    with job.opened(shard) as (plan, shards):
        rule = rule_of(plan, whole or WholeFacts())
        rule.prepare()
        write_weights(plan, rule, folder, shards)
        return rule.found()


def finish(job: Job, folder: Path, found: Sequence[Found]) -> tuple[str, dict[str, Any]]:
    """Index, configuration, tokenizer and model card beside the shards. Returns the merge's fingerprint and results."""
    with job.opened() as (plan, shards):
        return complete_folder(plan, rule_of(plan), Found.sum(found), folder, shards, job.shard_size)
