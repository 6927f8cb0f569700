"""v of an optimizer that keeps one for every element, in full or in few bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import MomentsError
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.safetensors_file import DROP_BYTES, as_step
from ota_core.moments.trainer.facts import beta2_of, is_unbiased, raw_step
from ota_core.moments.trainer.stored import Stored

Places = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Parameter name to its entry in the state and its group."""


class TrainerMoments(Moments):
    """v by parameter name, read from the file in blocks of rows as it is asked for."""

    def __init__(
        self, path: Path, file: TorchFile, groups: Sequence[Mapping[str, Any]], stored: Mapping[str, Stored], places: Places
    ) -> None:
        """stored: parameter name to where v lies. Raises MomentsError where the groups contradict each other."""
        self.path, self._file, self._v, self._places = path, file, dict(stored), dict(places)
        self._shapes = {name: one.shape for name, one in stored.items()}
        self.beta2, self.unbiased = beta2_of(path, groups), is_unbiased(path, groups)
        self._unreleased = 0

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        return step_of(self.path, self._file, name, *self._places[name])

    def stored_bytes(self, name: str) -> int:
        return sum(tensor.numel * (tensor.known.itemsize if tensor.known else 4) for tensor in self._v[name].tensors())

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        if self._unreleased > DROP_BYTES:
            self._unreleased = 0
            self._file.drop_pages()
        values = self._v[name].read(self._file, start, stop)
        self._unreleased += values.nbytes
        return checked(values, path=self.path, name=name, shape=self._shapes[name], start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._v[name].prefetch(self._file, start, stop)

    def close(self) -> None:
        self._v, self._places = {}, {}
        self._file.close()


def step_of(path: Path, file: TorchFile, name: str, entry: Mapping[str, Any], group: Mapping[str, Any]) -> int | None:
    """t of one parameter, where the state says it. Raises MomentsError where it is no count."""
    value = raw_step(entry, group)
    if isinstance(value, SavedTensor):
        if value.numel != 1:
            raise MomentsError(f"{path}: the step of {name!r} has the shape {list(value.shape)}, one number was expected")
        value = file.number(value)
    return None if value is None else as_step(value, f"{path}: the step of {name!r}")
