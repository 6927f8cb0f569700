"""Second moments under other names: those that another checkpoint of the same model gives its tensors."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ota_core.moments.base import Moments
from ota_core.moments.compression.base import CompressedMoments


def renamed(moments: Moments, names: Mapping[str, str]) -> Moments:
    """The same v; closing it closes ``moments``. names: present name to new one; what is not named keeps its own."""
    if not any(names.get(name, name) != name for name in moments.shapes()):
        return moments
    return _RenamedCompressed(moments, names) if isinstance(moments, CompressedMoments) else RenamedMoments(moments, names)


class RenamedMoments(Moments):
    """v as ``renamed`` gives it."""

    def __init__(self, moments: Moments, names: Mapping[str, str]) -> None:
        self.path, self.beta2 = moments.path, moments.beta2
        self.estimated, self.unbiased = moments.estimated, moments.unbiased
        self._moments = moments
        self._own = {names.get(name, name): name for name in moments.shapes()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        held = self._moments.shapes()
        return {name: held[own] for name, own in self._own.items()}

    def step(self, name: str) -> int | None:
        return self._moments.step(self._own[name])

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        return self._moments.read(self._own[name], start, stop, check=check)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._moments.prefetch(self._own[name], start, stop)

    def drop_pages(self) -> None:
        self._moments.drop_pages()

    def close(self) -> None:
        self._moments.close()


class _RenamedCompressed(RenamedMoments, CompressedMoments):
    """The same of a compressed form, of which a merge asks how it was compressed."""

    def __init__(self, moments: CompressedMoments, names: Mapping[str, str]) -> None:
        RenamedMoments.__init__(self, moments, names)
        self.header, self.method, self.rank = moments.header, moments.method, moments.rank
        self.as_trained = moments.as_trained

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
        """A view is never written."""
        raise AssertionError(f"{name}: a view of second moments was to be written; write what it is a view of")
