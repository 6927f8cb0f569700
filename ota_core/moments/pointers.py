"""Files of a line that name the newest of several folders, such as ``latest``."""

from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.reading import read_file

_LONGEST = 4096
"""Bytes of such a file."""


def pointer(path: Path) -> str:
    """What the file names. Raises MomentsError where it cannot be read, or is too large to be one."""
    try:
        return read_file(path, _LONGEST).decode("utf-8", "replace").strip()
    except OSError as error:
        raise MomentsError(
            f"{path} cannot be read ({error.strerror or error}); the name of a folder beside it was expected"
        ) from None
