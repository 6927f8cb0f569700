"""Small files from elsewhere (recipes, configurations, tokenizers, cards) as text and JSON, within limits; and what messages quote of them."""

import json
import os
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


def json_value(content: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError, which tells the place and quotes nothing, also where it is nested deeper than can be read."""
    try:
        value = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"lists and objects are nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    return value


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
