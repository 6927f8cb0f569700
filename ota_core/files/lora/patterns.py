"""Regular expressions that an adapter's configuration names modules by: those of PEFT, with an end to the time that they may take.

Python's own engine tries ways of matching without a limit, so that a pattern such as ``(a|aa)+b`` can hold a process for years. The same patterns
are matched here with the ``regex`` package, which takes a limit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from ota_core.errors import CheckpointError
from ota_core.reading import quoted

T = TypeVar("T", int, float)

MAX_LENGTH = 10_000
"""Characters of one pattern."""
MATCH_SECONDS = 1.0
"""Of the processor, for one module and pattern; an ordinary one takes microseconds."""
SLOW, SLOW_SECONDS = 1e-3, 10.0
"""What a match takes that is slow, and what all slow ones of an adapter may."""
# What the package reads in another way than re: approximate matching, and classes of POSIX.
_OTHERWISE = re.compile(r"\{(?!\d*,?\d*\})|\[:")


@dataclass(frozen=True)
class Patterns(Generic[T]):
    """``rank_pattern`` or ``alpha_pattern``: patterns of modules' names to a number."""

    path: Path
    """The configuration's file, for messages."""
    key: str
    numbers: Mapping[str, T]
    _slow: list[float] = field(default_factory=list, compare=False)
    """Processor's seconds of the matches that took long."""

    def of(self, module: str, default: T) -> T:
        """The number of the first pattern that the module's name ends with, as PEFT looks for it. Raises CheckpointError for one that takes too long."""
        for pattern, compiled in self._compiled.items():
            began = time.thread_time()
            try:
                found = compiled.match(module, timeout=MATCH_SECONDS)
            except TimeoutError:
                raise self._too_slow(pattern, module) from None
            if (took := time.thread_time() - began) > SLOW:
                self._slow.append(took)
                if sum(self._slow) > SLOW_SECONDS:
                    raise self._too_slow(pattern, module)
            if found:
                return self.numbers[pattern]
        return default

    def _too_slow(self, pattern: str, module: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.key}: the pattern {quoted(pattern, 80)} takes too long to compare with {quoted(module, 80)}, as it can match in too "
            "many ways. Write modules' names in its place, or patterns without a repeated part within a repeated part"
        )

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        import regex

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return {pattern: regex.compile(_whole(pattern), regex.VERSION0) for pattern in self.numbers}


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern cannot be used."""
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, expected at most {MAX_LENGTH}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
            re.compile(_whole(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    return "has '{' or '[:' that is no number of times; write them as \\{ and [\\[:" if _OTHERWISE.search(pattern) else None


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
