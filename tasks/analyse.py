"""Analysing: where the masks of a merge lie, how alike its experts are, what compression loses; and before a merge, whether it will do."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ota_core import analysis as core
from ota_core.analysis import AnalysisOptions
from ota_core.analysis.preflight import preflight
from ota_core.analysis.subject import mask_recipe, with_second_moments
from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import Progress, parse_memory
from ota_core.errors import OtaError
from ota_core.moments.compression import METHODS
from ota_core.plan.inputs import MergeInputs, merge_identity, optimizer_facts
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Step
from tasks.artifacts.store import BuildResult
from tasks.compress import expert_digests
from tasks.merging.sources import MergeStage, Planned
from tasks.settings import Places

PREFLIGHT_VERSION = 2
"""Raised where a preflight of the same merge gives other numbers."""


class AnalyseJob(MergeStage):
    """Analyse the experts of a recipe."""

    kind: Literal["analyse"] = "analyse"

    @property
    def name(self) -> str:
        return f"analyse {self.recipe.merge_method}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            from tasks.pages.analysis import said, write_tables  # pandas: a flow that finds everything in its cache goes without

            options = AnalysisOptions.model_validate(self.step.config["options"])
            with self.sources.opened(where, parse_memory(self.memory), raw_moments=True) as inputs:
                found = core.analyse(self.recipe, inputs, options, memory=self.memory, scratch=folder, progress=progress)
            write_tables(folder, found)
            return BuildResult(results=said(found))

        return self.produce(where, build)


class PreflightJob(MergeStage):
    """Measure whether the experts of a recipe will merge."""

    kind: Literal["preflight"] = "preflight"

    @property
    def name(self) -> str:
        return f"preflight {self.recipe.merge_method}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            from tasks.pages.analysis import said, write_tables

            with self.sources.opened(where, parse_memory(self.memory), raw_moments=True) as inputs:
                found = preflight(self.recipe, inputs, memory=self.memory, scratch=folder, progress=progress)
            write_tables(folder, found)
            return BuildResult(results=said(found))

        return self.produce(where, build)


def preflight_job(plan: Planned) -> PreflightJob:
    """The preflight of a plan's merge."""
    _, config, digests = merge_identity(plan.recipe, plan.inputs)
    names = [expert.name for expert in plan.inputs.experts]
    step = Step.of("analysis", {"preflight": PREFLIGHT_VERSION, "names": names, **config}, digests)
    return PreflightJob(step=step, recipe=plan.recipe, sources=plan.sources, memory=plan.memory)


def analyse_job(plan: Planned, options: AnalysisOptions | None = None) -> AnalyseJob:
    """The analysis of a plan's experts. Raises OtaError."""
    step = analysis_step(plan.recipe, plan.inputs, options)
    return AnalyseJob(step=step, recipe=plan.recipe, sources=plan.sources, memory=plan.memory)


def analysis_options(
    *, density: float | None = None, compressions: str | Iterable[str] = METHODS, **more: Any
) -> AnalysisOptions:
    """Options from what a person writes; ``compressions``: names, or one text with commas between them. Raises OtaError."""
    named = compressions.split(",") if isinstance(compressions, str) else compressions
    names = [name.strip() for name in named if name.strip() not in {"", "-"}]
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise OtaError(f"compressions: got '{', '.join(unknown)}', expected some of {', '.join(METHODS)}")
    try:
        return AnalysisOptions(density=density, compressions=tuple(m for m in METHODS if m in names), **more)
    except ValidationError as error:
        first = error.errors()[0]
        raise OtaError(f"{first['loc'][0]}: got {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}") from None


def analysis_step(recipe: MergeRecipe, inputs: MergeInputs, options: AnalysisOptions | None = None) -> Step:
    """The analysis of a recipe's experts: the same for all recipes of one method whose masks are the same, however it combines them.

    inputs: with raw second moments or, as the later stages of a merge have them, with compressed ones and masks.
    """
    options = options or AnalysisOptions()
    known, _ = with_second_moments(inputs, options)
    masks = mask_recipe(recipe, options)
    names = [expert.name for expert in known.experts]
    tokenizer = recipe.tokenizer_source.removeprefix("model:")
    keys = ("scope", "metric", "mask_curvature", "compression", "rank", "bias_correction", "missing_curvature")
    config = {
        "method": recipe.merge_method,  # the settings in the result name it
        "masks": {key: masks.setting(key) for key in keys},
        "experts": [
            {
                "name": expert.name,
                "ffg": recipe.ffg(i),
                "curvature": expert.moments is not None,
                "optimizer": optimizer_facts(expert.path),
                **{key: masks.setting(key, i) for key in ("density", "precond_threshold")},
            }
            for i, expert in enumerate(known.experts)
        ],
        "tokenizer_source": names.index(tokenizer) if tokenizer in names else tokenizer,
        "options": options.model_dump(mode="json"),
    } | recipe.token_rows()
    digests = {"base": (known.base.digest if known.base else None) or "none"}
    for i, expert in enumerate(known.experts):
        digests[f"expert{i}"] = expert.digest or "unknown"
        if expert.moments is not None:
            digests[f"moments{i}"] = expert_digests(expert)["moments"]
    return Step.of("analysis", config, digests)
