"""Where DeepSpeed puts its files, all in one folder per step: ``latest`` beside the folders names the newest, ``global_stepN``.

ZeRO 1 to 3: ``[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`` of every rank R. ZeRO 0: the optimizer within
``mp_rank_00_model_states.pt``. Universal: a folder ``zero/`` with one folder per parameter.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.moments.base import Moments
from ota_core.moments.match import Layout
from ota_core.moments.pointers import pointer
from ota_core.names import why_unsafe
from ota_core.reading import quoted

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_?optim_states\.pt")
EXPERTS = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_\d+_mp_rank_\d+_?expp?|expp)_rank_.*optim_states\.pt")
MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # under ZeRO 3 every rank has one
UNIVERSAL = "exp_avg_sq.pt"
LATEST = ("latest_universal", "latest")


def find_deepspeed(folder: Path) -> list[Path]:
    """The folder of one step: this one, the one that ``latest`` names, or those named ``global_step*``."""
    if _is_step(folder):
        return [folder]
    for name in LATEST:
        if (folder / name).is_file():
            step = folder / _tag(folder / name)
            if not _is_step(step):
                raise MomentsError(
                    f"{folder / name} names {step.name!r}, and {step} is no folder of DeepSpeed's optimizer states: fetch it again"
                )
            return [step]
    return sorted(path for path in folder.glob("global_step*") if _is_step(path))


def is_deepspeed(path: Path) -> bool:
    """Whether a folder holds one step's states, or a file is one rank's part of them."""
    return _is_step(path) if path.is_dir() else OPTIM.fullmatch(path.name) is not None or path.name in MODEL


def rank_files(path: Path) -> list[Path]:
    """The files that v is read from: every rank's, and the one that has the parameters' names and shapes."""
    if not path.is_dir():
        return [path]
    if (path / "zero").is_dir():
        return sorted((path / "zero").rglob(UNIVERSAL))
    return [*_optim_files(path), *_model_files(path)]


def open_deepspeed(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """The reader for what lies there. Raises MomentsError for what is missing, damaged, or cut in a way that is not read."""
    if not path.is_dir() and OPTIM.fullmatch(path.name):
        raise MomentsError(f"{path} holds the part of one rank; name the folder of all ranks instead: {path.parent}")
    folder = path if path.is_dir() else path.parent
    if (folder / "zero").is_dir():
        from ota_core.moments.deepspeed.universal import UniversalMoments  # these need torch

        return UniversalMoments(folder, rank_files(folder), source_of)
    model = _model_files(folder)
    if not model:
        raise MomentsError(f"{folder} holds no {MODEL[0]} or {MODEL[1]}, which has the parameters' names and shapes: fetch it")
    files = _optim_files(folder)
    if not files:
        from ota_core.moments.deepspeed.whole import open_whole

        return open_whole(folder, model[0], layout, source_of)
    from ota_core.moments.deepspeed.zero import ZeroMoments

    return ZeroMoments(folder, _ranks(folder, files), model[0], source_of)


def _tag(latest: Path) -> str:
    tag = pointer(latest)
    if "/" in tag or why_unsafe(tag):
        raise MomentsError(f"{latest} holds {quoted(tag, 100)}; the name of a folder beside it was expected: write it again")
    return tag


def _is_step(path: Path) -> bool:
    if not path.is_dir():
        return False
    return bool(_optim_files(path) or _model_files(path)[:1] or any((path / "zero").glob(f"*/{UNIVERSAL}")))


def _optim_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*optim_states.pt") if path.is_file())


def _model_files(folder: Path) -> list[Path]:
    return [folder / name for name in MODEL if (folder / name).is_file()][:1]


def _ranks(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The ranks' files in the order of the ranks. Raises MomentsError for what belongs to several models' parts, and for gaps."""
    ranks: dict[int, Path] = {}
    for file in files:
        match = OPTIM.fullmatch(file.name)
        if match is None or int(match["part"]) != 0:
            what = (
                "one expert of a mixture of experts"
                if match is None
                else f"part {int(match['part'])} of a model cut by layers or rows"
            )
            raise MomentsError(
                f"{file} belongs to {what}; parameters cut by ZeRO alone are read. Convert the checkpoint with DeepSpeed's "
                "ds_to_universal.py, its result is read"
            )
        ranks[int(match["rank"])] = file
    lost = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if lost:
        raise MomentsError(f"{folder} lacks the optimizer states of rank {', '.join(map(str, lost))}; fetch them")
    return [ranks[rank] for rank in sorted(ranks)]
