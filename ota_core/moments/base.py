"""What every reader of second moments offers: one v per parameter name, in blocks of rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import MomentsError
from ota_core.files.layouts.stored import Shape as Shape
from ota_core.files.layouts.stored import Stored as Stored
from ota_core.files.layouts.stored import View as View

ESTIMATED = "estimated"
"""Key of a file's metadata: how its v was estimated, as JSON, where no optimizer computed it."""


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """A model's parameters in the order of ``named_parameters()``, as an optimizer that numbers them needs it.

    Built from a model's configuration outside ota_core (transformers knows the architectures, ota_core does not).
    """

    shapes: Mapping[str, Shape]
    """Name to shape, in the model's order, tied parameters once."""
    decayed: frozenset[str]
    """Names that the Hugging Face Trainer puts into its first group, the one with weight decay."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias to the parameter that it shares its storage with, for example lm_head.weight to model.embed_tokens.weight."""
    rules: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """What else decides which names decay in other trainers, where it takes the model itself to know: a description to those names."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """Tensors of the checkpoint that are not a parameter under its own name: what the model's library renames, fuses or stacks on loading."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's config.json: how its attention is laid out, for trainers that lay it out in another way."""
    changed: Callable[[], frozenset[str]] | None = None
    """Which parameters differ from the base's, None where no base is known: it compares weights, so that it is asked only when needed."""


def how_estimated(said: Mapping[str, Any]) -> str:
    """What ``Moments.estimated`` holds, in words."""
    clip = "not clipped" if said.get("clip") is None else f"clipped at {said['clip']:g}"
    points = int(said.get("points", 1))
    texts = "runs of random tokens" if said.get("random_tokens") else "documents"
    return (
        f"estimated: the mean squared gradient over {said.get('samples')} {texts} of at most {said.get('max_length')} tokens in batches of "
        f"{said.get('batch')}, {clip}" + (f", at {points} points from the base to the expert" if points > 1 else "")
    )


def steps_in_words(steps: Iterable[int]) -> str:
    """The steps of all parameters as messages say them: ``step 7``, ``steps 3 to 7 (4 different ones)``, ``step unknown``."""
    found = sorted(set(steps))
    if len(found) < 2:
        return f"step {found[0] if found else 'unknown'}"
    return f"steps {found[0]} to {found[-1]} ({len(found)} different ones: parameters were updated unequally often)"


class Moments(ABC):
    """Second moments v (Adam's ``exp_avg_sq``) of one expert. Values are ≥ 0, float32, and never bias-corrected here."""

    compressed: ClassVar[bool] = False
    """Whether this is what ``ota_core.moments.compression`` wrote, under the names of the weights."""
    path: Path
    beta2: float | None
    """Adam's β₂ where the file says it."""
    estimated: Mapping[str, Any] | None = None
    """How v was estimated (``ota estimate``); None where an optimizer left it."""
    unbiased: bool = False
    """Whether v needs no bias correction: its weights add up to 1, as those of Adafactor or of a plain mean do."""

    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """Parameter name to the shape of the parameter (not of a compressed form)."""

    @abstractmethod
    def step(self, name: str) -> int | None:
        """The number of optimizer steps t behind v, where the file says it."""

    def one_step(self, names: Iterable[str], said: str, advice: str) -> int | None:
        """The number of steps that all of these took. Raises MomentsError, which calls them ``said``, where they differ."""
        steps = {self.step(name) for name in names}
        if len(steps) > 1:
            different = ", ".join(str(step or "none") for step in sorted(steps, key=lambda step: step or 0))
            raise MomentsError(f"{self.path}: {said} took different numbers of steps ({different}); one was expected: {advice}")
        return steps.pop()

    def stored_bytes(self, name: str) -> int:
        """Bytes of the files that one parameter's whole v is read from: fewer than 4 an element where 8 or 4 bits were kept."""
        return 4 * prod(self.shapes()[name])

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
