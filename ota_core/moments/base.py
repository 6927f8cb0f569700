"""What every reader of second moments offers: one v per parameter name, in blocks of rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """A model's parameters in the order of ``named_parameters()``, as an optimizer that numbers them needs it.

    Built from a model's configuration outside ota_core (transformers knows the architectures, ota_core does not).
    """

    shapes: Mapping[str, tuple[int, ...]]
    """Name to shape, in the model's order, tied parameters once."""
    decayed: frozenset[str]
    """Names that the Hugging Face Trainer puts into its first group, the one with weight decay."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias to the parameter that it shares its storage with, for example lm_head.weight to model.embed_tokens.weight."""


def steps_in_words(steps: Iterable[int]) -> str:
    """The steps of all parameters as messages say them: ``step 7``, ``steps 3 to 7 (4 different ones)``, ``step unknown``."""
    found = sorted(set(steps))
    if len(found) < 2:
        return f"step {found[0] if found else 'unknown'}"
    return f"steps {found[0]} to {found[-1]} ({len(found)} different ones: parameters were updated unequally often)"


class Moments(ABC):
    """Second moments v (Adam's ``exp_avg_sq``) of one expert. Values are ≥ 0, float32, and never bias-corrected here."""

    path: Path
    beta2: float | None
    """Adam's β₂ where the file says it."""
    unbiased: bool = False
    """Whether v needs no bias correction: its weights add up to 1, as those of Adafactor or of a plain mean do."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter name to the shape of the parameter (not of a compressed form)."""

    @abstractmethod
    def step(self, name: str) -> int | None:
        """The number of optimizer steps t behind v, where the file says it."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        """Rows start:stop of v as the matrix of ``blocks.matrix_shape``: float32, shape (stop − start, C); treat them as read-only.

        Raises MomentsError, naming file and tensor, for a negative, NaN or infinite entry. With ``check=False`` the caller promises
        to look at every value itself, in a pass that it makes anyway, and to read again with the check when it finds a bad one.
        """

    def prefetch(self, name: str, start: int, stop: int) -> None:  # noqa: B027 - what is in memory needs no fetching
        """The same rows are read soon: a hint that costs little and may be repeated."""

    def drop_pages(self) -> None:  # noqa: B027 - some readers return pages by themselves
        """Return the pages read so far, where a file is mapped."""

    def close(self) -> None:  # noqa: B027
        """Release the files, where any are open."""
