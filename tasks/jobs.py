"""A stage as another machine is told of it: what to make, and where its inputs lie; never an open file or this machine's paths.

Machines share the root of the artifacts and the places where the models lie. Everything here knows nothing of Prefect.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import Progress, parse_memory
from ota_core.errors import ArtifactError
from ota_core.recipe.recipe import MergeRecipe
from tasks import stages
from tasks.evaluation.suites import SuiteError, load_suite
from tasks.merging.sources import MergeSources
from tasks.settings import Places
from tasks.stages import Step, Subject


class _Job(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Step
    """What the job will leave."""


class MergeJob(_Job):
    """Merge the experts into one model."""

    kind: Literal["merge"] = "merge"
    label: str
    """How it is merged, so that the runs of several merges can be told apart."""
    recipe: MergeRecipe
    sources: MergeSources
    """With compressed second moments and masks, where the method has them."""
    shard_size: int
    memory: str

    @property
    def name(self) -> str:
        return f"merge {self.label}"[:200]

    def run(self, where: Places, device: str, progress: Progress | None = None) -> ArtifactRef:
        """Do it on this machine, or find it done. Raises OtaError."""
        full = self.recipe.setting("mask_curvature") == "full"
        with self.sources.opened(where, parse_memory(self.memory), raw_moments=full) as inputs:
            return stages.merge(
                where, self.step, self.recipe, inputs, shard_size=self.shard_size, memory=self.memory, device=device, progress=progress
            )  # fmt: skip


class ScoreJob(_Job):
    """Score one model on a suite."""

    kind: Literal["benchmark"] = "benchmark"
    subject: Subject
    suite: str
    """A name in deployments/suites, or a file that every machine sees."""
    data_dir: str | None
    """A folder that every machine sees, or ``s3://…``."""
    limit: int | None

    @property
    def name(self) -> str:
        return f"benchmark {self.subject.name}"

    def run(self, where: Places, device: str, progress: Progress | None = None) -> ArtifactRef:
        """Do it on this machine, or find it done. Raises OtaError."""
        data = stages.bring_data(self.data_dir, where)
        here = stages.score_step(self.subject, load_suite(self.suite), data, self.limit)
        if here.fingerprint != self.step.fingerprint:
            raise SuiteError(
                f"suite '{self.suite}' or its data ({self.data_dir or 'none'}) differ on this machine from those of the flow that asks for scores; "
                "install the same version of this package on all machines, and keep the data in s3://… or a shared folder"
            )
        subject = self.subject.model_copy(update={"path": None})  # a folder of the machine that asks
        return stages.score(where, self.step, subject, self.suite, data, self.limit, device=device, progress=progress)


Job = Annotated[MergeJob | ScoreJob, Field(discriminator="kind")]


def missing_after(name: str, where: Places) -> ArtifactError:
    """What to say when a machine reports a stage done and the root of this machine does not hold its output."""
    return ArtifactError(
        f"{name} is done, but {where.artifacts} does not hold its output as this machine sees it; all machines need one root: "
        "OTA_ARTIFACTS, or --artifacts, must be s3://… or a shared folder"
    )
