"""What a merge reads, as local files: the base, the experts, their second moments and, in a staged run, their masks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ota_core.artifact import EXPERT_JSON, fingerprint
from ota_core.errors import CheckpointError, MomentsError, OtaError, RecipeError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, adapter_of, read_json
from ota_core.files.layouts.stored import Loaded
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.moments import ParameterLayout, find_moments, none_found
from ota_core.moments.belongs import check_belongs
from ota_core.moments.match import Layout
from ota_core.names import as_name
from ota_core.plan.expert_scales import find_scales, scales_digest
from ota_core.plan.fit.manifest import odd_fact
from ota_core.recipe.methods import RESERVED_NAMES
from ota_core.recipe.recipe import MergeRecipe

LayoutOf = Callable[[Path, Path | None], ParameterLayout]
"""Gives the parameter layout of the model in a folder, with the folder of its base; needed for optimizer states that number parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A checkpoint: a folder on this machine; large files in it may be outlines whose bytes lie elsewhere (``source_of``)."""

    name: str
    path: Path
    source: str = ""
    """What the recipe calls it."""
    digest: str | None = None
    """Content digest where known."""
    source_of: SourceOf | None = None
    """Where the bytes of weights and second moments come from, if not from the files themselves."""
    parameters: Callable[[], Loaded] | None = None
    """Tensor to the parameter that it becomes when transformers loads the model: asked for where the names of models differ."""
    under: "ModelInput | None" = None
    """What the weights in ``path`` are an adapter of; None for a whole model."""
    companions: Path | None = None
    """A folder with the configuration and tokenizer that ``path`` lacks: those that a GGUF file holds itself."""

    @property
    def folders(self) -> list[Path]:
        """The model's own, and those of what lies under it."""
        return [self.path, *(self.under.folders if self.under else [])]

    def opened(self) -> Checkpoint:
        """The model's tensors, with an adapter's edits made. Raises CheckpointError."""
        if self.under is None:
            checkpoint = Checkpoint(self.path, self.source_of)
            checkpoint.known_as = (self.source,)
            if self.companions is not None:
                checkpoint.folders = (self.path, self.companions)
                checkpoint.config = read_json(self.companions / "config.json")
            return checkpoint
        from ota_core.files.lora.adapted import AdaptedCheckpoint

        base = self.under.opened()
        try:
            return AdaptedCheckpoint(base, self.path, self.source_of)
        except BaseException:
            base.close()
            raise


@dataclass(frozen=True, kw_only=True)
class ExpertInput(ModelInput):
    """An expert: its checkpoint, and what belongs to it."""

    capability: str | None = None
    moments: Path | None = None
    """Second moments, raw or compressed."""
    moments_digest: str | None = None
    full_moments: Path | None = None
    """Uncompressed second moments for ``mask_curvature: full`` when ``moments`` is compressed already."""
    masks: Path | None = None
    """Masks of an earlier stage; without them FFG masks are made on the fly."""
    layout: Layout = None
    """The parameter layout, or a function that builds it when an optimizer state numbers its parameters."""


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """All inputs of one merge, in the recipe's order."""

    base: ModelInput | None
    experts: tuple[ExpertInput, ...]
    scales: Path | None = None
    """The file of scales, where the recipe names one."""
    check: Callable[[], None] | None = None
    """To be called when everything is read, before what was made of it takes its name: raises OtaError where the bytes were not the inputs'."""

    @property
    def models(self) -> list[ModelInput]:
        """Base first, then the experts."""
        return [*([self.base] if self.base else []), *self.experts]

    def verify(self) -> None:
        """Call ``check`` where there is one. Raises OtaError."""
        if self.check is not None:
            self.check()


def expert_name(source: str, capability: str | None, label: str | None) -> str:
    """The label of an expert: the recipe's, else its capability, else the last part of its path without a revision.

    It also names files, so that what no file name may hold, such as a slash in a capability, becomes a dash.
    """
    return label or as_name(capability or "") or as_name(source.rstrip("/").rsplit("/", 1)[-1].split("@")[0]) or as_name(source)


def unique_names(names: list[str]) -> list[str]:
    """The names with a number behind each that repeats an earlier one, or that is kept for another model."""
    result: list[str] = []
    for name in names:
        free = (
            label
            for label in (name, *(f"{name}-{i}" for i in range(2, len(names) + 3)))
            if label not in {*result, *RESERVED_NAMES}
        )
        result.append(next(free))
    return result


def find_preconditioner(path: str, expert: Path, recipe_dir: Path | None) -> Path | None:
    """The file or folder a relative ``preconditioner_path`` means: in the expert's folder, beside the recipe, in the working directory.

    Raises RecipeError when different places hold different files of that name. None when no place holds it.
    """
    places = [expert, *([recipe_dir] if recipe_dir else []), Path.cwd()]
    hits = {(place / path).resolve(): place / path for place in places if (place / path).exists()}
    if len(hits) > 1:
        raise RecipeError(
            f"preconditioner_path '{path}' is found in {len(hits)} places ({', '.join(str(hit) for hit in hits.values())}); "
            "give the full path of the one that is meant"
        )
    return next(iter(hits.values()), None)


def find_model(source: str, recipe_dir: Path | None) -> Path:
    """The folder a recipe's relative model path means: beside the recipe, or in the working directory. Raises CheckpointError."""
    places = [*([recipe_dir] if recipe_dir else []), Path.cwd()]
    hits = {(place / source).resolve(): place / source for place in places if (place / source).is_dir()}
    if len(hits) > 1:
        raise CheckpointError(
            f"model '{source}' is found in {' and in '.join(str(h) for h in hits.values())}; give the full path of the one that is meant"
        )
    if not hits:
        raise CheckpointError(
            f"model '{source}' does not exist (looked in {', '.join(str(p) for p in places)}); expected a checkpoint folder"
        )
    return next(iter(hits.values()))


def expert_facts(folder: Path) -> dict[str, Any]:
    """The content of ``expert.json``, or nothing where there is none."""
    found = read_json(folder / EXPERT_JSON) if (folder / EXPERT_JSON).exists() else {}
    if odd := odd_fact(found):
        raise CheckpointError(f"{folder / EXPERT_JSON}: {odd}; write it again")
    return found


def optimizer_facts(folder: Path) -> dict[str, Any]:
    """What ``expert.json`` adds to second moments: step and β₂, which the digest of the weights does not cover."""
    return {key: value for key, value in expert_facts(folder).items() if key in {"step", "beta2"}}


def resolve_local(recipe: MergeRecipe, recipe_dir: Path | None = None, layout_of: LayoutOf | None = None) -> MergeInputs:
    """The inputs of a recipe whose models are all folders on this machine. Raises OtaError with every input that is not there."""
    problems: list[str] = []
    found: list[Path] = []
    for source in [*([recipe.base_model] if recipe.base_model else []), *(entry.model for entry in recipe.models)]:
        try:
            found.append(find_model(source, recipe_dir))
        except CheckpointError as error:
            problems.append(str(error))
    raise_all(problems, CheckpointError)
    base = ModelInput(name="base", path=found.pop(0), source=recipe.base_model or "") if recipe.base_model else None
    facts = [expert_facts(folder) for folder in found]
    capabilities = [entry.capability or fact.get("capability") for entry, fact in zip(recipe.models, facts, strict=True)]
    labels = [expert_name(entry.model, cap, entry.name) for entry, cap in zip(recipe.models, capabilities, strict=True)]
    experts = []
    for i, (folder, name) in enumerate(zip(found, unique_names(labels), strict=True)):
        under = base if adapter_of(folder) is not None else None
        expert = ExpertInput(name=name, path=folder, source=recipe.models[i].model, capability=capabilities[i], under=under)
        layout = partial(layout_of, folder, base.path if base else None) if layout_of else None
        try:
            experts.append(with_moments(recipe, i, expert, recipe_dir, layout))
        except OtaError as error:
            problems.append(str(error))
    raise_all(problems, MomentsError)
    scales = find_scales(recipe.scales, recipe_dir) if recipe.scales else None
    return MergeInputs(base=base, experts=tuple(experts), scales=scales)


def with_moments(recipe: MergeRecipe, index: int, expert: ExpertInput, recipe_dir: Path | None, layout: Layout) -> ExpertInput:
    """The expert with the file of its second moments, as the recipe names it or as its folder holds it. Raises MomentsError."""
    if not recipe.needs_moments:
        return expert
    named = recipe.models[index].parameters.preconditioner_path
    path = find_preconditioner(named, expert.path, recipe_dir) if named else find_moments(expert.path)
    if path is None and named:
        raise MomentsError(
            f"expert '{expert.name}': preconditioner_path '{named}' does not exist (looked in {expert.path}, beside the recipe and here)"
        )
    if path is None:
        raise MomentsError(f"expert '{expert.name}': {none_found(expert.path)}. Name the file with preconditioner_path")
    check_belongs(path, expert.path)
    return replace(expert, moments=path, layout=layout)


def merge_identity(
    recipe: MergeRecipe, inputs: MergeInputs, shard_size: int = MAX_SHARD_BYTES
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(fingerprint, parameters, input digests) of the merged model: what decides its bytes, and nothing else.

    ``shard_size`` decides which file a tensor lies in, never its values.
    """
    names = [expert.name for expert in inputs.experts]
    tokenizer = recipe.tokenizer_source.removeprefix("model:")
    config = recipe.effective() | {"tokenizer_source": names.index(tokenizer) if tokenizer in names else tokenizer}
    if recipe.setting("bias_correction"):
        config["optimizers"] = [optimizer_facts(expert.path) for expert in inputs.experts]
    if shard_size != MAX_SHARD_BYTES:
        config["shard_size"] = shard_size
    digests: dict[str, str] = {}
    if inputs.scales is not None:
        config["scales"] = names  # an expert's coefficients are found by its name
        digests["scales"] = scales_digest(inputs.scales)
    if inputs.base is not None:
        digests["base"] = inputs.base.digest or "unknown"
    for i, expert in enumerate(inputs.experts):
        digests[f"expert{i}"] = expert.digest or "unknown"
        if expert.moments is not None and expert.moments_digest is not None:
            digests[f"moments{i}"] = expert.moments_digest
    return fingerprint("merged", config, digests), config, digests
