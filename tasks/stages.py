"""The stages of the merge as functions of typed references: each returns the artifact that holds its output.

They know nothing of Prefect; ``flows/merge.py`` wraps them as tasks. An artifact that is there is never computed again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import ArtifactRef, Kind, fingerprint
from ota_core.compute.stream import Progress
from ota_core.errors import ArtifactError, StorageError
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.merge import engine
from ota_core.merge.output import plan_files
from ota_core.plan.inputs import ExpertInput, MergeInputs, merge_identity, optimizer_facts
from ota_core.plan.plan import open_plan
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.evaluation.harness import score_model
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, SuiteError, digest_data, kept_identity, load_suite, score_identity
from tasks.merging.inputs import assemble
from tasks.merging.sources import MASK_FILE, MOMENTS_FILE
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.storage.models import Fetched, digest_folder, download_folder, is_s3
from tasks.storage.streaming.streams import Streams

SCORES_FILE = "scores.json"


class Step(BaseModel):
    """One stage's output before it is computed: what it will be, by its fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]

    @classmethod
    def of(cls, kind: Kind, config: dict[str, Any], inputs: dict[str, str]) -> "Step":
        """The step of an output that configuration and inputs decide."""
        return cls(kind=kind, fingerprint=fingerprint(kind, config, inputs), config=config, inputs=inputs)


def store_of(places: Places) -> ArtifactStore:
    """The store of this installation's artifacts."""
    return ArtifactStore(places.artifacts, places.cache)


def expert_digests(expert: ExpertInput) -> dict[str, str]:
    """What an expert's second moments are known by: the digest of their file, or of the folder that holds them."""
    return {"moments": expert.moments_digest or expert.digest or "unknown"}


def moments_step(recipe: MergeRecipe, expert: ExpertInput) -> Step:
    """Compressed second moments of one expert."""
    config: dict[str, Any] = {"method": recipe.setting("compression"), "optimizer": optimizer_facts(expert.path)}
    config |= _rank(recipe)
    return Step.of("moments", config, expert_digests(expert))


def _rank(recipe: MergeRecipe) -> dict[str, int]:
    """The rank where the compression has one; elsewhere it decides nothing and stales nothing."""
    rank = recipe.setting("rank")
    return {} if rank is None else {"rank": rank}


def compress(
    places: Places, step: Step, expert: ExpertInput, *, memory: str = "2GiB", progress: Progress | None = None
) -> ArtifactRef:
    """Compress one expert's second moments, or find them compressed."""

    def build(folder: Path) -> BuildResult:
        assert expert.moments is not None
        report = engine.compress_moments(
            expert.moments,
            folder / MOMENTS_FILE,
            method=step.config["method"],
            rank=step.config.get("rank"),
            layout=expert.layout,
            source_of=expert.source_of,
            memory=memory,
            progress=progress,
        )
        return BuildResult(results=report.model_dump(), provenance={"source": expert.source, "expert": expert.name})

    return store_of(places).produce("moments", step.fingerprint, config=step.config, inputs=step.inputs, build=build)


def with_compressed(places: Places, expert: ExpertInput, moments: ArtifactRef) -> ExpertInput:
    """The expert with its compressed second moments in place of the raw ones, which stay at hand for ``mask_curvature: full``."""
    folder = store_of(places).local_path(moments)
    return replace(expert, moments=folder / MOMENTS_FILE, full_moments=expert.moments)


def mask_inputs(recipe: MergeRecipe, inputs: MergeInputs, index: int) -> tuple[MergeRecipe, MergeInputs]:
    """The part of a merge that decides one expert's mask: base and expert, or all models where the vocabulary is joined from all."""
    if recipe.tokenizer_source != "base":
        return recipe, inputs
    return recipe.model_copy(update={"models": (recipe.models[index],)}), replace(inputs, experts=(inputs.experts[index],))


def mask_step(recipe: MergeRecipe, inputs: MergeInputs, index: int) -> Step:
    """FFG mask of one expert."""
    part, _ = mask_inputs(recipe, inputs, index)
    keys = ("scope", "metric", "mask_curvature", "compression", "bias_correction")
    config: dict[str, Any] = {key: recipe.setting(key) for key in keys} | _rank(recipe)
    config |= {key: recipe.setting(key, index) for key in ("density", "precond_threshold")}
    config |= {"tokenizer_source": recipe.tokenizer_source, "position": part.models.index(recipe.models[index])}
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


def mask(
    places: Places, step: Step, recipe: MergeRecipe, inputs: MergeInputs, index: int, *, memory: str = "2GiB", device: str = "cpu",
    progress: Progress | None = None,
) -> ArtifactRef:  # fmt: skip
    """FFG mask of one expert, from its compressed second moments, or the mask found in the store."""
    name = inputs.experts[index].name
    part_recipe, part_inputs = mask_inputs(recipe, inputs, index)

    def build(folder: Path) -> BuildResult:
        found = engine.mask(part_recipe, folder, inputs=part_inputs, only=name, memory=memory, device=device, progress=progress)
        (folder / f"{name}.safetensors").rename(folder / MASK_FILE)
        return BuildResult(results=found[name], provenance={"expert": name})

    return store_of(places).produce("masks", step.fingerprint, config=step.config, inputs=step.inputs, build=build)


def with_masks(places: Places, inputs: MergeInputs, masks: dict[int, ArtifactRef]) -> MergeInputs:
    """The inputs with the masks of these experts, by position."""
    store = store_of(places)
    experts = tuple(
        replace(expert, masks=store.local_path(masks[i]) / MASK_FILE) if i in masks else expert
        for i, expert in enumerate(inputs.experts)
    )  # fmt: skip
    return replace(inputs, experts=experts)


def merge_step(recipe: MergeRecipe, inputs: MergeInputs, shard_size: int = MAX_SHARD_BYTES) -> Step:
    """The merged model. The identity is the same for a fused, a staged and a spread merge. inputs: with the raw second moments."""
    identity, config, digests = merge_identity(recipe, inputs, shard_size)
    return Step(kind="merged", fingerprint=identity, config=config, inputs=digests)


def output_files(recipe: MergeRecipe, inputs: MergeInputs, shard_size: int) -> list[str]:
    """The merged model's weight files, by the inputs' headers. Raises OtaError with all that is wrong with the checkpoints."""
    with open_plan(recipe, inputs, with_moments=False) as plan:
        return [file for file, _ in plan_files(plan, shard_size)]


def merge(
    places: Places, step: Step, recipe: MergeRecipe, inputs: MergeInputs, *, shard_size: int = MAX_SHARD_BYTES, memory: str = "2GiB",
    device: str = "cpu", progress: Progress | None = None,
) -> ArtifactRef:  # fmt: skip
    """The merged model as a complete Hugging Face folder, from compressed second moments and masks, or found in the store."""

    def build(folder: Path) -> BuildResult:
        report = engine.merge_into(
            folder, recipe, inputs, memory=memory, device=device, shard_size=shard_size, progress=progress
        )  # fmt: skip
        if report.fingerprint != step.fingerprint:  # asked for by another machine
            raise ArtifactError(
                f"this machine would name the merge {report.fingerprint}, who asks for it {step.fingerprint}: their versions of this package "
                "differ; install the same one on all machines"
            )
        provenance = {**engine.environment(device), "sources": engine.sources(inputs), "recipe": engine.described(recipe)}
        # Hashed here, where the files were just written: nobody has to bring the model home to know what it is.
        provenance["digest"] = digest_folder(folder, cache=places.cache)[0]
        measured = {"seconds_per_stage": report.seconds, "peak_memory_gib": report.peak_memory_gib, "notes": report.notes}
        return BuildResult(results=report.results, provenance=provenance | measured)

    return store_of(places).produce("merged", step.fingerprint, config=step.config, inputs=step.inputs, build=build)


class Subject(BaseModel):
    """A model to be benchmarked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: str
    capability: str | None = None
    path: Path | None
    """Its folder on this machine; None for one that lies elsewhere, and is brought here when it is to be scored."""
    digest: str
    location: str | None = None
    """Where another machine finds it: ``s3://…``, ``org/name@commit`` or a folder that both see."""
    artifact: ArtifactRef | None = None
    """A model that this tool merged."""


def bring_model(subject: Subject, places: Places) -> Path:
    """The model on this machine, the same that whoever asks for its scores means. Raises ArtifactError, StorageError."""
    if subject.artifact is not None:
        return store_of(places).local_path(subject.artifact)
    if subject.location is None:
        raise StorageError(f"{subject.name}: the model lies in a folder of another machine; keep it in s3://…")
    fetched = storage.fetch(subject.location, cache=places.cache)
    if fetched.digest != subject.digest:
        raise StorageError(
            f"{subject.location} ({subject.name}) is not what it was when the run began: its digest is {fetched.digest}, expected "
            f"{subject.digest}; run again"
        )
    return fetched.path


def bring_data(data: str | None, places: Places) -> Path | None:
    """A suite's data as a folder of this machine. Raises StorageError."""
    if data is None or not is_s3(data):
        return Path(data).expanduser() if data else None
    return download_folder(data, cache=places.cache)[0]


def check_suite(suite: Suite, data_dir: Path | None, limit: int | None) -> None:
    """Raises SuiteError for what would stop the benchmark only after the merge: a limit below one, data that are missing."""
    if limit is not None and limit < 1:
        raise SuiteError(f"limit is {limit}; expected at least one document per task, or no limit")
    score_identity("", suite, digest_data(data_dir) if data_dir else None, limit=limit)


def score_step(subject: Subject, suite: Suite, data_dir: Path | None, limit: int | None) -> Step:
    """Scores of one model on one suite."""
    config, inputs = kept_identity(subject.digest, suite, digest_data(data_dir) if data_dir else None, limit=limit)
    return Step.of("scores", config, inputs)


def scores_wanted(suite: Suite, data_dir: Path | None, limit: int | None) -> str:
    """What decides the scores of any model: by this a search knows the trials that it kept."""
    return fingerprint("scores", *score_identity("", suite, digest_data(data_dir) if data_dir else None, limit=limit))


def score(
    places: Places, step: Step, subject: Subject, suite: str, data_dir: Path | None, limit: int | None, *, device: str = "cpu",
    progress: Progress | None = None,
) -> ArtifactRef:  # fmt: skip
    """Benchmark one model, or find its scores: no model is scored twice on the same suite, and none is fetched for scores that are there."""

    def build(folder: Path) -> BuildResult:
        path = subject.path or bring_model(subject, places)
        scores = score_model(path, load_suite(suite), data_dir=data_dir, device=device, limit=limit, progress=progress)
        (folder / SCORES_FILE).write_text(scores.model_dump_json(indent=1), encoding="utf-8")
        return BuildResult(
            results={"capabilities": scores.by_capability()}, provenance={"model": subject.name, "seconds": scores.seconds}
        )

    return store_of(places).produce("scores", step.fingerprint, config=step.config, inputs=step.inputs, build=build)


def read_scores(places: Places, ref: ArtifactRef) -> ModelScores:
    """The scores that an artifact holds."""
    folder = store_of(places).local_path(ref)
    return ModelScores.model_validate_json((folder / SCORES_FILE).read_text(encoding="utf-8"))


def merged_subject(places: Places, name: str, merged: ArtifactRef, *, benchmark: bool = True) -> Subject:
    """A merged model as something to benchmark; its digest is of its weights, configuration and tokenizer.

    Without a ``benchmark`` on this machine a model in S3 stays there if its record tells the digest: it was hashed where it was made.
    """
    store = store_of(places)
    known = store.read_record(merged).provenance.get("digest")
    if known and is_s3(merged.uri) and not benchmark:
        return Subject(name=name, role="merge", path=None, digest=known, artifact=merged)
    folder = store.local_path(merged)
    digest = known or digest_folder(folder, cache=places.cache)[0]
    return Subject(name=name, role="merge", path=folder, digest=digest, artifact=merged)


def inputs_of(
    recipe: MergeRecipe, fetched: list[Fetched], places: Places, recipe_dir: Path | None, streams: Streams | None = None
) -> MergeInputs:
    """The inputs of a merge from its fetched models."""
    return assemble(recipe, fetched, cache=places.cache, recipe_dir=recipe_dir, streams=streams)
