"""Compressing: the second moments of one expert, once for every merge of it."""

from pathlib import Path
from typing import Any, Literal, Self

from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import Progress, parse_memory
from ota_core.engine import engine
from ota_core.plan.inputs import ExpertInput, optimizer_facts
from ota_core.plan.vocabulary.match import names_in
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Stage, Step
from tasks.artifacts.store import BuildResult
from tasks.merging.sources import MOMENTS_FILE, ExpertSource, Planned
from tasks.settings import Places


class CompressJob(Stage):
    """Compress one expert's second moments."""

    kind: Literal["compress"] = "compress"
    expert: ExpertSource
    memory: str

    @property
    def name(self) -> str:
        return f"compress {self.expert.name}"

    def abroad(self) -> Self:
        return self.model_copy(update={"expert": self.expert.abroad()})

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            config = self.step.config
            with self.expert.opened(where, parse_memory(self.memory)) as expert:
                assert expert.moments is not None
                report = engine.compress_moments(
                    expert.moments, folder / MOMENTS_FILE, method=config["method"], rank=config.get("rank"), layout=expert.layout,
                    source_of=expert.source_of, tensors=names_in(expert.path, expert.source_of), memory=self.memory, progress=progress,
                )  # fmt: skip
            return BuildResult(results=report.model_dump(), provenance={"source": expert.source, "expert": expert.name})

        return self.produce(where, build)


def compress_jobs(plan: Planned) -> list[CompressJob]:
    """One for each expert, in their order; none for a method that reads no second moments."""
    if not plan.recipe.needs_moments:
        return []
    return [
        CompressJob(step=moments_step(plan.recipe, one, i), expert=source, memory=plan.memory)
        for i, (one, source) in enumerate(zip(plan.inputs.experts, plan.sources.experts, strict=True))
        if one.moments is not None
    ]


def expert_digests(expert: ExpertInput) -> dict[str, str]:
    """What an expert's second moments are known by: the digest of their file, or of the folder that holds them."""
    return {"moments": expert.moments_digest or expert.digest or "unknown"}


def moments_step(recipe: MergeRecipe, expert: ExpertInput, index: int) -> Step:
    """Compressed second moments of one expert, at this position of the recipe."""
    config: dict[str, Any] = {"method": recipe.setting("compression", index), "optimizer": optimizer_facts(expert.path)}
    return Step.of("moments", config | rank_of(recipe, index), expert_digests(expert))


def rank_of(recipe: MergeRecipe, index: int) -> dict[str, int]:
    """The rank where the compression has one; elsewhere it decides nothing and stales nothing."""
    rank = recipe.setting("rank", index)
    return {} if rank is None else {"rank": rank}
