"""Small files from elsewhere (recipes, configurations, tokenizers, cards) as text and JSON, within limits; and what messages quote of them."""

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 512 * 2**20
"""Of a text file. The largest tokenizers and indices have some 40 MiB."""
MAX_DEPTH = 100
"""Levels of lists and mappings inside one another."""
MAX_AXES = 64
"""Of a tensor: as many as numpy and torch know."""
MAX_ROWS = 2**27
"""Of an embedding; the largest vocabularies have some 300,000 tokens."""
SMALL = 16 * 2**20
"""Bytes of a file that somebody wrote, or a program about one run: a manifest, a record, a card, a template."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Where JSON may hold half of a character (a surrogate alone), which no file and no terminal takes."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe, a device or a socket: opening one may wait for ever, and reading it may never end."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(f"{path} is a pipe, a device or a socket, expected a file")


def read_file(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a file that has at most ``most``. Raises OSError, also for anything but a file, and for a path that cannot be one."""
    try:
        check_regular(path)
        size = path.stat().st_size
        if size > most:
            raise OSError(f"it has {size} bytes, at most {most} are read")
        return path.read_bytes()
    except ValueError as error:  # NUL or a surrogate in the name
        raise OSError(f"its name is none that a file can have: {error}") from None


def read_text(path: Path, most: int = SMALL) -> str:
    """The text of a file that has at most ``most`` bytes. Raises OSError as ``read_file``, and for what is no UTF-8."""
    try:
        return read_file(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"byte {error.start} is not UTF-8") from None


def json_value(content: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError, which tells the place and quotes nothing, also where it is nested deeper than can be read
    or a text holds half of a character."""
    try:
        # json would take UTF-16, and bytes that stand for no character.
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"lists and objects are nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    if _HALF.search(text):
        _check_texts(value)
    return value


def _check_texts(value: Any) -> None:
    """Raise ValueError where a text holds half of a character."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += [*one, *one.values()]
        elif isinstance(one, list):
            pending += one
        elif isinstance(one, str) and _SURROGATE.search(one):
            raise ValueError("a text holds half of a character (\\ud800 to \\udfff alone)")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"lists and objects are nested deeper than {MAX_DEPTH} levels")


_shortened = reprlib.Repr()
_shortened.maxlist = _shortened.maxtuple = _shortened.maxdict = 8
_shortened.maxlevel, _shortened.maxstring, _shortened.maxother = 3, 120, 120


def quoted(value: object, most: int = 200) -> str:
    """A value as a message shows it, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 512:  # Python refuses to print some of these
        return f"an integer of {value.bit_length()} bits"
    try:
        plain = value is None or isinstance(value, str | bytes | int | float)
        # Objects in objects are cut, too: what shares its parts would be printed once for each.
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value) if plain else _shortened.repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def cut(text: str, most: int = 1000) -> str:
    """A line of a message, not longer than one reads."""
    return text if len(text) <= most else f"{text[:most]}…"


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, colours it, or turns the text around; tab and line feed are fine."""


def printable(text: str) -> str:
    """A text without what a terminal would obey: control characters and escapes appear as what Python writes for them."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
