"""The errors that a user can cause. The command line prints their message alone, without a traceback, and exits with code 2."""

import re
from collections.abc import Sequence
from typing import Literal

from ota_core.reading import cut, printable

_LONGEST, _LONGEST_LIST, _LEAST_OF_EACH, _AROUND = 16_000, 3_900, 500, 9
"""Characters of a message, of the problems that one message lists, what each of many may have, and its number and the line's end."""
_QUOTED, _NAME = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"[\d/\\]|\w\.\w")
"""What tells problems of one kind apart: what is quoted, and words that are numbers, paths, or names with dots."""
StorageReason = Literal["content", "missing", "changed", "denied", "unavailable"]


class OtaError(Exception):
    """Root of every expected failure. The message says what was seen, what was expected and what to do.

    It may quote names and values of anybody's files: what a terminal would obey is escaped, and what nobody reads is cut.
    """

    _problems: tuple[str, ...] = ()

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(printable(str(message)), _LONGEST))

    @property
    def problems(self) -> tuple[str, ...]:
        """Each problem by itself, for a list that joins those of several checks."""
        return self._problems or (str(self),)


class RecipeError(OtaError):
    """The recipe cannot be understood: unknown key, unknown method, value out of range."""


class CheckpointError(OtaError):
    """A checkpoint is missing, damaged, or does not fit the others."""


class MomentsError(OtaError):
    """Second moments are missing, damaged, not finite, negative, or cannot be matched to parameters."""


class StorageError(OtaError):
    """A remote or local location cannot be read, written or verified."""

    def __init__(self, message: str, *, reason: StorageReason = "content") -> None:
        super().__init__(message)
        self.reason = reason
        """Whose fault it is: that of what lies there (``content``, ``missing``), of its owner who is replacing it (``changed``) or keeps it
        closed (``denied``), or of the place itself (``unavailable``: nobody answers, bad credentials), which says nothing about what lies there."""


class ArtifactError(OtaError):
    """An artifact's record is missing, incomplete or does not fit its files."""


def raise_all(problems: Sequence[str], kind: type[OtaError] = OtaError) -> None:
    """Raise one error that lists every problem found; do nothing when there is none.

    Of more than one reads, the first of each kind come first to be shown, and the message says how many are left out.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise kind(problems[0])
    lines = _listed([printable(problem) for problem in problems])
    error = kind(f"{len(problems)} problems found:\n" + "\n".join(lines))
    error._problems = tuple(problems)
    raise error


def _listed(problems: list[str]) -> list[str]:
    longest = max(_LEAST_OF_EACH, _LONGEST_LIST // len(problems) - _AROUND)
    texts = [cut(problem, longest) for problem in problems]
    kinds = dict[str, int]()
    for place, text in enumerate(texts):
        kinds.setdefault(_kind(text), place)
    first = set(kinds.values())
    shown, room = set[int](), _LONGEST_LIST
    for place in sorted(range(len(texts)), key=lambda place: (place not in first, place)):
        if (room := room - len(texts[place]) - _AROUND) < 0:
            break
        shown.add(place)
    lines = [f"  {number}. {texts[place]}" for number, place in enumerate(sorted(shown), 1)]
    if left := len(texts) - len(shown):
        lost = len(first - shown)
        lines.append(f"  … and {left} more" + (f", {lost} of them of other kinds" if lost else ", of the same kinds"))
    return lines


def _kind(problem: str) -> str:
    words = _QUOTED.sub("…", problem).split()
    return " ".join("…" if _NAME.search(word) else word for word in words)
