"""YAML as recipes use it: numbers such as 1e-26 are numbers, a key written twice is an error."""

import difflib
import io
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ota_core.errors import RecipeError
from ota_core.reading import MAX_DEPTH, quoted, read_file

MAX_NODES = 100_000
"""Values that a YAML text may hold, what anchors bring counted each time that they bring it."""
MAX_TEXT = 16 * 2**20
"""Bytes of a YAML file."""
_KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """PyYAML speaks YAML 1.1, where 1e-26 is a string and 2026-02-28 a date; this loader reads floats, and no dates, as YAML 1.2 does.

    It takes texts, numbers, truth values, null, lists and mappings, and a limited number of them.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML has it
        first: [(tag, pattern) for tag, pattern in found if tag != _TIMESTAMP]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One value; the sizes of all are kept, for the anchors among them."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.events.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an anchor holds itself", mark)
            self._add(self._sizes[id(node)], mark)
            return node
        before, self._depth = self._count, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"values are nested deeper than {MAX_DEPTH} levels", mark)
        self._add(1, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._count - before
        return node

    def _add(self, count: int, mark: Any) -> None:
        self._count += count
        if self._count > MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"there are more than {MAX_NODES} values, with those that anchors repeat", mark
            )

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """What a value stands for. PyYAML lets whatever Python says of a number pass."""
        if node.tag not in _KINDS:
            raise _wrong("a tag (!) makes it a value of another kind than text, number, truth value, list and mapping", node)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError, AttributeError):
            raise _wrong(f"this is no {node.tag.rpartition(':')[2]} that can be read", node) from None
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _wrong("a text holds a character that no file name or text can have (NUL, a surrogate)", node)
        if isinstance(value, int) and value.bit_length() > 64:
            raise _wrong("a number has more than 64 bits", node)
        return value


def _wrong(problem: str, node: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _wrong("a tag calls it a mapping", node)
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: what it brings may be given again
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise _wrong(f"a key is a {type(key).__name__}, expected a word", key_node)
        if key in seen:
            raise _wrong(f"the key {quoted(key, 80)} appears twice", key_node)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds. Raises RecipeError with line and column when it is not YAML."""
    documents = parse_documents(text, where)
    if len(documents) > 1:
        raise RecipeError(f"{where} holds {len(documents)} documents (---), expected one")
    return documents[0] if documents else None


def parse_documents(text: str, where: str) -> list[Any]:
    """The values of all documents (``---``) that a YAML text holds, empty ones left out. Raises RecipeError with line and column."""
    try:
        found = list(yaml.load_all(_stream(text, where), _Loader))
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {_without_content(error)}{_hint(text)}") from None
    except (ValueError, OverflowError, RecursionError):  # PyYAML's scanner, of an escape that stands for no character
        raise RecipeError(f"{where} is not valid YAML: an escape such as \\U stands for no character") from None
    return [one for one in found if one is not None]


def _without_content(error: yaml.YAMLError) -> str:
    """Position and problem. The file may be any, named by mistake or on purpose: PyYAML quotes names of its anchors and tags."""
    said = str(error)
    return (
        said
        if isinstance(error, yaml.constructor.ConstructorError)
        else re.sub(r"(alias|anchor|handle|tag) '[^'\n]*'", r"\1 …", said)
    )


def _stream(text: str, where: str) -> io.StringIO:
    """The text under the name that PyYAML's messages call it by."""
    stream = io.StringIO(text.removeprefix("\ufeff"))
    stream.name = where
    return stream


def _hint(text: str) -> str:
    if any(line.lstrip(" ").startswith("\t") or line.startswith("\t") for line in text.splitlines()):
        return "; a line begins with a tab, YAML takes spaces"
    return ""


def lines_of(text: str, document: int = 0) -> dict[tuple[Any, ...], int]:
    """The line, from 1, of every key and entry of a document: the keys and positions that lead to it → its line."""
    nodes = list(yaml.compose_all(text.removeprefix("\ufeff"), _Loader))
    nodes = [node for node in nodes if not (isinstance(node, yaml.ScalarNode) and node.value == "")]
    found: dict[tuple[Any, ...], int] = {}
    if document < len(nodes):
        _walk(nodes[document], (), found)
    return found


def _walk(node: Any, path: tuple[Any, ...], found: dict[tuple[Any, ...], int]) -> None:
    if len(path) > 32:  # an anchor may hold itself
        return
    if isinstance(node, yaml.MappingNode):
        # What << brings stands where its anchor does; a key beside it wins.
        merged = [pair for pair in node.value if pair[0].value == "<<"]
        for key, value in [*merged, *(pair for pair in node.value if pair[0].value != "<<")]:
            if key.value == "<<":
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _walk(one, path, found)
                continue
            found[*path, key.value] = key.start_mark.line + 1
            _walk(value, (*path, key.value), found)
    elif isinstance(node, yaml.SequenceNode):
        for i, one in enumerate(node.value):
            found[*path, i] = one.start_mark.line + 1
            _walk(one, (*path, i), found)


def line_of(path: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int]) -> int | None:
    """The line of a place, or of what holds it where the file spells it otherwise; None where the file has neither."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def load_yaml(path: Path) -> Any:
    """The value that a YAML file holds. Raises RecipeError when the file is missing or not YAML."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises RecipeError when it is missing or no text."""
    try:
        return read_file(path, MAX_TEXT).decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read as text: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{quoted(str(path))} cannot be read as text: {error.strerror or error}") from None


def dump_yaml(value: Any) -> str:
    """YAML text in the order of the keys, readable again by ``parse_yaml``."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


def as_comment(lines: Iterable[str]) -> str:
    """Lines as YAML comments, each on one line whatever it holds."""
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def nearest(key: str, known: Iterable[str]) -> str:
    """A phrase that suggests the known key nearest to a mistyped one."""
    names = sorted(known)
    close = difflib.get_close_matches(key[:200], names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(names)}"
