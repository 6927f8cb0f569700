"""A merge in parts that machines share out: what a part is told, how it is run, and how the parts become the merged model.

Each part leaves an artifact, named by the merge's fingerprint and the part's own name, and is found there by whoever runs it again:

    moments   compressed second moments of an expert
    surveys   counts of one shard's scores, first of their upper bits, then above and inside a bin; only where ``needs_survey``
    facts     thresholds and means of whole experts, from the sums of the surveys
    shards    one weight file of the output

Masks are not stored on this path: each shard applies the thresholds to its own tensors on the fly, which saves writing and reading a bit an
element. Masks that an earlier run left in the store are used, and save the surveys.
Machines share nothing but the artifacts' root and the places where the models lie. Everything here knows nothing of Prefect.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import ArtifactRef, Kind, Record, folder_files
from ota_core.compute.stream import Progress, parse_memory, peak_memory_gib
from ota_core.errors import ArtifactError
from ota_core.merge import engine
from ota_core.merge.shards import Job, Survey, finish, merge_shard, needs_survey, opened_bins, shard_files, survey, whole_facts
from ota_core.plan.found import Found
from ota_core.plan.inputs import MergeInputs
from ota_core.plan.prepare import WholeFacts
from ota_core.recipe.recipe import MergeRecipe
from tasks import jobs, stages
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.merging.sources import MergeSources
from tasks.settings import Places
from tasks.stages import Step, store_of
from tasks.storage import models as storage
from tasks.storage.cache import FileInfo, combined_digest, digest_files, hash_file
from tasks.storage.layout import model_files

SURVEY_FILE = "survey.safetensors"
FACTS_FILE = "facts.json"


class SpreadMerge(BaseModel):
    """One merge as every machine is told of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: MergeRecipe
    sources: MergeSources
    step: Step
    """What the merged model will be."""
    shard_size: int
    where: Places
    """The root of the artifacts must be one that all machines see. A machine's own ``OTA_HOME`` wins for the cache."""
    memory: str
    """Budget of each part."""
    device: str

    def here(self) -> Places:
        """The places as this machine has them."""
        return self.where.here()

    def store(self) -> ArtifactStore:
        return store_of(self.here())

    @contextmanager
    def inputs(self) -> Iterator[MergeInputs]:
        """The inputs opened on this machine. Raises OtaError."""
        full = self.recipe.setting("mask_curvature") == "full"
        with self.sources.opened(self.here(), parse_memory(self.memory), raw_moments=full) as inputs:
            yield inputs

    @contextmanager
    def job(self, device: str = "cpu", progress: Progress | None = None) -> Iterator[Job]:
        """The merge as the core takes it; ``device`` matters to who reads tensors. Raises OtaError."""
        with self.inputs() as inputs:
            yield Job(
                recipe=self.recipe, inputs=inputs, shard_size=self.shard_size, memory=self.memory, device=device, progress=progress
            )  # fmt: skip


class Part(BaseModel):
    """What one machine does at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge: SpreadMerge
    kind: Literal["compress", "survey", "recount", "merge"]
    target: str
    """The expert's name, or the shard's."""
    step: Step
    """What the part will leave."""
    opened: dict[int, int] = {}
    """For ``recount``: expert → the bin that holds its threshold."""
    facts: ArtifactRef | None = None
    """For ``merge``, where whole experts must be known."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.target}"


def compress_parts(merge: SpreadMerge) -> list[Part]:
    """One part per expert whose second moments are to be compressed; none for methods that read none."""
    if not any(one.needs_moments for one in merge.sources.experts):
        return []
    with merge.inputs() as inputs:
        return [
            Part(merge=merge, kind="compress", target=expert.name, step=stages.moments_step(merge.recipe, expert))
            for expert in inputs.experts
            if expert.moments is not None
        ]


def with_moments(merge: SpreadMerge, refs: Sequence[ArtifactRef]) -> SpreadMerge:
    """The merge with the experts' compressed second moments, in their order."""
    found = iter(refs)
    experts = [one.model_copy(update={"compressed": next(found)}) if one.needs_moments else one for one in merge.sources.experts]
    return merge.model_copy(update={"sources": merge.sources.model_copy(update={"experts": tuple(experts)})})


def with_masks(merge: SpreadMerge) -> SpreadMerge:
    """The merge with masks where the store holds them for every expert that FFG masks; as it was where one is missing."""
    masked = [i for i in range(len(merge.recipe.models)) if merge.recipe.ffg(i)]
    if not masked:
        return merge
    with merge.inputs() as inputs:
        steps = {i: stages.mask_step(merge.recipe, inputs, i) for i in masked}
    masks = {i: merge.store().find("masks", step.fingerprint) for i, step in steps.items()}
    if None in masks.values():
        return merge
    experts = [one.model_copy(update={"masks": masks.get(i)}) for i, one in enumerate(merge.sources.experts)]
    return merge.model_copy(update={"sources": merge.sources.model_copy(update={"experts": tuple(experts)})})


def shards_of(merge: SpreadMerge) -> tuple[list[str], bool]:
    """(the output's weight files, whether they must be surveyed). Raises OtaError with everything that is wrong with the inputs."""
    with merge.job() as job:
        return shard_files(job), needs_survey(job.recipe, job.inputs)


def shard_parts(
    merge: SpreadMerge,
    kind: Literal["survey", "recount", "merge"],
    shards: Sequence[str],
    *,
    opened: Mapping[int, int] | None = None,
    facts: ArtifactRef | None = None,
) -> list[Part]:
    """One part per shard."""
    return [
        Part(merge=merge, kind=kind, target=shard, step=_step(merge, "shards" if kind == "merge" else "surveys", kind, shard),
             opened=dict(opened or {}), facts=facts)
        for shard in shards
    ]  # fmt: skip


def _step(merge: SpreadMerge, kind: Kind, what: str, shard: str = "") -> Step:
    return Step.of(kind, {"part": what, "shard": shard}, {"merge": merge.step.fingerprint})


def run_part(part: Part, progress: Progress | None = None) -> ArtifactRef:
    """Do a part on this machine, or find it done. Raises OtaError."""
    merge, where = part.merge, part.merge.here()
    if part.kind == "compress":
        expert = tuple(one for one in merge.sources.experts if one.name == part.target)
        alone = MergeSources(base=None, experts=expert)
        with alone.opened(where, parse_memory(merge.memory), raw_moments=True) as inputs:
            return stages.compress(where, part.step, inputs.experts[0], memory=merge.memory, progress=progress)

    def build(folder: Path) -> BuildResult:
        with merge.job(merge.device, progress) as job:
            if part.kind != "merge":
                survey(job, part.target, opened=part.opened if part.kind == "recount" else None).save(folder / SURVEY_FILE)
                return BuildResult(provenance=_worker(job))
            found = merge_shard(job, part.target, folder, _facts(merge, part.facts) if part.facts else None)
            # Hashed here, where the file was just written: nobody has to read it again to know what the merged model is.
            digest = "xxh3:" + hash_file(folder / part.target)["xxh3"]
            return BuildResult(results=found.model_dump(mode="json"), provenance={**_worker(job), "digest": digest})

    return _produce(merge, part.step, build)


def _produce(merge: SpreadMerge, step: Step, build: Any) -> ArtifactRef:
    return merge.store().produce(step.kind, step.fingerprint, config=step.config, inputs=step.inputs, build=build)


def _worker(job: Job) -> dict[str, Any]:
    return {**engine.environment(engine.pick_device(job.device)), "pid": os.getpid(), "peak_memory_gib": peak_memory_gib()}


def present(part: Part) -> ArtifactRef | None:
    """What the part left, if it was done. Raises StorageError when the root cannot be read."""
    return part.merge.store().find(part.step.kind, part.step.fingerprint)


def counted(merge: SpreadMerge, surveys: Sequence[ArtifactRef]) -> dict[int, int]:
    """Expert → the bin to open in the second round, from the first round of all shards."""
    with merge.job() as job:
        return opened_bins(job, _sum(merge, surveys))


def known_facts(merge: SpreadMerge) -> ArtifactRef | None:
    """The thresholds of an earlier run that did not come to its end."""
    return merge.store().find("facts", _step(merge, "facts", "facts").fingerprint)


def settle_facts(merge: SpreadMerge, first: Sequence[ArtifactRef], second: Sequence[ArtifactRef]) -> ArtifactRef:
    """Thresholds and means of whole experts, to the bit those of one process, from both rounds of all shards."""

    def build(folder: Path) -> BuildResult:
        with merge.job() as job:
            whole = whole_facts(job, _sum(merge, first), _sum(merge, second) if second else None)
        (folder / FACTS_FILE).write_text(whole.model_dump_json(), encoding="utf-8")
        return BuildResult(provenance={"platform": platform.platform()})

    return _produce(merge, _step(merge, "facts", "facts"), build)


def _facts(merge: SpreadMerge, ref: ArtifactRef) -> WholeFacts:
    return WholeFacts.model_validate_json((merge.store().local_path(ref) / FACTS_FILE).read_text(encoding="utf-8"))


def _sum(merge: SpreadMerge, surveys: Sequence[ArtifactRef]) -> Survey:
    store = merge.store()
    loaded = (Survey.load(store.local_path(ref) / SURVEY_FILE) for ref in surveys)
    return reduce(lambda total, one: Survey.sum([total, one]), loaded)


def assemble(merge: SpreadMerge, shards: Mapping[str, ArtifactRef]) -> ArtifactRef:
    """The merged model from its shards: their files by link or by a copy within S3, the rest made here, the record last."""
    store = merge.store()

    def build(folder: Path) -> BuildResult:
        records = {name: store.read_record(ref) for name, ref in shards.items()}
        with merge.job() as job:
            _, results = finish(job, folder, [Found.model_validate(record.results) for record in records.values()])
            provenance = {**engine.environment(merge.device), "sources": engine.sources(job.inputs)}
        companions = model_files(folder_files(folder))
        files = digest_files(folder, companions, cache=merge.here().cache) | {
            name: FileInfo(size=record.files[name], digest=record.provenance["digest"]) for name, record in records.items()
        }
        provenance |= {
            "recipe": engine.described(merge.recipe), "digest": combined_digest(files), "seconds": _seconds(records),
            "peak_memory_gib": max(record.provenance["peak_memory_gib"] for record in records.values()),
            "shards": {name: {key: record.provenance[key] for key in ("host", "pid", "device", "seconds")} for name, record in records.items()},
        }  # fmt: skip
        return BuildResult(
            results=results, provenance=provenance, taken={name: storage.join(ref.uri, name) for name, ref in shards.items()}
        )

    return _produce(merge, merge.step, build)


def _seconds(records: Mapping[str, Record]) -> float:
    """Of all machines together, as ``seconds/compress`` counts those of all experts."""
    return round(sum(float(record.provenance["seconds"]) for record in records.values()), 3)


def discard(merge: SpreadMerge, shards: Sequence[str]) -> None:
    """Delete what only the merge's own parts needed. The merged model has links to, or copies of, the shards' files."""
    store = merge.store()
    for part in (part for kind in ("survey", "recount", "merge") for part in shard_parts(merge, kind, shards)):
        if ref := present(part):
            store.delete(ref)
    if ref := known_facts(merge):
        store.delete(ref)


def missing_after(part: Part) -> ArtifactError:
    """What to say when a machine reports a part done and the root of this machine does not hold its output."""
    return jobs.missing_after(part.name, part.merge.where)
