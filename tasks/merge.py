"""Merging: all experts into one model, in one go, or in parts that machines share out.

Each part leaves an artifact, named by the merge's fingerprint and the part's own name, and is found there by whoever runs it again:

    sums      digests of what lies in S3, of which each part reads a part; only where parts run on other machines
    surveys   counts of one weight file's scores, first of their upper bits, then above and inside a bin; only where ``needs_survey``
    facts     thresholds and means of whole experts, from the sums of the surveys; then λ, from that of all matrices (``lambda: auto``)
    shards    one weight file of the output

Masks are not stored on this path: each shard applies the thresholds to its own tensors on the fly, which saves writing and reading a bit an
element. Masks that an earlier run left in the store are used, and save the surveys.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

from ota_core.artifact import ArtifactRef, Kind, Record, folder_files
from ota_core.compute.stream import Progress, parse_memory, peak_memory_gib
from ota_core.engine import engine, shards
from ota_core.engine.output import plan_files
from ota_core.engine.survey import Survey
from ota_core.errors import ArtifactError
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.plan.found import Found
from ota_core.plan.inputs import MergeInputs, merge_identity
from ota_core.plan.plan import open_plan
from ota_core.plan.prepare import WholeFacts
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Stage, Step
from tasks.artifacts.store import BuildResult, store_of
from tasks.merging.labels import merge_label
from tasks.merging.opened import opens
from tasks.merging.sources import MergeStage, Planned
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.storage.cache import FileInfo, combined_digest, digest_files, hash_file
from tasks.storage.layout import model_files
from tasks.storage.models import digest_folder

SURVEY_FILE = "survey.safetensors"
FACTS_FILE = "facts.json"
SCALES_FILE = "scales.json"
NOTES_FILE = "notes.json"


class MergeJob(MergeStage):
    """Merge the experts into one model, a complete Hugging Face folder."""

    kind: Literal["merge"] = "merge"
    shard_size: int

    @property
    def name(self) -> str:
        return f"merge {merge_label(self.recipe)}"[:200]

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            with self.opened(where) as inputs:
                report = engine.merge_into(
                    folder, self.recipe, inputs, memory=self.memory, device=device, shard_size=self.shard_size, progress=progress, opens=opens
                )  # fmt: skip
                if report.fingerprint != self.step.fingerprint:  # asked for by another machine
                    raise ArtifactError(
                        f"this machine would name the merge {report.fingerprint}, who asks for it {self.step.fingerprint}: their versions of "
                        "this package differ; install the same one on all machines"
                    )
                sources = engine.sources(inputs)
            provenance = {**engine.environment(device), "sources": sources, "recipe": engine.described(self.recipe)}
            # Hashed here, where the files were just written: nobody has to bring the model home to know what it is.
            provenance["digest"] = digest_folder(folder, cache=where.cache)[0]
            measured = {"seconds_per_stage": report.seconds, "peak_memory_gib": report.peak_memory_gib, "notes": report.notes}
            return BuildResult(results=report.results, provenance=provenance | measured)

        return self.produce(where, build)


def merge_job(plan: Planned, shard_size: int = MAX_SHARD_BYTES) -> MergeJob:
    """The merge of a plan, with the second moments and masks that it has."""
    step = merge_step(plan.recipe, plan.inputs, shard_size)
    return MergeJob(step=step, recipe=plan.recipe, sources=plan.sources, memory=plan.memory, shard_size=shard_size)


def merge_step(recipe: MergeRecipe, inputs: MergeInputs, shard_size: int = MAX_SHARD_BYTES) -> Step:
    """The merged model. The identity is the same for a fused, a staged and a spread merge. inputs: with the raw second moments."""
    identity, config, digests = merge_identity(recipe, inputs, shard_size)
    return Step(kind="merged", fingerprint=identity, config=config, inputs=digests)


def output_files(recipe: MergeRecipe, inputs: MergeInputs, shard_size: int) -> list[str]:
    """The merged model's weight files, by the inputs' headers. Raises OtaError with all that is wrong with the checkpoints."""
    with open_plan(recipe, inputs, with_moments=False) as plan:
        return [file for file, _ in plan_files(plan, shard_size)]


class Part(Stage):
    """A part of a merge."""

    merge: MergeJob

    def abroad(self) -> Self:
        return self.model_copy(update={"merge": self.merge.abroad()})

    @contextmanager
    def core(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> Iterator[shards.MergeInParts]:
        """The merge as the core takes it, its inputs opened on this machine. Raises OtaError."""
        with core(self.merge, where, device, progress) as job:
            yield job


@contextmanager
def core(
    merge: MergeJob, where: Places, device: str = "cpu", progress: Progress | None = None
) -> Iterator[shards.MergeInParts]:  # fmt: skip
    """A merge as the core takes it in parts. ``device`` matters to who reads tensors. Raises OtaError."""
    with merge.opened(where) as inputs:
        yield shards.MergeInParts(
            recipe=merge.recipe, inputs=inputs, shard_size=merge.shard_size, memory=merge.memory, device=device, progress=progress
        )  # fmt: skip


class SumsJob(Part):
    """Read one model in S3 once as a whole and compare it with the digest that somebody keeps: what parts read of it is compared with that."""

    kind: Literal["sums"] = "sums"
    model: int | None
    """Position of the expert; None: the base."""

    @property
    def name(self) -> str:
        sources = self.merge.sources
        one = sources.base if self.model is None else sources.experts[self.model]
        return f"check {one.name if one else 'base'}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            merge = self.merge
            full = merge.recipe.setting("mask_curvature") == "full"
            notes = merge.sources.check_whole(self.model, where, parse_memory(merge.memory), folder, raw_moments=full)
            (folder / NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")
            return BuildResult(results={"notes": notes}, provenance=_worker(device))

        return self.produce(where, build)


class SurveyJob(Part):
    """Count one weight file's scores."""

    kind: Literal["survey"] = "survey"
    shard: str
    opened: dict[int, int] | None = None
    """In the second round: expert → the bin that holds its threshold."""

    @property
    def name(self) -> str:
        return f"{'survey' if self.opened is None else 'recount'} {self.shard}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            with self.core(where, device, progress) as job:
                shards.survey(job, self.shard, opened=self.opened).save(folder / SURVEY_FILE)
            return BuildResult(provenance=_worker(device))

        return self.produce(where, build)


class FactsJob(Part):
    """Thresholds and means of whole experts, to the bit those of one process, from both rounds of all weight files."""

    kind: Literal["facts"] = "facts"
    first: tuple[ArtifactRef, ...]
    second: tuple[ArtifactRef, ...] = ()

    @property
    def name(self) -> str:
        return "thresholds"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            with self.core(where) as job:
                second = _sum(where, self.second) if self.second else None
                whole = shards.whole_facts(job, _sum(where, self.first), second)
            (folder / FACTS_FILE).write_text(whole.model_dump_json(), encoding="utf-8")
            return BuildResult(provenance={"platform": platform.platform()})

        return self.produce(where, build)


class ScalesJob(Part):
    """Find λ of one weight file's matrices."""

    kind: Literal["scales"] = "scales"
    shard: str
    facts: ArtifactRef | None
    """Where whole experts must be known."""

    @property
    def name(self) -> str:
        return f"scales {self.shard}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            with self.core(where, device, progress) as job:
                scales = shards.shard_scales(job, self.shard, _facts(where, self.facts))
            (folder / SCALES_FILE).write_text(json.dumps(scales), encoding="utf-8")
            return BuildResult(provenance=_worker(device))

        return self.produce(where, build)


class ScaledFactsJob(Part):
    """The facts with λ of the merge."""

    kind: Literal["scaled facts"] = "scaled facts"
    facts: ArtifactRef | None
    scales: tuple[ArtifactRef, ...]

    @property
    def name(self) -> str:
        return "lambda"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            scales = [json.loads((store_of(where).local_path(ref) / SCALES_FILE).read_text("utf-8")) for ref in self.scales]
            whole = shards.with_scales(_facts(where, self.facts), scales)
            (folder / FACTS_FILE).write_text(whole.model_dump_json(), encoding="utf-8")
            return BuildResult(provenance={"platform": platform.platform()})

        return self.produce(where, build)


def _facts(where: Places, ref: ArtifactRef | None) -> WholeFacts | None:
    if ref is None:
        return None
    return WholeFacts.model_validate_json((store_of(where).local_path(ref) / FACTS_FILE).read_text(encoding="utf-8"))


class ShardJob(Part):
    """Merge one weight file of the output."""

    kind: Literal["shard"] = "shard"
    shard: str
    facts: ArtifactRef | None
    """Where whole experts must be known."""

    @property
    def name(self) -> str:
        return f"merge {self.shard}"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            with self.core(where, device, progress) as job:
                found = shards.merge_shard(job, self.shard, folder, _facts(where, self.facts))
            # Hashed here, where the file was just written: nobody has to read it again to know what the merged model is.
            digest = "xxh3:" + hash_file(folder / self.shard)["xxh3"]
            return BuildResult(results=found.model_dump(mode="json"), provenance={**_worker(device), "digest": digest})

        return self.produce(where, build)


class AssembleJob(Part):
    """The merged model from its weight files: these by link or by a copy within S3, the rest made here, the record last."""

    kind: Literal["assemble"] = "assemble"
    shards: dict[str, ArtifactRef]

    @property
    def name(self) -> str:
        return "assemble"

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        store = store_of(where)

        def build(folder: Path) -> BuildResult:
            records = {name: store.read_record(ref) for name, ref in self.shards.items()}
            with self.core(where) as job:
                _, results, notes = shards.finish(
                    job, folder, [Found.model_validate(record.results) for record in records.values()], opens
                )
                provenance = {**engine.environment(device), "sources": engine.sources(job.inputs)}
            files = digest_files(folder, model_files(folder_files(folder)), cache=where.cache) | {
                name: FileInfo(size=record.files[name], digest=record.provenance["digest"]) for name, record in records.items()
            }
            made_by = ("host", "pid", "device", "seconds")
            provenance |= {
                "recipe": engine.described(self.merge.recipe), "digest": combined_digest(files), "seconds": _seconds(records), "notes": notes,
                "peak_memory_gib": max(record.provenance["peak_memory_gib"] for record in records.values()),
                "shards": {name: {key: record.provenance[key] for key in made_by} for name, record in records.items()},
            }  # fmt: skip
            taken = {name: storage.join(ref.uri, name) for name, ref in self.shards.items()}
            return BuildResult(results=results, provenance=provenance, taken=taken)

        return self.produce(where, build)


def shards_of(merge: MergeJob, where: Places) -> tuple[list[str], bool]:
    """(the output's weight files, whether they must be surveyed). Raises OtaError with everything that is wrong with the inputs."""
    with core(merge, where) as job:
        return shards.shard_files(job), shards.needs_survey(job.recipe, job.inputs)


def sums_jobs(merge: MergeJob) -> list[SumsJob]:
    """One for each model that lies in S3 and of which no copy is at hand."""
    return [SumsJob(merge=merge, step=_step(merge, "surveys", "sums", str(one)), model=one) for one in merge.sources.in_s3()]


def survey_jobs(merge: MergeJob, files: Sequence[str], opened: Mapping[int, int] | None = None) -> list[SurveyJob]:
    """The first round of all weight files, or with ``opened`` the second."""
    what = "survey" if opened is None else "recount"
    bins = None if opened is None else dict(opened)
    return [SurveyJob(merge=merge, step=_step(merge, "surveys", what, file), shard=file, opened=bins) for file in files]


def facts_job(merge: MergeJob, first: Sequence[ArtifactRef] = (), second: Sequence[ArtifactRef] = ()) -> FactsJob:
    """Of both rounds; without them it can be looked for."""
    return FactsJob(merge=merge, step=_step(merge, "facts", "facts"), first=tuple(first), second=tuple(second))


def scales_jobs(merge: MergeJob, files: Sequence[str], facts: ArtifactRef | None) -> list[ScalesJob]:
    """λ of the matrices of each weight file."""
    return [ScalesJob(merge=merge, step=_step(merge, "surveys", "scales", file), shard=file, facts=facts) for file in files]


def scaled_facts_job(merge: MergeJob, facts: ArtifactRef | None = None, scales: Sequence[ArtifactRef] = ()) -> ScaledFactsJob:
    """Of the facts so far and of all matrices; without them it can be looked for."""
    return ScaledFactsJob(merge=merge, step=_step(merge, "facts", "scaled facts"), facts=facts, scales=tuple(scales))


def shard_jobs(merge: MergeJob, files: Sequence[str], facts: ArtifactRef | None) -> list[ShardJob]:
    """One for each weight file."""
    return [ShardJob(merge=merge, step=_step(merge, "shards", "merge", file), shard=file, facts=facts) for file in files]


def assemble_job(merge: MergeJob, found: Mapping[str, ArtifactRef]) -> AssembleJob:
    """The whole model, of its weight files by name."""
    return AssembleJob(merge=merge, step=merge.step, shards=dict(found))


def counted(merge: MergeJob, where: Places, surveys: Sequence[ArtifactRef]) -> dict[int, int]:
    """Expert → the bin to open in the second round, from the first round of all weight files."""
    with core(merge, where) as job:
        return shards.opened_bins(job, _sum(where, surveys))


def discard(merge: MergeJob, where: Places, files: Sequence[str]) -> None:
    """Delete what only the merge's own parts needed. The merged model has links to, or copies of, the shards' files."""
    parts = [*survey_jobs(merge, files), *survey_jobs(merge, files, {}), *shard_jobs(merge, files, None), facts_job(merge)]
    parts += [*scales_jobs(merge, files, None), scaled_facts_job(merge), *sums_jobs(merge)]
    for part in parts:
        if ref := part.find(where):
            store_of(where).delete(ref)


def _step(merge: MergeJob, kind: Kind, what: str, shard: str = "") -> Step:
    return Step.of(kind, {"part": what, "shard": shard}, {"merge": merge.step.fingerprint})


def _worker(device: str) -> dict[str, Any]:
    return {**engine.environment(device), "pid": os.getpid(), "peak_memory_gib": peak_memory_gib()}


def _sum(where: Places, surveys: Sequence[ArtifactRef]) -> Survey:
    store = store_of(where)
    loaded = (Survey.load(store.local_path(ref) / SURVEY_FILE) for ref in surveys)
    return reduce(lambda total, one: Survey.sum([total, one]), loaded)


def _seconds(records: Mapping[str, Record]) -> float:
    """Of all machines together, as ``seconds/compress`` counts those of all experts."""
    return round(sum(float(record.provenance["seconds"]) for record in records.values()), 3)
