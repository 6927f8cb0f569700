"""The metadata of a file of compressed second moments."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ota_core.errors import MomentsError
from ota_core.files.safetensors_io import FORMAT_KEY
from ota_core.frozen import Frozen
from ota_core.moments.base import Moments

Method = Literal["none", "rank1", "log8", "rank_k"]
Facts = Mapping[str, str] | None
METHODS: tuple[Method, ...] = ("none", "rank1", "log8", "rank_k")
FORMAT = "moments/1"
_AGAIN = "Compress the second moments again with this version"


class Header(Frozen):
    """What a file says of itself: which method, and the facts that the tensors do not tell."""

    method: Method
    rank: int | None = None
    shapes: dict[str, tuple[int, ...]]
    """Parameter name to the shape of the parameter."""
    steps: dict[str, int]
    beta2: float | None
    estimated: dict[str, Any] | None = None
    """How v was estimated; None where an optimizer left it."""
    unbiased: bool = False
    """Whether v needs no bias correction; left out of the file where it does."""

    @classmethod
    def of(cls, moments: Moments, method: Method, rank: int | None = None) -> "Header":
        """The header of what a method makes of these moments."""
        shapes = {name: tuple(shape) for name, shape in moments.shapes().items()}
        steps = {name: step for name in shapes if (step := moments.step(name)) is not None}
        estimated = None if moments.estimated is None else dict(moments.estimated)
        return cls(
            method=method,
            rank=rank,
            shapes=shapes,
            steps=steps,
            beta2=moments.beta2,
            estimated=estimated,
            unbiased=moments.unbiased,
        )

    def metadata(self, others: Facts = None) -> dict[str, str]:
        """The header as safetensors metadata, one spelling for one content. others: facts that no reader of v needs."""
        facts: dict[str, Any] = {"shapes": {n: list(s) for n, s in self.shapes.items()}, "steps": self.steps, "beta2": self.beta2}
        if self.rank is not None:
            facts["rank"] = self.rank
        if self.estimated is not None:
            facts["estimated"] = self.estimated
        if self.unbiased:
            facts["unbiased"] = True
        return {**(others or {}), FORMAT_KEY: FORMAT, "method": self.method, "header": json.dumps(facts, sort_keys=True)}


def read_header(path: Path, metadata: Mapping[str, str]) -> Header:
    """Raises MomentsError when the format or the method is not known here, or the header is damaged."""
    found, method = metadata.get(FORMAT_KEY), metadata.get("method")
    if found != FORMAT or method not in METHODS:
        raise MomentsError(
            f"{path}: format {found!r}, method {method!r}; this version reads {FORMAT} with method {', '.join(METHODS[:-1])} or "
            f"{METHODS[-1]}. {_AGAIN}"
        )
    try:
        return Header.model_validate({"method": method, **json.loads(metadata["header"])})
    except (KeyError, ValueError, TypeError, ValidationError):
        raise MomentsError(f"{path}: its header is damaged. {_AGAIN}") from None
