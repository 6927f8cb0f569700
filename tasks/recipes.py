"""Recipes and other YAML files from wherever they lie: a file of this machine or ``s3://…``."""

from pathlib import Path
from typing import Any

from ota_core.errors import RecipeError
from ota_core.recipe import MergeRecipe, parse_recipe
from ota_core.recipe_yaml import load_yaml, parse_yaml
from tasks.storage import is_s3, read_bytes

ROOT = Path(__file__).resolve().parents[1]


def find_file(path: str) -> Path:
    """A file of this machine; a relative path is looked up in the working directory, then where this package lies (``deployments/…``)."""
    given = Path(path).expanduser()
    return ROOT / given if not given.exists() and (ROOT / given).exists() else given


def read_yaml(uri: str) -> Any:
    """The content of a YAML file. Raises RecipeError for what is no YAML, StorageError for what cannot be read."""
    if not is_s3(uri):
        return load_yaml(find_file(uri))
    try:
        text = read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{uri} is no text ({error}); expected YAML in UTF-8") from None
    return parse_yaml(text, uri)


def read_recipe(uri: str) -> tuple[MergeRecipe, Path | None]:
    """A recipe, and the folder that its relative paths start from (none in S3). Raises RecipeError, StorageError."""
    folder = None if is_s3(uri) else find_file(uri).resolve().parent
    return parse_recipe(read_yaml(uri), uri), folder
