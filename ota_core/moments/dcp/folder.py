"""Where DCP puts an optimizer's state: any folder with ``.metadata`` that speaks of ``exp_avg_sq``.

accelerate writes ``optimizer_0/``, OLMo-core ``model_and_optim/``, torchtitan the folder ``step-N`` itself.
"""

from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.dcp import METADATA
from ota_core.moments.base import Moments
from ota_core.moments.dcp.common import COMMON
from ota_core.moments.match import Layout
from ota_core.reading import read_file

V = b"exp_avg_sq"
PARTS = "*.distcp"


def find_dcp(folder: Path) -> list[Path]:
    """The folder itself, or those directly in it."""
    if is_dcp(folder):
        return [folder]
    return sorted(
        path.parent
        for path in folder.glob(f"*/{METADATA}")
        if not path.parent.name.startswith("checkpoint-") and is_dcp(path.parent)
    )


def is_dcp(path: Path) -> bool:
    """Whether a folder holds second moments as DCP writes them, or a file is part of such a folder."""
    if not path.is_dir():
        return path.name == METADATA or path.suffix == ".distcp"
    try:
        return (path / METADATA).is_file() and V in read_file(path / METADATA)
    except OSError as error:
        raise MomentsError(f"{path / METADATA} cannot be opened ({error.strerror or error}): check its permissions") from None


def dcp_files(path: Path) -> list[Path]:
    """The description and every rank's files."""
    common = [path / COMMON] if (path / COMMON).is_file() else []
    return [path / METADATA, *sorted(path.glob(PARTS)), *common] if path.is_dir() else [path]


def open_dcp(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """The reader. Raises MomentsError for missing, truncated or damaged files."""
    if not path.is_dir():
        raise MomentsError(f"{path} is one file of a checkpoint in many; name its folder instead: {path.parent}")
    from ota_core.moments.dcp.reader import open_folder

    return open_folder(path, layout, source_of)
