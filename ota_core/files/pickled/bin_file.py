"""A PyTorch ``.bin`` of weights, read without torch."""

from pathlib import Path

from ota_core.compute.descriptors import check_limit
from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.files.rows import NAMED, Rows
from ota_core.files.safetensors_io import TensorInfo


class BinFile:
    """A ``.bin`` of torch.save, read by ranges rather than loaded; nothing but tensors comes out of it."""

    def __init__(self, path: Path, source_of: SourceOf | None) -> None:
        self.path = path
        try:
            self._file = TorchFile(path, source_of)
            state = self._file.saved
            if isinstance(state, dict):
                self._file.check(value for value in state.values() if isinstance(value, SavedTensor))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; the index lists it: fetch the checkpoint again") from None
        except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
            if isinstance(error, OSError):
                check_limit(error)
            raise CheckpointError(
                f"{path} cannot be read as PyTorch weights ({str(error).split(chr(10))[0]}); expected a file of torch.save with tensors "
                "only. Save the model as safetensors, or fetch the file again"
            ) from None
        if not isinstance(state, dict) or not all(isinstance(value, SavedTensor) for value in state.values()):
            raise CheckpointError(
                f"{path} holds {type(state).__name__}, expected a dictionary of tensors: is this a model's state dict?"
            )
        self._state: dict[str, SavedTensor] = state
        self.infos = {
            name: TensorInfo(name, NAMED[value.dtype], value.shape, 0, value.numel * NAMED[value.dtype].itemsize)
            for name, value in self._state.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        return self._file.read_rows(self._state[name], start, stop)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._file.prefetch(self._state[name], start, stop)

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        self._state = {}
        self._file.close()
