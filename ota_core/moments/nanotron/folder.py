"""Where nanotron puts an optimizer: ``<step>/optimizer/``, one file for each rank, beside ``<step>/model/`` and ``model_config.json``.

From the public source: nanotron/serialize/optimizer.py. ``latest.txt`` beside the steps' folders holds the newest step's number.
"""

import re
from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.moments.base import Moments
from ota_core.moments.match import Layout

RANK = re.compile(
    r"optimizer_pp-(?P<pp>\d+)-of-(?P<pps>\d+)(?:_dp-(?P<dp>\d+)-of-(?P<dps>\d+))?_tp-(?P<tp>\d+)-of-(?P<tps>\d+)"
    r"(?:[_-]exp-(?P<exp>\d+)-of-(?P<exps>\d+))?\.pt"
)
FOLDER, CONFIG, MODEL, MODEL_CONFIG, LATEST = "optimizer", "optimizer_config.json", "model", "model_config.json", "latest.txt"


def find_nanotron(folder: Path) -> list[Path]:
    """The folder of the optimizer: this one, the one in it, or that of the step that ``latest.txt`` names."""
    if rank_files(folder):
        return [folder]
    if rank_files(folder / FOLDER):
        return [folder / FOLDER]
    if not (folder / LATEST).is_file():
        return []
    step = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    found = folder / step / FOLDER
    if not step.isdigit():
        return []  # somebody else's latest.txt
    if not rank_files(found):
        raise MomentsError(f"{folder / LATEST} names step {step}, and {found} holds no optimizer of nanotron: fetch it again")
    return [found]


def is_nanotron(path: Path) -> bool:
    """Whether a folder holds the ranks' files, or a file is one of them."""
    return bool(rank_files(path)) if path.is_dir() else RANK.fullmatch(path.name) is not None


def rank_files(folder: Path) -> list[Path]:
    """Every rank's file."""
    return sorted(path for path in folder.glob("optimizer_pp-*.pt") if RANK.fullmatch(path.name) and path.is_file())


def nanotron_files(path: Path) -> list[Path]:
    """The files that v is read from, and those that say how it is laid out; of the weights no more than slices is read."""
    if not path.is_dir():
        return [path]
    return [*rank_files(path), *(file for file in (path / CONFIG, path.parent / MODEL_CONFIG) if file.is_file())]


def open_nanotron(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """The reader. Raises MomentsError for what is missing, damaged, or not told by the files."""
    if not path.is_dir():
        raise MomentsError(f"{path} holds the part of one rank; name the folder of all ranks instead: {path.parent}")
    from ota_core.moments.nanotron.reader import open_folder

    return open_folder(path, layout, source_of)
