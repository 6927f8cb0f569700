"""Models that are made of several: a base with LoRA adapters on it, written ``base+adapter``, or an adapter on the recipe's base.

Nothing is merged here: what belongs together is found and named, and the engine makes the edit as it reads.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ota_core.errors import CheckpointError, OtaError, raise_all
from ota_core.files.checkpoint import GGUF, adapter_of
from ota_core.files.lora.config import AdapterConfig, read_config
from ota_core.plan.inputs import find_model
from tasks.storage import models as storage
from tasks.storage.cache import FileInfo, combined_digest
from tasks.storage.models import Fetched

PLUS = "+"
Fetch = Callable[[str], Fetched]


def locate(source: str, recipe_dir: Path | None) -> str:
    """A model's source with relative folders made absolute: beside the recipe, or in the working directory.

    What is no folder there (``s3://…``, ``org/name``) is returned as it is. Raises CheckpointError when two folders fit.
    """
    return PLUS.join(parts_of(source, recipe_dir))


def _located(source: str, recipe_dir: Path | None) -> str:
    if storage.is_s3(source) or Path(source).is_absolute():
        return source
    expanded = Path(source).expanduser()
    if expanded.suffix == GGUF and not expanded.is_absolute():
        file = next((place / source for place in (recipe_dir, Path.cwd()) if place and (place / source).is_file()), None)
        return source if file is None else str(file.absolute())
    if expanded.is_absolute() or any((place / source).is_dir() for place in (recipe_dir, Path.cwd()) if place):
        return str(expanded if expanded.is_absolute() else find_model(source, recipe_dir).absolute())
    return source


def parts_of(source: str, recipe_dir: Path | None) -> list[str]:
    """Where the parts of ``base+adapter`` lie, the base first; of any other source the one place.

    A folder whose own name contains ``+`` is that folder. Of several ways to cut a name the one whose parts are there counts. Raises
    CheckpointError.
    """
    if PLUS not in source or _is_there(source, recipe_dir):
        return [_located(source, recipe_dir)]
    cuts = [(source[:i], source[i + 1 :]) for i, letter in enumerate(source) if letter == PLUS and 0 < i < len(source) - 1]
    # What stands behind the last plus is the last adapter, unless the name of a folder there says otherwise.
    cuts.sort(key=lambda cut: (not _is_there(cut[1], recipe_dir), not _is_there(cut[0], recipe_dir), -len(cut[0])))
    if not cuts or (storage.is_s3(source) and not _names_a_model(cuts[0][1], recipe_dir)):
        return [_located(source, recipe_dir)]
    base, adapter = cuts[0]
    return [*parts_of(base, recipe_dir), _located(adapter, recipe_dir)]


def _is_there(source: str, recipe_dir: Path | None) -> bool:
    expanded = Path(source).expanduser()
    return not storage.is_s3(source) and any((place / expanded).exists() for place in (recipe_dir, Path.cwd()) if place)


def _names_a_model(source: str, recipe_dir: Path | None) -> bool:
    return storage.is_s3(source) or storage.is_hub_id(source) or _is_there(source, recipe_dir)


def composed(
    asked: Sequence[Sequence[str]], parts: Sequence[Fetched], fetch: Fetch, recipe_dir: Path | None, *, has_base: bool
) -> list[Fetched]:
    """The models of a recipe from their fetched parts. asked: the parts of every model, as ``parts_of`` gives them; parts: all of them in that
    order.

    An adapter that is named alone lies on the recipe's base, which comes first where ``has_base``; else on the model that it names itself,
    which is fetched. Raises OtaError with every problem.
    """
    rest, found, problems = iter(parts), list[Fetched](), list[str]()
    for places in asked:
        first, *adapters = [next(rest) for _ in places]
        try:
            model = (
                first
                if (config := _adapter(first)) is None
                else _alone(first, config, fetch, recipe_dir, found[:1] if has_base else [])
            )
            for adapter in adapters:
                model = on(adapter, model)
        except OtaError as error:
            problems += error.problems
            model = first
        found.append(model)
    raise_all(list(dict.fromkeys(problems)), CheckpointError)
    return found


def one_model(source: str, fetch: Fetch, base: Fetched | None = None) -> Fetched:
    """A single model from wherever its parts lie; an adapter that is named alone lies on ``base``, where that is given. Raises OtaError."""
    places = parts_of(source, None)
    found = [fetch(place) for place in places]
    if base is not None and len(places) == 1 and _adapter(found[0]) is not None:
        return on(found[0], base)
    return composed([places], found, fetch, None, has_base=False)[0]


def _adapter(one: Fetched) -> AdapterConfig | None:
    """The configuration of what was fetched, where that is an adapter. What is wrong with other models is said when they are opened."""
    adapter = None
    with suppress(CheckpointError):
        adapter = adapter_of(one.path)
    return read_config(one.path) if adapter is not None else None


def on(adapter: Fetched, base: Fetched) -> Fetched:
    """A base with an adapter on it. Raises CheckpointError where the second is none."""
    if _adapter(adapter) is None:
        raise CheckpointError(
            f"{adapter.source} is no LoRA adapter, and is named behind a '+' as the adapter of {base.source}; expected a folder with "
            "adapter_config.json and adapter_model.safetensors"
        )
    both = {"base": FileInfo(size=0, digest=base.digest), "adapter": FileInfo(size=0, digest=adapter.digest)}
    known = "not computed" not in (base.digest, adapter.digest)
    digest = combined_digest(both) if known else "not computed"
    return adapter.model_copy(update={"under": base, "digest": digest, "own_digest": adapter.digest})


def _alone(one: Fetched, config: AdapterConfig, fetch: Fetch, recipe_dir: Path | None, base: Sequence[Fetched]) -> Fetched:
    if base:
        return on(one, base[0])
    return on(one, named_base(one, config, fetch, recipe_dir))


def named_base(one: Fetched, config: AdapterConfig, fetch: Fetch, recipe_dir: Path | None) -> Fetched:
    """The model that an adapter says it was trained on. Raises CheckpointError where it names none, or that cannot be had."""
    how = f"name it: {{base}}{PLUS}{one.source}, or give the recipe a base_model"
    if config.base is None:
        raise CheckpointError(
            f"{one.source} is a LoRA adapter whose adapter_config.json names no base; {how.format(base='BASE')}"
        )
    try:
        found = fetch(_located(config.base, recipe_dir))
    except OtaError as error:
        raise CheckpointError(
            f"{one.source} is a LoRA adapter of {config.base}, which cannot be had ({error}); {how.format(base='BASE')}"
        ) from error
    if (inner := _adapter(found)) is not None:
        return on(found, named_base(found, inner, fetch, recipe_dir))
    return found
