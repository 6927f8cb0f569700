"""A model's weights in a folder of DCP, as one file of tensors among those of a checkpoint."""

from math import prod
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf
from ota_core.files.dcp.folder import DcpFolder
from ota_core.files.dcp.metadata import METADATA, DcpTensor, read_metadata
from ota_core.files.rows import Rows
from ota_core.files.safetensors_io import TensorInfo

# Where trainers put them: accelerate's FSDP, OLMo-core; others in the folder of the step itself.
FOLDERS = ("pytorch_model_fsdp_0", "model_and_optim", ".")
MODEL = "model"  # the key of the outer dictionary under which trainers save a model beside other things


class DcpWeights:
    """The tensors below the key ``model``, or, where nothing lies there, those that lie below no other key."""

    def __init__(self, path: Path, source_of: SourceOf | None = None) -> None:
        """Raises CheckpointError for missing, truncated or damaged files."""
        self.path = path
        self._folder = DcpFolder(path, source_of)
        self._keys = weight_names(self._folder.tensors, self._folder.paths)
        self.infos: dict[str, TensorInfo] = {}
        for name, key in self._keys.items():
            tensor = self._folder.tensors[key]
            self.infos[name] = TensorInfo(name, tensor.dtype, tensor.shape, 0, prod(tensor.shape) * tensor.dtype.itemsize)

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows start:stop of the matrix of ``blocks.matrix_shape``, in the stored dtype; not to be written to."""
        return self._folder.read_rows(self._keys[name], start, stop)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._folder.prefetch(self._keys[name], start, stop)

    def drop_pages(self) -> None:
        self._folder.drop_pages()

    def close(self) -> None:
        self._folder.close()


def weight_names(tensors: dict[str, DcpTensor], paths: dict[str, tuple[Any, ...]]) -> dict[str, str]:
    """Name of a weight to its tensor in the folder. Where the writer noted no paths, names with an optimizer's state are left out."""
    ways = {key: paths.get(key, (key,)) for key in tensors}
    below = {".".join(map(str, way[1:])): key for key, way in ways.items() if len(way) > 1 and way[0] == MODEL}
    return below or {
        key: key for key, way in ways.items() if len(way) == 1 and not key.startswith(("optimizer.", "optim.", "state."))
    }


def weights_folder(folder: Path) -> Path | None:
    """The folder of DCP with the weights of a model, in or at a checkpoint's folder; None where there is none."""
    for name in FOLDERS:
        one = folder / name
        if not (one / METADATA).is_file():
            continue
        listing = read_metadata(one)
        if weight_names(listing.tensors, listing.paths):
            return one
    return None


def dcp_files(folder: Path) -> list[Path]:
    """The description of a folder of DCP, and the ranks' files. Raises CheckpointError when it names files that are not there."""
    listing = read_metadata(folder)
    named = {chunk.place.file for tensor in listing.tensors.values() for chunk in tensor.chunks}
    lost = sorted(name for name in named if not (folder / name).is_file())
    if lost:
        raise CheckpointError(f"{folder} lacks {', '.join(lost[:8])}, which its {METADATA} names; fetch the checkpoint again")
    return [folder / METADATA, *(folder / name for name in sorted(named))]
