"""Which names of files from elsewhere (keys in S3, records, manifests, indices) may be joined to a folder of this machine."""

import re

LONGEST = 255
"""Bytes of one part of a path that Linux and macOS take."""


def why_unsafe(name: str) -> str | None:
    """What is wrong with a relative name with slashes between its parts, as a phrase; None where it names a file inside the folder."""
    if not name:
        return "it is empty"
    if name.startswith("/"):
        return "it is absolute"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "it holds a control character"
    if "\\" in name:
        return "it holds a backslash"
    for part in name.split("/"):
        if part in {"", ".", ".."}:
            return f"one of its parts is '{part}'"
        try:
            if len(part.encode()) > LONGEST:
                return f"one of its parts has more than {LONGEST} bytes"
        except UnicodeEncodeError:
            return "it is not valid Unicode"
    return None


def as_name(text: str) -> str:
    """A text as one part of a path, short enough to have an ending added; empty where the text is."""
    plain = re.sub(r"[\x00-\x1f\x7f/\\\ud800-\udfff]", "-", text)
    plain = "-" * len(plain) if plain in {".", ".."} else plain
    return plain.encode()[: LONGEST - 55].decode(errors="ignore")
