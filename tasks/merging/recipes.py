"""Recipes and other YAML files from wherever they lie: a file of this machine or ``s3://…``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ota_core.errors import OtaError, RecipeError, raise_all
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from ota_core.recipe.yaml_text import load_yaml, nearest, parse_yaml
from tasks.settings import allow_path
from tasks.storage.models import is_s3, read_bytes

M = TypeVar("M", bound=BaseModel)

ROOT = Path(__file__).resolve().parents[2]


def find_file(path: str) -> Path:
    """A file of this machine; a relative path is looked up in the working directory, then where this package lies (``deployments/…``)."""
    given = Path(path).expanduser()
    return ROOT / given if not given.exists() and (ROOT / given).exists() else given


def read_yaml(uri: str) -> Any:
    """The content of a YAML file. Raises RecipeError for what is no YAML, StorageError for what cannot be read."""
    if not is_s3(uri):
        path = find_file(uri)
        allow_path(path, "the file")
        return load_yaml(path)
    try:
        text = read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{uri} is no text ({error}); expected YAML in UTF-8") from None
    return parse_yaml(text, uri)


def parse_config(kind: type[M], raw: Any, where: str, error: type[OtaError] = RecipeError) -> M:
    """A configuration of this kind from what its YAML holds. Raises ``error`` with every problem: unknown keys with the nearest known,
    missing ones, values out of range, and what the kind's own checks say."""
    if not isinstance(raw, dict):
        needed = [name for name, field in kind.model_fields.items() if field.is_required()]
        raise error(f"{where}: expected a mapping with {', '.join(needed)}, got {type(raw).__name__}")
    try:
        return kind.model_validate(raw)
    except ValidationError as found:
        # A list with a wrong entry counts as one entry short, too.
        items = [item for item in found.errors() if not (item["type"] == "too_short" and item["input"])]
        raise_all([f"{where}: {line}" for item in items for line in _explain(kind, dict(item))], error)
        raise


def _explain(kind: type[BaseModel], item: dict[str, Any]) -> list[str]:
    """One pydantic problem in the file's own words."""
    location = item["loc"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).split("\n")
    if item["type"] == "missing":
        return [f"the key '{where}' is missing"]
    if item["type"] == "extra_forbidden":
        return [f"unknown key '{where}'; {nearest(str(location[-1]), _known_keys(kind, location[:-1]))}"]
    if item["type"] == "literal_error":
        return [f"{where}: unknown {item['input']!r}; expected {item['ctx']['expected']}"]
    return [f"{where}: got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"]


def _known_keys(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys of the mapping at a location: of the model that the annotations lead to."""
    parts = iter(location)
    for part in parts:
        if not isinstance(part, int):
            field = next(field for name, field in kind.model_fields.items() if part in {name, field.alias})
            if get_origin(field.annotation) is dict:
                next(parts, None)  # a key that the file's author chose
            kind = next(_models(field.annotation), kind)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def read_recipe(uri: str) -> tuple[MergeRecipe, Path | None]:
    """A recipe, and the folder that its relative paths start from (none in S3). Raises RecipeError, StorageError."""
    folder = None if is_s3(uri) else find_file(uri).resolve().parent
    return parse_recipe(read_yaml(uri), uri), folder
