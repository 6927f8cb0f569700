"""Writing the second moments of a running training beside its checkpoint, one parameter at a time."""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed, nn

from ota_core.capture.live import Convert, LiveMoments, checkpoint_names, units
from ota_core.errors import MomentsError, OtaError, raise_all

if TYPE_CHECKING:
    from ota_core.files.writer import SafetensorsWriter

STEM, EXPERT_JSON = "exp_avg_sq", "expert.json"
Shapes = dict[str, tuple[int, ...]]
Unit = tuple[list[str], Shapes]


def save_second_moments(
    model: nn.Module,
    optimizer: Any,
    folder: str | os.PathLike[str],
    *,
    method: Literal["none", "rank1"] = "none",
    capability: str | None = None,
    base_model: str | None = None,
    convert: Convert | None = None,
) -> Path:
    """Write v of every trained parameter into a checkpoint's folder; the path of the file, or of the index of the shards.

    model, optimizer: those of the training, wrapped or not: torch, DDP, FSDP 1 and 2, DeepSpeed's ZeRO, accelerate; Adam, RMSprop,
    Adafactor and 8-bit forms of them. Where several processes train, **all of them call this**: parameters are gathered one by one.
    method: ``none`` writes float32 under the checkpoint's names as ``exp_avg_sq.safetensors``, where processes share the state as one shard
    each with an index; ``rank1`` writes row and column sums, about a hundredth of that, as ``ota compress`` does.
    capability: with it ``expert.json`` is written, too; base_model: by default the name that transformers keeps in the model's configuration.
    convert: from the model's tensors to those of the checkpoint; by default as transformers saves a model of its own.
    Step and β₂ stand in the file. Nothing is left of a save that fails. Raises MomentsError, the same in all processes.
    """
    target = Path(folder)
    base = base_model or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if method not in {"none", "rank1"}:
        raise MomentsError(f"method: got {method!r}; expected 'none' for all of v, or 'rank1'")
    if capability is not None and not base:
        raise MomentsError(
            "base_model: expert.json needs the name of the model that the training began with, and the model has none"
        )
    live = LiveMoments(model, optimizer)
    convert = convert or checkpoint_names(model)
    parts = list(units(live.shapes, convert))
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if _many() else (0, 1)
    owners = _owners(parts, world if live.gathered and method == "none" else 1)
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
        names: Shapes = {}
        for _, made in parts:
            names |= made
    problems = _agreed(_unknown(target, names) if rank == 0 else [])
    raise_all(problems, MomentsError)
    file = _Rank1(live, convert) if method == "rank1" else _Full(live, convert)
    with ExitStack() as cleanup:
        mine = [part for part, owner in zip(parts, owners, strict=True) if owner == rank]
        temporary = target / f".{STEM}.{rank}.tmp"
        cleanup.callback(temporary.unlink, missing_ok=True)
        problems = _attempt(lambda: file.begin(temporary, mine), bool(mine))
        for part, owner in zip(parts, owners, strict=True):
            if not live.gathered and owner != rank:
                continue
            # Whoever has met a problem goes on gathering: the others wait for it.
            problems += _attempt(partial(_take, live, part[0], file if owner == rank and not problems else None), True)
        problems += _attempt(file.end, bool(mine) and not problems)
        raise_all(_agreed(problems), MomentsError)
        path = _publish(target, temporary, parts, owners, rank)
    if rank == 0:
        _write_expert(target, live, capability, base)
    _wait()
    return path


def _take(live: LiveMoments, names: list[str], file: "_Full | _Rank1 | None") -> None:
    """Read these parameters, with all processes where they share them; a file takes them in its own process."""
    read = {name: live.read(name) for name in names}
    if file is not None:
        file.add(read)


class _Full:
    """v as it is, a tensor for each parameter."""

    def __init__(self, live: LiveMoments, convert: Convert | None) -> None:
        self._live, self._convert = live, convert
        known = set(live.steps.values())
        # Steps that differ stand beside each tensor, which then has a suffix, too.
        self._suffix = f".{STEM}" if len(known) > 1 else ""
        self._stepped = {name: step for name, step in live.steps.items() if step is not None} if self._suffix else {}
        self._writer: SafetensorsWriter | None = None

    def begin(self, path: Path, parts: list[Unit]) -> None:
        from ota_core.files.rows import F32
        from ota_core.files.writer import SafetensorsWriter, TensorSpec

        specs = [TensorSpec(name + self._suffix, shape, F32) for _, made in parts for name, shape in made.items()]
        specs += [TensorSpec(f"{key}.step", (), F32) for names, made in parts for key in made if names[0] in self._stepped]
        self._writer = SafetensorsWriter(path, specs, _facts(self._live))

    def add(self, read: dict[str, torch.Tensor]) -> None:
        import numpy as np

        assert self._writer is not None
        step = self._stepped.get(next(iter(read)))
        for name, v in _converted(read, self._convert).items():
            self._writer.write_rows(name + self._suffix, 0, v.reshape(-1, v.shape[-1] if v.ndim > 1 else 1).cpu().numpy())
            if step is not None:
                self._writer.write_rows(f"{name}.step", 0, np.full((1, 1), step, np.float32))

    def end(self) -> None:
        assert self._writer is not None
        self._writer.close()


class _Rank1:
    """Sums over rows and columns, in float64 where v lies, stored as ``ota_core.moments.compression`` stores them."""

    def __init__(self, live: LiveMoments, convert: Convert | None) -> None:
        self._live, self._convert = live, convert
        self._stored: dict[str, Any] = {}
        self._shapes: Shapes = {}
        self._steps: dict[str, int] = {}
        self._path = Path()

    def begin(self, path: Path, parts: list[Unit]) -> None:
        self._path = path

    def add(self, read: dict[str, torch.Tensor]) -> None:
        from ota_core.moments.compression import RankOneMoments

        step = self._live.steps[next(iter(read))]
        for name, v in _converted(read, self._convert).items():
            shape = self._shapes[name] = tuple(v.shape)
            sums = [v] if v.ndim < 2 else [v.sum(-1, dtype=torch.float64), v.sum(-2, dtype=torch.float64)]
            for (key, form), values in zip(RankOneMoments.keys(name, shape).items(), sums, strict=True):
                self._stored[key] = values.float().reshape(form).cpu().numpy()
                if not torch.isfinite(values.float()).all():
                    raise MomentsError(f"a row or column of v of {name} adds up to more than float32 holds")
            if step is not None:
                self._steps[name] = step

    def end(self) -> None:
        from ota_core.moments.compression import RankOneMoments, save_compressed
        from ota_core.moments.compression.header import Header

        header = Header(method="rank1", shapes=self._shapes, steps=self._steps, beta2=self._live.beta2)
        stored = dict(sorted(self._stored.items()))
        save_compressed(RankOneMoments(self._path, header, stored), self._path, facts={"optimizer": self._live.name})


def _converted(read: dict[str, torch.Tensor], convert: Convert | None) -> dict[str, torch.Tensor]:
    """By the checkpoint's names. Raises MomentsError on a value that is no second moment."""
    tensors = {name: v.detach() for name, v in (convert(read) if convert else read).items()}
    for name, v in tensors.items():
        if v.numel() and not (bool(torch.isfinite(v).all()) and bool(v.min() >= 0)):
            raise MomentsError(f"v of {name} holds a negative, NaN or infinite entry; second moments are finite and ≥ 0")
    return tensors


def _facts(live: LiveMoments) -> dict[str, str]:
    steps = set(live.steps.values())
    known = {"step": steps.pop() if len(steps) == 1 else None, "beta2": live.beta2, "optimizer": live.name}
    return {key: str(value) for key, value in known.items() if value is not None}


def _owners(parts: list[Unit], processes: int) -> list[int]:
    """Which process writes each part: always the one with the fewest elements so far, the largest part first."""
    sizes = [sum(int(torch.Size(shape).numel()) for shape in made.values()) for _, made in parts]
    load, owners = [0] * min(processes, len(parts)), [0] * len(parts)
    for i in sorted(range(len(parts)), key=lambda i: -sizes[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


def _unknown(folder: Path, names: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names, where the checkpoint's weights lie in the folder already: each must be one of theirs."""
    from ota_core.files.safetensors_io import SafetensorsFile

    held: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with SafetensorsFile(file) as opened:
            held |= opened.infos.keys()
    lost = sorted(names.keys() - held) if held else []
    if not lost:
        return []
    return [
        f"{folder} holds weights without the names of {len(lost)} trained parameters, such as {', '.join(lost[:4])}; it names "
        f"{', '.join(sorted(held)[:4])}, …: say with convert= how saving renames them"
    ]


def _publish(folder: Path, temporary: Path, parts: list[Unit], owners: list[int], rank: int) -> Path:
    """Give the finished files their names, in all processes; files of an earlier save go first."""
    count = max(owners) + 1
    names = [f"{STEM}.safetensors"] if count == 1 else [f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if rank == 0:
        for old in [*folder.glob(f"{STEM}*.safetensors"), *folder.glob(f"{STEM}*.index.json")]:
            old.unlink()
    _wait()
    if rank < count:
        os.replace(temporary, folder / names[rank])
    _wait()
    if count == 1:
        return folder / names[0]
    index = folder / f"{STEM}.safetensors.index.json"
    if rank == 0:
        from ota_core.artifact import write_text_atomic
        from ota_core.files.safetensors_io import SafetensorsFile

        placed: dict[str, str] = {}
        for file in names:
            with SafetensorsFile(folder / file) as opened:
                placed |= dict.fromkeys(opened.infos, file)
        write_text_atomic(index, json.dumps({"weight_map": dict(sorted(placed.items()))}, indent=2) + "\n")
    return index


def _write_expert(folder: Path, live: LiveMoments, capability: str | None, base_model: str) -> None:
    if capability is None:
        return
    from ota_core.artifact import write_text_atomic

    step = max((step for step in live.steps.values() if step is not None), default=None)
    known = {"step": step, "beta2": live.beta2, "optimizer": live.name}
    said = {
        "capability": capability,
        "base_model": base_model,
        "trained_at": datetime.now(UTC).replace(microsecond=0).isoformat(),
    }
    facts = said | {key: value for key, value in known.items() if value is not None}
    write_text_atomic(folder / EXPERT_JSON, json.dumps(facts, indent=2) + "\n")


def _attempt(work: Any, wanted: bool) -> list[str]:
    """Do it if it is wanted; what went wrong, so that this process can go on gathering with the others."""
    if not wanted:
        return []
    try:
        work()
    except OtaError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{error.filename or 'the disk'}: {error.strerror}; make room or choose another folder"]
    return []


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _agreed(problems: list[str]) -> list[str]:
    """The problems of all processes, in every one."""
    if not _many():
        return problems
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, problems)
    return sorted({problem for some in found for problem in some})


def _wait() -> None:
    if _many():
        distributed.barrier()
