"""Where nanotron puts an optimizer: ``<step>/optimizer/``, one file for each rank, beside ``<step>/model/`` and ``model_config.json``.

From the public source: nanotron/serialize/optimizer.py. ``latest.txt`` beside the steps' folders holds the newest step's number.
"""

import re
from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.moments.base import Moments
from ota_core.moments.match import Layout
from ota_core.moments.nanotron.files import CONFIG, FOLDER, LATEST, MODEL_CONFIG, RANK, rank_files
from ota_core.moments.pointers import pointer


def find_nanotron(folder: Path) -> list[Path]:
    """The folder of the optimizer: this one, the one in it, or that of the step that ``latest.txt`` names."""
    if rank_files(folder):
        return [folder]
    if rank_files(folder / FOLDER):
        return [folder / FOLDER]
    if not (folder / LATEST).is_file():
        return []
    step = pointer(folder / LATEST)
    if not re.fullmatch(r"[0-9]{1,18}", step):
        return []  # somebody else's latest.txt
    found = folder / step / FOLDER
    if not rank_files(found):
        raise MomentsError(f"{folder / LATEST} names step {step}, and {found} holds no optimizer of nanotron: fetch it again")
    return [found]


def is_nanotron(path: Path) -> bool:
    """Whether a folder holds the ranks' files, or a file is one of them."""
    return bool(rank_files(path)) if path.is_dir() else RANK.fullmatch(path.name) is not None


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
