"""Second moments from safetensors: one file, shards with an index, or shards alone."""

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.artifact import EXPERT_JSON
from ota_core.errors import CheckpointError, MomentsError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.safetensors_io import SafetensorsFile, TensorInfo
from ota_core.moments.base import ESTIMATED, Moments
from ota_core.moments.check import checked
from ota_core.reading import json_value, quoted, read_file

SUFFIX = ".exp_avg_sq"
# What a dump of an optimizer's state may hold beside v under suffixed names.
OTHER_STATE = (".exp_avg", ".max_exp_avg_sq", ".step")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
# Pages read are returned to the kernel whenever this many bytes came in, so that resident memory does not follow the file.
DROP_BYTES = 64 << 20


class SafetensorsMoments(Moments):
    """v by parameter name from safetensors files; names as in the model, or with the suffix ``.exp_avg_sq``."""

    def __init__(self, path: Path, files: Sequence[Path], source_of: SourceOf | None = None) -> None:
        """``path`` is what the user named, ``files`` the one file or the shards behind it. Raises MomentsError."""
        self.path = path
        self._files = [open_file(file, source_of) for file in files]
        places = _places(path, self._files)
        suffixed = any(name.endswith(SUFFIX) for name in places)
        self._steps: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        self._v: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        for name, place in places.items():
            if suffixed and name.endswith(".step"):
                self._steps[name.removesuffix(".step")] = place
            elif not suffixed or name.endswith(SUFFIX):
                self._v[name.removesuffix(SUFFIX)] = place
        self._shapes = {name: info.shape for name, (_, info) in self._v.items()}
        _check_names(path, places, suffixed)
        facts = _facts(path, self._files)
        self.beta2 = facts.get("beta2")
        self._step: int | None = facts.get("step")
        self.estimated = _estimated(self._files)
        self._unreleased = 0

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        """The tensor's own ``.step`` where the file holds one, otherwise the one of the metadata or of expert.json."""
        place = self._steps.get(name)
        if place is None:
            return self._step
        rows = place[0].read_rows(place[1].name, 0, 1)
        value = rows.held if rows.dtype.held_itself else rows.to_float32()
        return as_step(value.item() if value.size == 1 else value.tolist(), f"{place[0].path}: {place[1].name!r}")

    def stored_bytes(self, name: str) -> int:
        info = self._v[name][1]
        return prod(info.shape) * info.dtype.itemsize

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        file, info = self._v[name]
        if self._unreleased > DROP_BYTES:
            self._unreleased = 0
            for each in self._files:
                each.drop_pages()
        block = file.read_rows(info.name, start, stop)
        self._unreleased += block.nbytes
        values = block.to_float32()
        return checked(values, path=file.path, name=name, shape=info.shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        file, info = self._v[name]
        file.prefetch(info.name, start, stop)

    def close(self) -> None:
        for file in self._files:
            file.close()


def index_files(index: Path) -> list[Path]:
    """The shards that an index lists, each once, in the order of their names. Raises MomentsError when one is missing."""
    files = sorted(set(_weight_map(index).values()))
    bad = [file for file in files if Path(file).name != file]
    if bad:
        raise MomentsError(f"{index} lists {bad[0]!r}; names of files beside the index were expected: write the index again")
    lost = [file for file in files if not (index.parent / file).is_file()]
    if lost:
        raise MomentsError(f"{index} lists shards that are not beside it: {', '.join(lost)}; fetch them")
    return [index.parent / file for file in files]


def check_shard_set(files: Sequence[Path]) -> None:
    """Shards named ``…-00001-of-00003.safetensors`` must all be there. Raises MomentsError that lists those that are not."""
    present = {file.name for file in files}
    lost = set()
    for file in files:
        if match := SHARD_NAME.fullmatch(file.name):
            stem, count, width = match["stem"], match["count"], len(match["number"])
            lost |= {f"{stem}-{i:0{width}}-of-{count}.safetensors" for i in range(1, int(count) + 1)} - present
    if lost:
        raise MomentsError(f"{files[0].parent} lacks shards of the second moments: {', '.join(sorted(lost))}; fetch them")


def open_file(path: Path, source_of: SourceOf | None = None) -> SafetensorsFile:
    """A safetensors file of second moments. Raises MomentsError when it is missing or damaged."""
    try:
        return SafetensorsFile(path, source_of(path) if source_of else None)
    except CheckpointError as error:
        raise MomentsError(str(error)) from None


def _places(path: Path, files: Sequence[SafetensorsFile]) -> dict[str, tuple[SafetensorsFile, TensorInfo]]:
    """Tensor name to its file and place. Raises MomentsError when a name comes twice or an index disagrees with its shards."""
    places: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
    for file in files:
        for name, info in file.infos.items():
            if name in places:
                raise MomentsError(f"{name!r} is in {places[name][0].path} and in {file.path}; keep one of the two files")
            places[name] = (file, info)
    if path.suffix == ".json":
        listed = _weight_map(path)
        held = {name: place[0].path.name for name, place in places.items()}
        odd = sorted(name for name in listed.keys() | held.keys() if listed.get(name) != held.get(name))
        if odd:
            raise MomentsError(f"{path} and its shards disagree on {len(odd)} tensors, such as {odd[0]!r}; write the index again")
    return places


def _weight_map(index: Path) -> dict[str, str]:
    mapping = _json_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise MomentsError(f"{index} holds no weight_map of tensor names to file names; write the index again")
    return mapping


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json_value(read_file(path))
    except (ValueError, OSError) as error:
        raise MomentsError(f"{path} cannot be read as JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise MomentsError(f"{path} holds a JSON {type(value).__name__}, an object was expected; write it again")
    return value


def _check_names(path: Path, places: Mapping[str, tuple[SafetensorsFile, TensorInfo]], suffixed: bool) -> None:
    """There is a v at all, every v is of a float type, and no tensor is of unclear meaning."""
    if not places:
        raise MomentsError(f"{path} holds no tensors; one second moment per parameter was expected: save them again")
    problems = []
    for name, (file, info) in places.items():
        is_v = name.endswith(SUFFIX) or not suffixed
        if is_v and not info.dtype.is_floating_point:
            problems.append(f"{file.path}: {name!r} has the dtype {info.dtype}, a float type was expected; save v in float32")
        if not is_v and not name.endswith(OTHER_STATE):
            problems.append(f"{file.path}: {name!r} lacks the suffix {SUFFIX} of others; give it to all or to none")
    raise_all(problems, MomentsError)


def _facts(path: Path, files: Sequence[SafetensorsFile]) -> dict[str, Any]:
    """beta2 and step from the files' metadata and from expert.json beside them. Raises MomentsError when two sources disagree."""
    readers = {"beta2": as_beta2, "step": as_step}
    sources: list[tuple[Path, Mapping[str, Any]]] = [(file.path, file.metadata) for file in files]
    folder = path if path.is_dir() else path.parent
    if (folder / EXPERT_JSON).is_file():
        sources.append((folder / EXPERT_JSON, _json_object(folder / EXPERT_JSON)))
    facts: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for source, values in sources:
        for key, convert in readers.items():
            if values.get(key) is None:
                continue
            value = convert(values[key], f"{source}: {key}")
            if facts.setdefault(key, value) != value:
                raise MomentsError(f"{key} is {facts[key]} in {origin[key]} and {value} in {source}; correct one of them")
            origin.setdefault(key, source)
    return facts


def _estimated(files: Sequence[SafetensorsFile]) -> dict[str, Any] | None:
    """How v was estimated, where the files say so. Raises MomentsError for what cannot be read."""
    for file in files:
        if (text := file.metadata.get(ESTIMATED)) is not None:
            try:
                return dict(json_value(text))
            except (ValueError, TypeError):
                raise MomentsError(
                    f"{file.path}: its metadata '{ESTIMATED}' is {quoted(text)}, JSON was expected; estimate again"
                ) from None
    return None


def as_beta2(value: Any, where: str) -> float:
    """Adam's β₂ from a number or its text. Raises MomentsError outside [0, 1)."""
    number = _number(value)
    if not 0 <= number < 1:
        raise MomentsError(f"{where} is {quoted(value)}, a number in [0, 1) was expected: correct it")
    return number


def as_step(value: Any, where: str) -> int:
    """A count of optimizer steps from a number or its text. Raises MomentsError below 1 or when it is not whole."""
    number = _number(value)
    if not (number >= 1 and number.is_integer()):
        raise MomentsError(f"{where} is {quoted(value)}, a whole number of at least 1 was expected: correct it")
    return int(number)


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return float("nan")
