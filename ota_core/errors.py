"""The errors that a user can cause. The command line prints their message alone, without a traceback, and exits with code 2."""

from collections.abc import Sequence
from typing import Literal

from ota_core.reading import cut, printable

_MOST_SHOWN = 100
"""Problems that one message lists."""
_LONGEST, _LONGEST_PROBLEM = 16_000, 2_000
"""Characters of a message, and of one problem of several."""
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
    """Raise one error that lists every problem found; do nothing when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise kind(problems[0])
    lines = [f"  {i}. {cut(p, _LONGEST_PROBLEM)}" for i, p in enumerate(problems[:_MOST_SHOWN], 1)]
    lines += [f"  … and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
    error = kind(f"{len(problems)} problems found:\n" + "\n".join(lines))
    error._problems = tuple(problems)
    raise error
