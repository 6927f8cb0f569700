"""The inputs of a merge as something that travels between machines: where each file lies and what it is, never an open file.

``MergeSources.of`` describes inputs, ``MergeSources.opened`` makes inputs of the description on the machine that reads them. The machine
that fetched a model reads its own copy. Elsewhere what lies in S3 is read there by ranges; a folder must be one that every machine sees; a
Hugging Face id is fetched into the machine's own cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import parse_memory
from ota_core.errors import ArtifactError, CheckpointError, MomentsError, StorageError
from ota_core.files.checkpoint import GGUF, weight_files
from ota_core.frozen import Frozen
from ota_core.moments import find_moments, moments_files
from ota_core.plan.expert_scales import scales_digest
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Stage
from tasks.artifacts.store import store_of
from tasks.merging.architecture import parameter_layout
from tasks.merging.gguf_companions import gguf_companions, loaded_of
from tasks.merging.inputs import Estimate, assemble, s3_moments
from tasks.settings import Places, allow_path
from tasks.storage import models as storage
from tasks.storage.models import Fetched
from tasks.storage.streaming.streams import Streams
from tasks.storage.watch import identity_of_source

MOMENTS_FILE = "moments.safetensors"
MASK_FILE = "mask.safetensors"


class ModelSource(Frozen):
    """A checkpoint and where it lies."""

    name: str
    source: str
    """What the recipe calls it."""
    location: str
    """``s3://bucket/prefix``, an absolute folder, or ``org/name@commit``."""
    listing: str | None = None
    """In S3, what the prefix held when the merge began (``identity_of_source``): another listing is another model."""
    digest: str | None = None
    path: Path | None = None
    """The model's folder on the machine that fetched it; None elsewhere."""
    under: "ModelSource | None" = None
    """What it is an adapter of."""

    def abroad(self) -> Self:
        """The same for another machine."""
        return self.model_copy(update={"path": None, "under": self.under and self.under.abroad()})


class ExpertSource(ModelSource):
    """An expert, and where what belongs to it lies."""

    capability: str | None = None
    moments: str | None = None
    """Second moments as training left them, where they are not what the expert's own folder holds: a path or ``s3://…``."""
    moments_path: Path | None = None
    """The same on the machine that fetched the expert."""
    moments_digest: str | None = None
    needs_moments: bool = False
    base: ModelSource | None = None
    """What it was trained from: where training froze parameters, the weights that differ say which have second moments."""
    compressed: ArtifactRef | None = None
    """The second moments as the merge reads them; None before the compression."""
    masks: ArtifactRef | None = None

    def abroad(self) -> Self:
        """The same for another machine."""
        there = super().abroad()
        return there.model_copy(update={"moments_path": None, "base": self.base and self.base.abroad()})

    @contextmanager
    def opened(self, where: Places, memory: int) -> Iterator[ExpertInput]:
        """The expert alone on this machine, with its second moments as training left them. Raises OtaError."""
        with MergeSources(base=None, experts=(self,)).opened(where, memory, raw_moments=True) as inputs:
            yield inputs.experts[0]


class ScalesSource(Frozen):
    """The recipe's file of scales and where it lies."""

    location: str
    """``s3://…`` or an absolute path."""
    digest: str
    path: Path | None = None
    """The file on the machine that fetched it; None elsewhere."""

    def abroad(self) -> Self:
        """The same for another machine."""
        return self.model_copy(update={"path": None})


class MergeSources(Frozen):
    """Base and experts, in the recipe's order."""

    base: ModelSource | None
    experts: tuple[ExpertSource, ...]
    scales: ScalesSource | None = None
    sums: tuple[ArtifactRef, ...] = ()
    """Digests of what machines read parts of in S3 (``check_whole``)."""

    @staticmethod
    def of(
        recipe: MergeRecipe, inputs: MergeInputs, fetched: Sequence[Fetched], *, streamed: bool = False,
        estimated: Mapping[int, Estimate] | None = None,
    ) -> "MergeSources":  # fmt: skip
        """``fetched``: base first, what the inputs were assembled from; ``streamed``: of what lies in S3 there are only outlines here."""
        places = [_place(one, streamed) for one in fetched]
        base = None
        if inputs.base is not None:
            base = ModelSource(name=inputs.base.name, source=inputs.base.source, digest=inputs.base.digest, **places.pop(0))
        experts = []
        for i, (entry, expert, place) in enumerate(zip(recipe.models, inputs.experts, places, strict=True)):
            named = entry.parameters.preconditioner_path
            moments = named if named is None or storage.is_s3(named) else str(expert.moments)
            moments = estimated[i].address if estimated and i in estimated else moments
            experts.append(
                ExpertSource(
                    name=expert.name, source=expert.source, digest=expert.digest, capability=expert.capability, moments=moments,
                    moments_path=None if streamed else expert.moments, moments_digest=expert.moments_digest, needs_moments=expert.moments is not None,
                    base=base if expert.moments is not None else None, **place,
                )
            )  # fmt: skip
        scales = None
        if inputs.scales is not None:
            path = inputs.scales.absolute()
            location = recipe.scales if recipe.scales and storage.is_s3(recipe.scales) else str(path)
            scales = ScalesSource(location=location, digest=scales_digest(path), path=path)
        return MergeSources(base=base, experts=tuple(experts), scales=scales)

    def abroad(self) -> "MergeSources":
        """The same for another machine."""
        base, experts = self.base and self.base.abroad(), tuple(one.abroad() for one in self.experts)
        return self.model_copy(update={"base": base, "experts": experts, "scales": self.scales and self.scales.abroad()})

    def in_s3(self) -> list[int | None]:
        """The models of which something is read there by ranges: positions of experts, None for the base."""
        found: list[int | None] = [None] if self.base and self.base.path is None and storage.is_s3(self.base.location) else []
        for i, one in enumerate(self.experts):
            places = [one.location, one.moments, *(ref.uri for ref in (one.compressed, one.masks) if ref)]
            if one.path is None and any(place is not None and storage.is_s3(place) for place in places):
                found.append(i)
        return found

    def check_whole(self, model: int | None, where: Places, memory: int, folder: Path, *, raw_moments: bool) -> list[str]:
        """Read what a merge reads of one model in S3 as a whole, and leave digests for its parts in a folder (``Streams.check_whole``).

        Returns notes. Raises OtaError for what is not there, is not what it was, or is damaged.
        """
        with Streams(cache=where.cache, memory=memory) as streams:
            opening = _Opening(where, streams, raw_moments)
            if model is None:
                assert self.base is not None
                one: ModelInput = opening.model(self.base)
            else:
                one = opening.expert(self.experts[model])
            paths = [path for place in one.folders for path in weight_files(place)]
            if isinstance(one, ExpertInput):
                paths += [path for place in {one.moments, one.full_moments} if place for path in moments_files(place)]
                paths += [one.masks] if one.masks else []
            streams.check_whole(paths, folder)
            return streams.notes

    def with_artifacts(
        self, compressed: Sequence[ArtifactRef] = (), masks: Mapping[int, ArtifactRef] | None = None
    ) -> "MergeSources":
        """With the compressed second moments of the experts that have any, in their order, or the masks of experts by position."""
        refs, masks, experts = iter(compressed), masks or {}, []
        for i, one in enumerate(self.experts):
            given = {"compressed": next(refs)} if compressed and one.needs_moments else {}
            experts.append(one.model_copy(update=given | ({"masks": masks[i]} if i in masks else {})))
        return self.model_copy(update={"experts": tuple(experts)})

    @contextmanager
    def opened(self, where: Places, memory: int, *, raw_moments: bool = False) -> Iterator[MergeInputs]:
        """The inputs on this machine. ``raw_moments``: also where the compressed ones are all that a merge reads.

        ``memory``: the budget of what is done with them, bytes. Raises OtaError for what is not there, or not what it was.
        """
        sums = [store_of(where).local_path(ref) for ref in self.sums]
        with Streams(cache=where.cache, memory=memory, sums=sums) as streams:
            opening = _Opening(where, streams, raw_moments)
            base = opening.model(self.base) if self.base else None
            experts = tuple(opening.expert(one) for one in self.experts)
            yield MergeInputs(base=base, experts=experts, scales=opening.scales(self.scales))
            streams.verify()  # before who opened them publishes what they made


def _place(one: Fetched, streamed: bool) -> dict[str, Any]:
    """Where a model lies, as fields of ``ModelSource``."""
    under = one.under and ModelSource(
        name="base", source=one.under.source, digest=one.under.digest, **_place(one.under, streamed)
    )
    return {"location": one.resolved, "listing": _listing(one.resolved), "path": None if streamed else one.path, "under": under}


def _listing(location: str) -> str | None:
    return identity_of_source(location) if storage.is_s3(location) else None


class _Opening:
    """Turns addresses into paths of this machine. What lies in S3 is an outline here."""

    def __init__(self, where: Places, streams: Streams, raw_moments: bool) -> None:
        self._where, self._streams, self._raw = where, streams, raw_moments

    def model(self, one: ModelSource) -> ModelInput:
        source_of = self._streams.source_of
        under = self.model(one.under) if one.under else None
        folder = self._folder(one)
        return ModelInput(
            name=one.name, path=folder, source=one.source, digest=one.digest, source_of=source_of, under=under,
            companions=gguf_companions(folder, self._where.cache),
            parameters=loaded_of(under.folders[-1] if under else folder, self._where.cache, source_of),
        )  # fmt: skip

    def expert(self, one: ExpertSource) -> ExpertInput:
        folder = self._folder(one)
        raw = self._raw_moments(one, folder) if one.needs_moments and (self._raw or one.compressed is None) else None
        under = self.model(one.under) if one.under else None
        return ExpertInput(
            name=one.name, path=folder, source=one.source, digest=one.digest, source_of=self._streams.source_of, capability=one.capability,
            moments=self._artifact(one, one.compressed, MOMENTS_FILE) or raw, moments_digest=one.moments_digest, full_moments=raw,
            masks=self._artifact(one, one.masks, MASK_FILE), under=under,
            companions=gguf_companions(folder, self._where.cache),
            layout=partial(parameter_layout, folder, partial(self._folder, one.base) if one.base else None, self._streams.source_of),
            parameters=loaded_of(under.folders[-1] if under else folder, self._where.cache, self._streams.source_of),
        )  # fmt: skip

    def scales(self, one: ScalesSource | None) -> Path | None:
        if one is None:
            return None
        if one.path is not None:
            return one.path
        path = Path(one.location)
        if storage.is_s3(one.location):
            parent, _, name = one.location.rpartition("/")
            path = self._streams.files(parent, [name]) / name
        if scales_digest(path) != one.digest:
            raise StorageError(f"{one.location} (scales) is not what it was when the merge began; run the merge again")
        return path

    def _folder(self, one: ModelSource) -> Path:
        if one.path is not None:
            return one.path
        if storage.is_s3(one.location):
            if _listing(one.location) != one.listing:
                raise StorageError(f"{one.location} ({one.name}) is not what it was when the merge began; run the merge again")
            path = self._streams.model(one.location).path
            self._streams.settle(weight_files(path))
            return path
        if not Path(one.location).is_absolute() or (Path(one.location).is_file() and one.location.endswith(GGUF)):
            return storage.fetch(one.location, cache=self._where.cache).path
        if not Path(one.location).is_dir():
            raise CheckpointError(
                f"{one.location} ({one.name}) is no folder on this machine; machines that share a merge must see its models in the same "
                "place: a shared folder or s3://…"
            )
        allow_path(one.location, "the model")
        return Path(one.location)

    def _raw_moments(self, one: ExpertSource, folder: Path) -> Path:
        path: Path | None
        if one.moments_path is not None:
            return one.moments_path
        if one.moments is None:
            path = find_moments(folder)
        elif storage.is_s3(one.moments):
            path = s3_moments(one.moments, self._where.cache, self._streams)
        else:
            path = Path(one.moments)
            allow_path(path, "the second moments")
        if path is None or not path.exists():
            raise MomentsError(
                f"expert '{one.name}': {path or folder} holds no second moments on this machine; machines that share a merge must see them "
                "in the same place: beside the weights, in a shared folder, or s3://…"
            )
        self._streams.settle(moments_files(path))
        return path

    def _artifact(self, one: ExpertSource, ref: ArtifactRef | None, file: str) -> Path | None:
        if ref is None:
            return None
        if one.path is not None:
            return store_of(self._where).local_path(ref) / file
        if storage.is_s3(ref.uri):
            return self._streams.files(ref.uri, [file]) / file
        path = Path(ref.uri) / file
        if not path.is_file():
            raise ArtifactError(
                f"{path} is not on this machine; machines that share a merge must see its artifacts in the same place: OTA_ARTIFACTS, or "
                "--artifacts, must be s3://… or a shared folder"
            )
        return path


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A merge before its stages run."""

    recipe: MergeRecipe
    inputs: MergeInputs
    """With second moments as training left them: these decide the fingerprints."""
    sources: MergeSources
    """What the stages read: with what those before have made."""
    memory: str
    """Budget of each stage."""

    def abroad(self) -> "Planned":
        """The same for other machines."""
        return replace(self, sources=self.sources.abroad())

    def with_artifacts(self, compressed: Sequence[ArtifactRef] = (), masks: Mapping[int, ArtifactRef] | None = None) -> "Planned":
        """The merge with compressed second moments, or masks."""
        return replace(self, sources=self.sources.with_artifacts(compressed, masks))


def planned(
    recipe: MergeRecipe, fetched: Sequence[Fetched], where: Places, recipe_dir: Path | None = None, *, memory: str = "2GiB",
    streams: Streams | None = None, estimated: Mapping[int, Estimate] | None = None,
) -> Planned:  # fmt: skip
    """A merge of models that were fetched, base first; ``streams`` as for ``fetch_all``, ``estimated`` as for ``assemble``. Raises OtaError."""
    inputs = assemble(recipe, fetched, cache=where.cache, recipe_dir=recipe_dir, streams=streams, estimated=estimated)
    sources = MergeSources.of(recipe, inputs, fetched, streamed=streams is not None, estimated=estimated)
    return Planned(recipe=recipe, inputs=inputs, sources=sources, memory=memory)


class MergeStage(Stage):
    """A stage that reads a merge's models."""

    recipe: MergeRecipe
    sources: MergeSources
    memory: str
    """Budget of this stage."""

    def opened(self, where: Places) -> AbstractContextManager[MergeInputs]:
        """The inputs on this machine. Raises OtaError."""
        full = self.recipe.setting("mask_curvature") == "full"
        return self.sources.opened(where, parse_memory(self.memory), raw_moments=full)

    def abroad(self) -> Self:
        """The same for another machine."""
        return self.model_copy(update={"sources": self.sources.abroad()})
