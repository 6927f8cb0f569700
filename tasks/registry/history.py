"""The history of the champion: one tag of the registered model for each move, and what it says of the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.tracking.store import cut

PREFIX = "history/"
# A registered model's tag holds 5000 characters in MLflow's databases.
_REASON_LENGTH = 2000
_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"  # sorts by time as text


class Move(BaseModel):
    """The alias ``champion`` going from one version to another. JSON calls them ``from`` and ``to``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    action: Literal["promote", "rollback"]
    from_version: str | None = Field(alias="from")
    """None: there was no champion."""
    to: str
    by: str
    reason: str
    at: str
    """UTC, ISO 8601 with microseconds."""

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


def history_tag(move: Move) -> tuple[str, str]:
    """(key, value) of the tag that notes the move. The same move gives the same tag."""
    return PREFIX + move.at, move.model_copy(update={"reason": cut(move.reason, _REASON_LENGTH)}).to_json()


def moves_of(tags: Mapping[str, str]) -> list[Move]:
    """The moves among a registered model's tags, oldest first."""
    return [Move.model_validate_json(tags[key]) for key in sorted(tags) if key.startswith(PREFIX)]


def next_time(tags: Mapping[str, str]) -> str:
    """Now, or just after the last move where another machine's clock is ahead: the history stays in the order in which it was written."""
    now = datetime.now(UTC)
    last = max((key.removeprefix(PREFIX) for key in tags if key.startswith(PREFIX)), default=None)
    if last is not None:
        now = max(now, datetime.strptime(last, _FORMAT).replace(tzinfo=UTC) + timedelta(microseconds=1))
    return now.strftime(_FORMAT)


def champions(moves: Iterable[Move], champion: str | None) -> list[str]:
    """The champions that each replaced the one before, oldest first; the last is the champion.

    A promotion adds to the line, a rollback cuts it, so that going back and back never comes forward again. Where somebody
    moved the alias in MLflow itself, or two did at once, what a move found as champion counts.
    """
    line: list[str] = []
    for move in moves:
        if move.action == "promote":
            _end_with(line, move.from_version)
            line.append(move.to)
        else:
            _end_with(line, move.to)
    _end_with(line, champion)
    return line


def _end_with(line: list[str], version: str | None) -> None:
    """Cut the line after the last place of the version, or add it."""
    if version is None:
        line.clear()
    elif version in line:
        while line[-1] != version:
            line.pop()
    else:
        line.append(version)
