"""v from the ranks' files: joined over data parallel ranks (ZeRO 1), then over tensor parallel ones, under Hugging Face's names.

From the public source: nanotron/optim/zero.py, nanotron/optim/named_optimizer.py, nanotron/serialize/{optimizer,weights,metadata}.py.
Under ZeRO 1 every parameter is flattened and cut over the ranks of data parallelism, in their order. A rank's ``names`` say which number is
which parameter; a stage of pipeline parallelism holds its own layers, whose names count over all stages.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.base import Moments, Shape
from ota_core.moments.deepspeed.saved import V, beta2_of, mapping, open_saved, step_of
from ota_core.moments.foreign import renamed
from ota_core.moments.foreign.model import model_of
from ota_core.moments.match import Layout
from ota_core.moments.nanotron.boxes import Joined, JoinedMoments, joined, numbers_in, whole
from ota_core.moments.nanotron.files import CONFIG, MODEL, MODEL_CONFIG, RANK, rank_files
from ota_core.moments.nanotron.names import TITLE, take_all
from ota_core.moments.pieces import PiecedMoments, Run
from ota_core.moments.safetensors_file import open_file
from ota_core.reading import json_value, read_file

AGAIN = "fetch the checkpoint again"


@dataclass(frozen=True)
class _Part:
    """What one file holds of one parameter."""

    file: TorchFile
    tensor: SavedTensor
    step: int | None


@dataclass(frozen=True)
class _Ranks:
    """How many ranks of each kind there were."""

    stages: int
    cuts: int
    """Of tensor parallelism."""
    shards: int | None
    """Of data parallelism; None where the optimizer was not sharded."""


def open_folder(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """The reader for the folder of all ranks' files. Raises MomentsError for what is missing or damaged, or what no file tells."""
    paths, ranks = _ranks(path)
    files: list[TorchFile] = []
    try:
        found = _parts(paths, files, source_of)
        said = _json(path / CONFIG).get("configs") or {}
        held = {(name, cut): _local_shape(path, name, own, said) for name, cuts in found.items() for cut, own in cuts.items()}
        _check_shards(path, found, ranks, held)
        runs = {
            f"{name}@{cut}": [Run(part.file, part.tensor, 0, part.tensor.numel) for part in own]
            for name, cuts in found.items() for cut, own in cuts.items()
        }  # fmt: skip
        steps = {f"{name}@{cut}": own[0].step for name, cuts in found.items() for cut, own in cuts.items()}
        inner = PiecedMoments(
            path, files, runs, {f"{name}@{cut}": shape for (name, cut), shape in held.items()}, steps, _beta2(files)
        )
        parameters = {name: _join(path, name, {cut: held[name, cut] for cut in cuts}) for name, cuts in found.items()}
        moments = JoinedMoments(path, inner, parameters)
        taken = take_all(path, moments.shapes(), model_of(path, TITLE, layout), _interleaved(path.parent / MODEL_CONFIG))
        return renamed(path, moments, taken)
    except BaseException:
        for file in files:
            file.close()
        raise


def _ranks(path: Path) -> tuple[dict[tuple[int, int, int], Path], _Ranks]:
    """Every rank's file by its stage, its cut and its shard, all of them there."""
    matches = {file: match for file in rank_files(path) if (match := RANK.fullmatch(file.name))}
    sizes = {tuple(int(match[key] or 1) for key in ("pps", "tps", "dps", "exps")) for match in matches.values()}
    zero = {match["dp"] is not None for match in matches.values()}
    if len(sizes) > 1 or len(zero) > 1:
        raise MomentsError(f"{path} holds the files of runs with different numbers of ranks: fetch those of one run alone")
    (stages, cuts, shards, experts), is_zero = sizes.pop(), zero.pop()
    if experts > 1:
        raise MomentsError(
            f"{path} is of a mixture of experts that lay on {experts} ranks; how nanotron names those is not read. Save the second moments by "
            "name as exp_avg_sq.safetensors, or measure them (ota estimate)"
        )
    paths = {(int(match["pp"]), int(match["tp"]), int(match["dp"] or 0)): file for file, match in matches.items()}
    lost = [
        f"pp-{stage} dp-{shard} tp-{cut}"
        for stage in range(stages) for cut in range(cuts) for shard in range(shards) if (stage, cut, shard) not in paths
    ]  # fmt: skip
    if lost:
        raise MomentsError(
            f"{path} lacks the files of {len(lost)} ranks ({', '.join(lost[:4])}{', …' if len(lost) > 4 else ''}); fetch them"
        )
    return paths, _Ranks(stages, cuts, shards if is_zero else None)


def _parts(
    paths: Mapping[tuple[int, int, int], Path], files: list[TorchFile], source_of: SourceOf | None
) -> dict[str, dict[int, list[_Part]]]:
    """Parameter → rank of tensor parallelism → its parts in the order of the data parallel ranks. Opened files are added to ``files``."""
    found: dict[str, dict[int, list[_Part]]] = {}
    stage_of: dict[str, int] = {}
    for (stage, cut, _), path in sorted(paths.items()):
        file = open_saved(path, source_of)
        files.append(file)
        saved = mapping(file.saved, str(path))
        names, state = mapping(saved.get("names"), f"{path}: names"), mapping(saved.get("state"), f"{path}: state")
        for number, entry in state.items():
            if not isinstance(names.get(number), str):
                raise MomentsError(f"{path}: no name belongs to its parameter {number!r}; {AGAIN}")
            name = names[number].removeprefix("module.")
            tensor = entry.get(V) if isinstance(entry, dict) else None
            if not (isinstance(tensor, SavedTensor) and tensor.is_floating_point and tensor.contiguous):
                keys = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
                raise MomentsError(
                    f"{path}: the state of {name!r} lacks a dense {V} (it holds: {keys:.200}); Adam's was expected"
                )
            # Where two stages tie a parameter, such as the embedding and the head, both keep the same state under one name.
            if stage_of.setdefault(name, stage) == stage:
                found.setdefault(name, {}).setdefault(cut, []).append(_Part(file, tensor, step_of(file, entry.get("step"))))
    if not found:
        raise MomentsError(
            f"{next(iter(paths.values())).parent} holds no state: it was saved before the first step; use a later one"
        )
    return found


def _local_shape(path: Path, name: str, parts: Sequence[_Part], said: Mapping[str, Any]) -> Shape:
    """The shape of one rank's cut of a parameter: ZeRO 1 leaves vectors, whose shapes are noted by the first stage alone."""
    if RANK.fullmatch(parts[0].file.path.name)["dp"] is None:  # type: ignore[index]  # the file was found by this pattern
        return parts[0].tensor.shape
    noted = (said.get("orig_param_shapes") or {}).get(name)
    if noted is not None:
        return tuple(int(size) for size in noted)
    match = RANK.fullmatch(parts[0].file.path.name)
    files = _weights(path, name)
    own = [file for file in files if match and f"_tp-rank-{match['tp']}-of-{match['tps']}" in file.name] or [
        file for file in files if "_tp-rank-" not in file.name
    ]
    if not own:
        raise MomentsError(
            f"{path}: {CONFIG} does not say the shape of {name!r}, which ZeRO 1 made a vector, and no file of its weights lies in "
            f"{path.parent / MODEL}: fetch that folder, too"
        )
    with open_file(own[0], None) as weights:
        return tuple(weights.infos["data"].shape)


def _check_shards(
    path: Path, found: Mapping[str, Mapping[int, Sequence[_Part]]], ranks: _Ranks, held: Mapping[tuple[str, int], Shape]
) -> None:
    problems = []
    for name, cuts in found.items():
        if len(cuts) != ranks.cuts:
            problems.append(f"{path}: only {len(cuts)} of {ranks.cuts} ranks of tensor parallelism hold {name!r}: {AGAIN}")
        for cut, parts in cuts.items():
            have, need = sum(part.tensor.numel for part in parts), prod(held[name, cut])
            if have != need or len({part.step for part in parts}) > 1:
                problems.append(
                    f"{path}: the {len(parts)} shards of {name!r} hold {have} numbers of {V}, the parameter has {need}, or they are of "
                    f"different steps: the files are of different runs. {AGAIN.capitalize()}"
                )
    raise_all(problems[:1], MomentsError)


def _join(path: Path, name: str, shapes: Mapping[int, Shape]) -> Joined:
    """One parameter of its cuts, by what nanotron writes beside the weights of each."""
    if len(shapes) == 1:
        return whole(f"{name}@0", shapes[0])
    files = _weights(path, name)
    if not files:
        raise MomentsError(
            f"{path} was cut by tensor parallelism, and how {name!r} was cut is said by the files of its weights alone: fetch "
            f"{path.parent / MODEL}, too"
        )
    cut = {int(match[1]): file for file in files if (match := re.search(r"_tp-rank-(\d+)-of-", file.name))}
    if not cut:  # every rank has the whole
        return whole(f"{name}@0", shapes[0])
    parts, whole_shape = [], set()
    for rank, shape in sorted(shapes.items()):
        if rank not in cut:
            raise MomentsError(
                f"{path.parent / MODEL} lacks the weights of {name!r} on rank {rank} of tensor parallelism: {AGAIN}"
            )
        with open_file(cut[rank], None) as weights:
            metadata = weights.metadata
        where = str(cut[rank])
        if not {"local_global_slices_pairs", "unsharded_shape"} <= metadata.keys():
            raise MomentsError(
                f"{where} does not say which slices of the parameter it holds (nanotron before 0.2): convert the second moments"
            )
        parts.append((f"{name}@{rank}", shape, numbers_in(metadata["local_global_slices_pairs"])))
        whole_shape.add(tuple(int(size) for size in re.findall(r"\d+", numbers_in(metadata["unsharded_shape"]))))
    if len(whole_shape) > 1:
        raise MomentsError(f"{path.parent / MODEL}: the ranks' weights of {name!r} say different shapes of the whole: {AGAIN}")
    return joined(f"{path}: {name!r}", whole_shape.pop(), parts)


def _weights(path: Path, name: str) -> list[Path]:
    """The files of a parameter's weights, of one rank or of each: ``model/<its modules>/model_<its last name>[_pp-rank-…].safetensors``."""
    *modules, last = name.split(".")
    if any(not re.fullmatch(r"\w+", module) for module in (*modules, last)):
        raise MomentsError(f"{path}: {name!r:.100} is no name of a parameter; {AGAIN}")
    return sorted(path.parent.joinpath(MODEL, *modules).glob(f"model_{last}*.safetensors"))


def _beta2(files: Sequence[TorchFile]) -> float | None:
    found = {beta2_of(mapping(file.saved, str(file.path)).get("param_groups"), str(file.path)) for file in files}
    if len(found) > 1:
        raise MomentsError(
            f"{files[0].path.parent}: the ranks' files have different β₂ ({found}); they are of different runs. {AGAIN.capitalize()}"
        )
    return found.pop()


def _interleaved(path: Path) -> bool:
    """Whether queries and keys have Meta's order of rows. Llama always had it before the configuration said so."""
    config = _json(path)
    for key in ("rope_interleaved", "interleaved_rotary"):
        if isinstance(config.get(key), bool):
            return bool(config[key])
    if config.get("is_llama_config"):
        return True
    raise MomentsError(
        f"{path} {'does not say' if path.is_file() else 'is missing; it says'} whether the rows of queries and keys are interleaved "
        "(rope_interleaved): put the model_config.json of the run there, with that key"
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json_value(read_file(path))
    except (ValueError, OSError) as error:
        raise MomentsError(f"{path} is not readable JSON ({error}): {AGAIN}") from None
    return mapping(value, str(path))
