"""Masking: Fast Fisher Grafting of one expert, by its compressed second moments."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import Progress
from ota_core.engine import engine
from ota_core.plan.inputs import MergeInputs, optimizer_facts
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Step
from tasks.artifacts.store import BuildResult
from tasks.compress import expert_digests, rank_of
from tasks.merging.sources import MASK_FILE, MergeStage, Planned
from tasks.settings import Places


class MaskJob(MergeStage):
    """The FFG mask of one expert."""

    kind: Literal["mask"] = "mask"
    index: int
    """The expert's position in the recipe."""

    @property
    def name(self) -> str:
        return f"mask {self.sources.experts[self.index].name}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        expert = self.sources.experts[self.index].name

        def build(folder: Path) -> BuildResult:
            with self.opened(where) as inputs:
                recipe, inputs = mask_inputs(self.recipe, inputs, self.index)
                found = engine.mask(
                    recipe, folder, inputs=inputs, only=expert, memory=self.memory, device=device, progress=progress
                )  # fmt: skip
            (folder / f"{expert}.safetensors").rename(folder / MASK_FILE)
            return BuildResult(results=found[expert], provenance={"expert": expert})

        return self.produce(where, build)


def mask_jobs(plan: Planned) -> dict[int, MaskJob]:
    """By position, one for each expert that FFG masks; of a plan with compressed second moments.

    None where values differ between tensors: such masks are made while merging.
    """
    if plan.recipe.varies:
        return {}
    return {
        i: MaskJob(
            step=mask_step(plan.recipe, plan.inputs, i), recipe=plan.recipe, sources=plan.sources, memory=plan.memory, index=i
        )
        for i in range(len(plan.recipe.models))
        if plan.recipe.ffg(i)
    }


def mask_inputs(recipe: MergeRecipe, inputs: MergeInputs, index: int) -> tuple[MergeRecipe, MergeInputs]:
    """The part of a merge that decides one expert's mask: base and expert, or all models where the vocabulary is joined from all."""
    if recipe.tokenizer_source != "base" or recipe.tokenizer is not None:
        return recipe, inputs
    alone = replace(inputs, experts=(inputs.experts[index],), scales=None)
    return recipe.model_copy(update={"models": (recipe.models[index],)}), alone


def mask_step(recipe: MergeRecipe, inputs: MergeInputs, index: int) -> Step:
    """FFG mask of one expert."""
    part, _ = mask_inputs(recipe, inputs, index)
    keys = ("scope", "metric", "mask_curvature", "bias_correction")
    config: dict[str, Any] = {key: recipe.setting(key) for key in keys} | rank_of(recipe, index)
    config["compression"] = recipe.setting("compression", index)
    config |= {key: recipe.setting(key, index) for key in ("density", "precond_threshold")}
    config |= {
        "tokenizer_source": recipe.tokenizer_source,
        "position": part.models.index(recipe.models[index]),
    } | recipe.token_rows()
    expert = inputs.experts[index]
    config["optimizer"] = optimizer_facts(expert.path)
    digests = {
        "base": (inputs.base.digest if inputs.base else None) or "none",
        "expert": expert.digest or "unknown",
        **expert_digests(expert),
    }
    if len(part.models) > 1:
        digests |= {f"model{i}": other.digest or "unknown" for i, other in enumerate(inputs.experts)}
    return Step.of("masks", config, digests)
