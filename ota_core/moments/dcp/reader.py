"""v from a folder of DCP: ``optimizer.state.<parameter>.exp_avg_sq``, cut over the ranks' files."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import CheckpointError, MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.dcp import DcpFolder
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.dcp.common import common_facts
from ota_core.moments.foreign import translated
from ota_core.moments.match import Layout, match_names
from ota_core.moments.safetensors_file import DROP_BYTES, as_beta2, as_step

# Under what the state lies differs: optimizer.state (accelerate, torchtitan), optim.state (OLMo-core), state (a bare state_dict).
STATE = re.compile(r"(?:[^.]+\.)*?state\.(?P<name>.+)\.exp_avg_sq")
MEGATRON = re.compile(r"(?:[^.]+\.)*?optimizer\.state\.exp_avg_sq\.(?P<name>.+)")
BUCKETS = re.compile(r"(?:[^.]+\.)*?optimizer\.distributed\.dp_group_idx_.*")
GROUPS = re.compile(r"(?:[^.]+\.)*?param_groups\.(?P<group>.+)\.(?P<key>[^.]+)")


class DcpMoments(Moments):
    """v by the names that the checkpoint has for its parameters."""

    def __init__(
        self, path: Path, folder: DcpFolder, names: Mapping[str, str], common: tuple[float | None, int | None] = (None, None)
    ) -> None:
        """names: parameter to its tensor in the folder; common: β₂ and the step of all where they lie elsewhere. Raises MomentsError for what is no float tensor or no β₂."""
        self.path, self._folder, self._names = path, folder, dict(names)
        self._unreleased = 0
        for name, key in names.items():
            if not folder.tensors[key].dtype.is_floating_point:
                raise MomentsError(f"{path}: v of {name!r} has the dtype {folder.tensors[key].dtype}, a float type was expected")
        self.beta2, self._step = _beta2(path, folder), common[1]
        if self.beta2 is None:
            self.beta2 = common[0]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self._folder.tensors[key].shape for name, key in self._names.items()}

    def step(self, name: str) -> int | None:
        key = self._names[name].removesuffix(".exp_avg_sq") + ".step"
        if key in self._folder.tensors:
            return as_step(_rows(self._folder, key, 0, 1).item(), f"{self.path}: {key}")
        found = _object(self._folder, key)
        return self._step if found is None else as_step(found, f"{self.path}: {key}")

    def stored_bytes(self, name: str) -> int:
        tensor = self._folder.tensors[self._names[name]]
        return prod(tensor.shape) * tensor.dtype.itemsize

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        if self._unreleased > DROP_BYTES:
            self._unreleased = 0
            self._folder.drop_pages()
        values = _rows(self._folder, self._names[name], start, stop)
        self._unreleased += values.nbytes
        shape = self._folder.tensors[self._names[name]].shape
        return checked(values, path=self.path, name=name, shape=shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._folder.prefetch(self._names[name], start, stop)

    def drop_pages(self) -> None:
        self._folder.drop_pages()

    def close(self) -> None:
        self._folder.close()


def open_folder(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """The reader for one folder. Raises MomentsError when it is damaged, or its numbers cannot be matched to names."""
    try:
        folder = DcpFolder(path, source_of)
    except CheckpointError as error:
        raise MomentsError(str(error)) from None
    try:
        keys = {m["name"]: key for key in folder.tensors if (m := STATE.fullmatch(key) or MEGATRON.fullmatch(key))}
        if not keys and any(BUCKETS.fullmatch(key) for key in (*folder.tensors, *folder.objects())):
            raise MomentsError(
                f"{path} is Megatron's in the format dp_reshardable (or an older one): it keeps buckets of many parameters, and only the "
                "running program knows where each begins. Load it and save it with --dist-ckpt-optim-fully-reshardable"
            )
        if not keys:
            raise MomentsError(
                f"{path} holds no tensors named …state.<parameter>.exp_avg_sq; the state of Adam or AdamW was expected"
            )
        if all(name.isdigit() for name in keys):
            keys = _by_number(path, folder, {int(name): key for name, key in keys.items()}, layout)
        common = common_facts(path) if any(MEGATRON.fullmatch(key) for key in keys.values()) else (None, None)
        return translated(path, DcpMoments(path, folder, keys, common), layout)
    except BaseException:
        folder.close()
        raise


def _by_number(path: Path, folder: DcpFolder, keys: Mapping[int, str], layout: Layout) -> dict[str, str]:
    """Names for a state that was saved under numbers, as a bare optimizer's state_dict has it."""
    if layout is None:
        raise MomentsError(
            f"{path} numbers its parameters, and without the model's configuration the numbers cannot be matched to names: put the "
            "expert's config.json into its folder"
        )
    settings: dict[int, dict[str, Any]] = {}
    for name in folder.objects():
        if (match := GROUPS.fullmatch(name)) and match["group"].isdigit():
            settings.setdefault(int(match["group"]), {})[match["key"]] = _object(folder, name)
    groups = [settings[number] for number in sorted(settings)] or _whole_groups(folder)
    if not groups or not all(isinstance(group.get("params"), list) for group in groups):
        raise MomentsError(f"{path} numbers its parameters and holds no param_groups that list them; save the optimizer by name")
    shapes = {number: folder.tensors[key].shape for number, key in keys.items()}
    names = match_names(path, groups, shapes, layout() if callable(layout) else layout)
    return {names[number]: key for number, key in keys.items()}


def _whole_groups(folder: DcpFolder) -> list[dict[str, Any]]:
    name = next((name for name in folder.objects() if name.rpartition(".")[2] == "param_groups"), None)
    found = _object(folder, name) if name else None
    return found if isinstance(found, list) and all(isinstance(group, dict) for group in found) else []


def _beta2(path: Path, folder: DcpFolder) -> float | None:
    found = set()
    for name in folder.objects():
        match = GROUPS.fullmatch(name)
        if match and match["key"] == "betas":
            found.add(_second(_object(folder, name), f"{path}: {name}"))
    found |= {_second(group["betas"], f"{path}: betas") for group in _whole_groups(folder) if "betas" in group}
    if len(found) > 1:
        raise MomentsError(f"{path}: the parameter groups have different β₂ ({sorted(found)}); one for all was expected")
    return found.pop() if found else None


def _second(betas: Any, where: str) -> float:
    if not isinstance(betas, (tuple, list)) or len(betas) < 2:
        raise MomentsError(f"{where} is {betas!r:.80}, two numbers were expected")
    return as_beta2(betas[1], where)


def _rows(folder: DcpFolder, key: str, start: int, stop: int) -> NDArray[np.float32]:
    try:
        return folder.read_rows(key, start, stop).to_float32()
    except CheckpointError as error:
        raise MomentsError(str(error)) from None


def _object(folder: DcpFolder, name: str) -> Any:
    if name not in folder.objects():
        return None
    try:
        return folder.read_object(name)
    except CheckpointError as error:
        raise MomentsError(str(error)) from None
