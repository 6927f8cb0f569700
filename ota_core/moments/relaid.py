"""Second moments in the layout of another checkpoint of the same model. v goes the way of the weights."""

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ota_core.files.layouts.relayout import Relayout
from ota_core.files.layouts.stored import View
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.compression.base import CompressedMoments


def relaid(moments: Moments, layout: Relayout | None) -> Moments:
    """The same v for the tensors of the layout; all others keep their own. Closing it closes ``moments``."""
    if layout is None or all(name in moments.shapes() for name in layout.made):
        return moments
    return _RelaidCompressed(moments, layout) if isinstance(moments, CompressedMoments) else RelaidMoments(moments, layout)


class RelaidMoments(Moments):
    """v as ``relaid`` gives it."""

    def __init__(self, moments: Moments, layout: Relayout) -> None:
        self.path, self.beta2 = moments.path, moments.beta2
        self.estimated, self.unbiased = moments.estimated, moments.unbiased
        self.inner, self.layout = moments, layout
        held = moments.shapes()
        # Of a tensor that is made of several, all have v, or it has none.
        self._made = {name for name in layout.made if all(one in held for one in layout.needed(name))}
        taken = {one for name in self._made for one in layout.needed(name)}
        self._shapes = {name: shape for name, shape in held.items() if name not in taken}
        self._shapes |= {name: layout.made[name].shape for name in self._made}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        if name not in self._made:
            return self.inner.step(name)
        parts = self.layout.needed(name)
        return self.inner.one_step(parts, f"the tensors that make {name!r}", "save the second moments in the layout of the base")

    def stored_bytes(self, name: str) -> int:
        return self.inner.stored_bytes(name) if name not in self._made else sum(map(self._share, self.layout.made[name].views))

    def _share(self, view: View) -> int:
        """Bytes of the files behind some elements of a parameter."""
        held, whole = self.inner.shapes(), prod(self.layout.shapes[view.parameter])
        sources = self.layout.sources[view.parameter]
        behind = sum(
            prod(one.view.shape) * self.inner.stored_bytes(one.tensor) / max(prod(held[one.tensor]), 1) for one in sources
        )
        return round(behind * prod(view.shape) / max(whole, 1))

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        if name not in self._made:
            return self.inner.read(name, start, stop, check=check)
        values = self.layout.read(name, lambda *rows: self.inner.read(*rows, check=False), start, stop)
        return checked(values, path=self.path, name=name, shape=self._shapes[name], start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if name not in self._made:
            self.inner.prefetch(name, start, stop)
            return
        for rows in self.layout.rows_read(name, start, stop):
            self.inner.prefetch(*rows)

    def drop_pages(self) -> None:
        self.inner.drop_pages()

    def close(self) -> None:
        self.inner.close()


class _RelaidCompressed(RelaidMoments, CompressedMoments):
    """The same of a compressed form, of which a merge asks how it was compressed."""

    def __init__(self, moments: CompressedMoments, layout: Relayout) -> None:
        RelaidMoments.__init__(self, moments, layout)
        self.header, self.method, self.rank = moments.header, moments.method, moments.rank
        self.as_trained = moments.as_trained

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
        """A view is never written."""
        raise AssertionError(f"{name}: a view of second moments was to be written; write what it is a view of")
