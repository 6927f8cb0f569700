"""YAML as recipes use it: numbers such as 1e-26 are numbers, a key written twice is an error."""

import difflib
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from ota_core.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML speaks YAML 1.1, where 1e-26 is a string; this loader reads floats as YAML 1.2 does."""


_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds. Raises RecipeError with line and column when it is not YAML."""
    try:
        loader = _Loader(text)
        loader.name = where  # what PyYAML's messages call the text
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from None


def load_yaml(path: Path) -> Any:
    """The value that a YAML file holds. Raises RecipeError when the file is missing or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}") from None
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """YAML text in the order of the keys, readable again by ``parse_yaml``."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


def as_comment(lines: Iterable[str]) -> str:
    """Lines as YAML comments, each on one line whatever it holds."""
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def nearest(key: str, known: Iterable[str]) -> str:
    """A phrase that suggests the known key nearest to a mistyped one."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(names)}"
