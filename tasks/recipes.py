"""Recipes and other YAML files from wherever they lie: a file of this machine or ``s3://…``."""

from pathlib import Path
from typing import Any

from ota_core.errors import RecipeError
from ota_core.recipe import MergeRecipe, parse_recipe
from ota_core.recipe_yaml import load_yaml, parse_yaml
from tasks.storage import is_s3, read_bytes


def read_yaml(uri: str) -> Any:
    """The content of a YAML file. Raises RecipeError for what is no YAML, StorageError for what cannot be read."""
    if not is_s3(uri):
        return load_yaml(Path(uri).expanduser())
    try:
        text = read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{uri} is no text ({error}); expected YAML in UTF-8") from None
    return parse_yaml(text, uri)


def read_recipe(uri: str) -> tuple[MergeRecipe, Path | None]:
    """A recipe, and the folder that its relative paths start from (none in S3). Raises RecipeError, StorageError."""
    folder = None if is_s3(uri) else Path(uri).expanduser().resolve().parent
    return parse_recipe(read_yaml(uri), uri), folder
