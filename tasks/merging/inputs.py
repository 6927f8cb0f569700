"""From a recipe to a merge's inputs: fetch or stream every model, find every expert's second moments, know every digest."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ota_core.compute.stream import Progress
from ota_core.errors import CheckpointError, MomentsError, OtaError, StorageError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import weight_files
from ota_core.moments import find_moments, moments_files, none_found
from ota_core.moments.belongs import check_belongs
from ota_core.moments.safetensors_file import open_file
from ota_core.plan.expert_scales import find_scales
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput, expert_name, find_preconditioner, unique_names
from ota_core.plan.plan import checkpoint_problems
from ota_core.recipe.recipe import MergeRecipe
from tasks.merging.architecture import parameter_layout
from tasks.merging.composed import composed, parts_of
from tasks.merging.gguf_companions import gguf_companions, loaded_of
from tasks.settings import allow_path
from tasks.storage import hub, s3
from tasks.storage import models as storage
from tasks.storage.cache import FileInfo, combined_digest, digest_files
from tasks.storage.layout import folder_model_files, read_expert_json
from tasks.storage.models import Fetched
from tasks.storage.streaming.streams import Streams

MOMENTS_OF_WEIGHTS = "exp_avg_sq.safetensors"
"""Second moments beside an adapter that are of the weights."""


@dataclass(frozen=True)
class Estimate:
    """Second moments that were estimated (tasks/evaluation/gradients/job.py)."""

    path: Path
    """Their file on this machine."""
    address: str
    """Where other machines find it."""
    digest: str
    """What they are known by: of weights, texts and settings."""


def model_sources(recipe: MergeRecipe, recipe_dir: Path | None) -> list[list[str]]:
    """Where the recipe's models lie, base first; of each its parts (``parts_of``)."""
    named = [*([recipe.base_model] if recipe.base_model else []), *(entry.model for entry in recipe.models)]
    return [parts_of(source, recipe_dir) for source in named]


def fetch_all(
    recipe: MergeRecipe,
    *,
    cache: Path,
    recipe_dir: Path | None,
    progress: Progress | None = None,
    streams: Streams | None = None,
    digests: bool = True,
) -> list[Fetched]:
    """Every model of a recipe on this machine, base first; ``progress`` is told of each by itself.

    With ``streams``, of what lies in S3 only outlines; all else is fetched. ``digests=False`` leaves local folders unhashed.
    Raises StorageError that lists every model that cannot be had.
    """

    def one(source: str) -> Fetched | OtaError:
        try:
            if streams is not None and storage.is_s3(source):
                return streams.model(source)
            if not digests and Path(source).is_dir():
                return _unhashed(source)
            tell = partial(progress, f"fetch {source}") if progress else None
            fetched = storage.fetch(source, cache=cache, progress=tell)
            if streams is not None and not Path(source).expanduser().is_dir():
                streams.notes.append(f"{source} is a Hugging Face id: downloaded to {fetched.path}")
            return fetched
        except OtaError as error:
            return error

    asked = model_sources(recipe, recipe_dir)
    with s3.Threads(4) as pool:
        results = list(pool.map(one, [part for parts in asked for part in parts]))
    raise_all([str(result) for result in results if isinstance(result, OtaError)], StorageError)

    def again(source: str) -> Fetched:
        found = one(source)
        if isinstance(found, OtaError):
            raise found
        return found

    models = [result for result in results if isinstance(result, Fetched)]
    return composed(asked, models, again, recipe_dir, has_base=recipe.base_model is not None)


def _unhashed(source: str) -> Fetched:
    """A local folder as ``storage.fetch`` gives it, but for the digests: they would read every byte."""
    folder = Path(source)
    files = {name: FileInfo(size=(folder / name).stat().st_size, digest="not computed") for name in folder_model_files(folder)}
    manifest = folder / storage.EXPERT_JSON
    expert = read_expert_json(manifest) if manifest.is_file() else None
    return Fetched(source=source, resolved=str(folder.resolve()), path=folder, digest="not computed", files=files, expert=expert)


def assemble(
    recipe: MergeRecipe,
    fetched: Sequence[Fetched],
    *,
    cache: Path,
    recipe_dir: Path | None,
    streams: Streams | None = None,
    digests: bool = True,
    estimated: Mapping[int, Estimate | None] | None = None,
) -> MergeInputs:
    """The inputs of a merge from its fetched models, base first; ``streams`` as for ``fetch_all``.

    estimated: position to the second moments that were estimated, None where they are yet to be. ``digests=False`` leaves the digests of second moments out: planning reads none. Raises MomentsError that lists every expert without
    second moments, and what is wrong with the checkpoints beside that.
    """
    models = list(fetched)
    source_of = streams.source_of if streams else None
    if streams is not None:
        for one in models:
            for part in parts_in(one):
                with suppress(CheckpointError):  # said with all else that is wrong when the checkpoints are opened
                    streams.settle(weight_files(part.path))
        raise_all(streams.notes if streams.unread else [], StorageError)
    base = None
    if recipe.base_model is not None:
        first = models.pop(0)
        base = ModelInput(
            name="base", path=first.path, source=recipe.base_model, digest=first.digest, source_of=source_of,
            under=_under(first.under, source_of, cache), companions=gguf_companions(first.path, cache),
            parameters=loaded_of(_whole(first).path, cache, source_of),
        )  # fmt: skip
    experts: list[ExpertInput] = []
    problems: list[str] = []
    for i, (one, (name, capability)) in enumerate(zip(models, expert_labels(recipe, models), strict=True)):
        expert = ExpertInput(
            name=name, path=one.path, source=recipe.models[i].model, digest=one.digest, capability=capability,
            layout=partial(parameter_layout, one.path, base.path if base else None, source_of), source_of=source_of,
            under=_under(one.under, source_of, cache), companions=gguf_companions(one.path, cache),
            parameters=loaded_of(_whole(one).path, cache, source_of),
        )  # fmt: skip
        if estimated and i in estimated:
            made = estimated[i]
            experts.append(expert if made is None else replace(expert, moments=made.path, moments_digest=made.digest))
            continue
        try:
            experts.append(_with_moments(recipe, i, expert, one, cache, recipe_dir, digests, streams))
        except OtaError as error:
            problems += error.problems
            experts.append(expert)
    inputs = MergeInputs(
        base=base,
        experts=tuple(experts),
        scales=scales_file(recipe, cache, recipe_dir, streams),
        check=streams.verify if streams else None,
    )
    if problems:
        raise_all([*problems, *checkpoint_problems(recipe, inputs)], MomentsError)
    return inputs


def parts_in(model: Fetched) -> list[Fetched]:
    """What a model is made of: itself, and what lies under an adapter."""
    return [model, *(parts_in(model.under) if model.under else [])]


def _whole(model: Fetched) -> Fetched:
    """The model itself, or what an adapter, or several, lie on: its names are those of the tensors."""
    return model if model.under is None else _whole(model.under)


def _under(model: Fetched | None, source_of: SourceOf | None, cache: Path) -> ModelInput | None:
    if model is None:
        return None
    return ModelInput(
        name="base", path=model.path, source=model.source, digest=model.digest, source_of=source_of,
        under=_under(model.under, source_of, cache), companions=gguf_companions(model.path, cache),
    )  # fmt: skip


def own_moments(model: Fetched) -> Path | None:
    """The second moments in a model's folder. Beside an adapter only those of the weights count, which were estimated: a trainer's state there
    is of the factors A and B. Raises MomentsError."""
    found = find_moments(model.path) if model.under is None else model.path / MOMENTS_OF_WEIGHTS
    return found if found is not None and found.exists() else None


def expert_labels(recipe: MergeRecipe, models: Sequence[Fetched]) -> list[tuple[str, str | None]]:
    """Name and capability of every expert, in the recipe's order. models: the experts as they were fetched."""
    capabilities = [
        entry.capability or (one.expert or {}).get("capability") for entry, one in zip(recipe.models, models, strict=True)
    ]
    labels = [expert_name(entry.model, cap, entry.name) for entry, cap in zip(recipe.models, capabilities, strict=True)]
    return list(zip(unique_names(labels), capabilities, strict=True))


def estimated_ones(recipe: MergeRecipe, models: Sequence[Fetched]) -> list[int]:
    """Positions of the experts whose second moments are to be estimated. models: the experts as they were fetched.

    Those of all experts that name no file of their own, as soon as one has none: what was estimated and what training left do not
    compare. Nobody's where the recipe does not ask for it. Raises MomentsError for a folder with several second moments.
    """
    if recipe.estimates is None:
        return []
    unnamed = [i for i, entry in enumerate(recipe.models) if entry.parameters.preconditioner_path is None]
    return unnamed if recipe.estimates.replace or any(own_moments(models[i]) is None for i in unnamed) else []


def scales_file(recipe: MergeRecipe, cache: Path, recipe_dir: Path | None, streams: Streams | None = None) -> Path | None:
    """The recipe's file of scales on this machine, None where it names none. Raises RecipeError, StorageError."""
    if recipe.scales is None:
        return None
    if not storage.is_s3(recipe.scales):
        found = find_scales(recipe.scales, recipe_dir)
        allow_path(found, "the file of scales")
        return found
    parent, _, name = recipe.scales.rpartition("/")
    if streams is not None:
        return streams.files(parent, [name]) / name
    return storage.download_folder(parent, cache=cache, names=[name])[0] / name


def _with_moments(
    recipe: MergeRecipe,
    index: int,
    expert: ExpertInput,
    fetched: Fetched,
    cache: Path,
    recipe_dir: Path | None,
    digests: bool,
    streams: Streams | None,
) -> ExpertInput:
    if not recipe.needs_moments:
        return expert
    named = recipe.models[index].parameters.preconditioner_path
    path = _named_moments(named, expert, cache, recipe_dir, streams) if named else own_moments(fetched)
    if fetched.under is not None:
        _check_of_weights(expert, path, streams)
    if path is None:
        where = expert.source if storage.is_s3(expert.source) else expert.path
        raise MomentsError(
            f"expert '{expert.name}': {none_found(where)}. Name the file with preconditioner_path, or have second moments estimated: missing_curvature: "
            "estimate"
        )
    if streams is not None:
        streams.settle(moments_files(path))
    if digests:  # planning reads no weights
        check_belongs(path, expert.path, expert.source_of)
    inside = path.is_relative_to(expert.path) and path.relative_to(expert.path).as_posix() in fetched.files
    if (inside and named is None) or not digests:
        return replace(expert, moments=path)
    return replace(expert, moments=path, moments_digest=moments_digest(path, cache, streams))


def _check_of_weights(expert: ExpertInput, path: Path | None, streams: Streams | None) -> None:
    """Raises MomentsError where an adapter has no second moments of the weights that it edits."""
    if path is not None and path.suffix == ".safetensors" and path.is_file():
        if streams is not None:
            streams.settle(moments_files(path))
        with open_file(path, expert.source_of) as file:
            of_factors = any("lora_" in name for name in file.infos)
        if not of_factors:
            return
    held = (
        f"{path} holds those of its factors A and B" if path is not None else "a trainer keeps those of its factors A and B alone"
    )
    raise MomentsError(
        f"expert '{expert.name}' is a LoRA adapter: {held}, from which those of the weights do not follow. Estimate them from gradients of "
        f"the weights: missing_curvature: estimate in the recipe, or `ota estimate {expert.source} --out exp_avg_sq.safetensors` and "
        "preconditioner_path"
    )


def _named_moments(named: str, expert: ExpertInput, cache: Path, recipe_dir: Path | None, streams: Streams | None) -> Path | None:
    """What ``preconditioner_path`` means: a file or folder in S3 or here, ``org/name`` or, as published recipes have it, ``org/name/path``; also ``org/name:path``."""
    if storage.is_s3(named):
        return s3_moments(named, cache, streams)
    found = find_preconditioner(named, expert.path, recipe_dir)
    if found is not None:
        if not found.is_relative_to(expert.path):
            allow_path(found, "preconditioner_path")
        return find_moments(found) if found.is_dir() else found
    repository = hub.repository_in(named)
    if repository is None:
        raise MomentsError(
            f"expert '{expert.name}': preconditioner_path '{named}' does not exist (looked in {expert.path}, beside the recipe and in {Path.cwd()})"
        )
    file = hub.fetch_moments(named, *repository)
    if streams is not None:
        streams.notes.append(f"{named} lies on the Hugging Face hub: downloaded to {file}")
    return file


def s3_moments(address: str, cache: Path, streams: Streams | None) -> Path | None:
    """A file of second moments in S3, or what a prefix there holds, as a file of this machine; with ``streams`` an outline of it.

    None where the prefix holds none. Raises StorageError where there is nothing.
    """
    parent, _, name = address.rstrip("/").rpartition("/")
    names = [name]
    if Path(name).suffix not in hub.FILES:
        parent = address.rstrip("/")
        names = [one for one in storage.find_objects(parent) if fnmatchcase(one, hub.MOMENTS)]
        if not names:
            return None
    folder = streams.files(parent, names) if streams is not None else storage.download_folder(parent, cache=cache, names=names)[0]
    return folder / name if names == [name] else find_moments(folder)


def moments_digest(path: Path, cache: Path, streams: Streams | None = None) -> str:
    """Digest of the files that hold second moments: of their content, or, of streamed ones, of their listing."""
    files = moments_files(path)
    parent = path if path.is_dir() else path.parent
    listed = streams.digest(files, parent) if streams else None
    if listed is not None:
        return listed
    return combined_digest(digest_files(parent, [file.relative_to(parent).as_posix() for file in files], cache=cache))
