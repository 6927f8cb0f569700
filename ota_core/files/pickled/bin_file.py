"""A PyTorch ``.bin`` of weights, read without torch."""

from pathlib import Path
from typing import Any

from ota_core.compute.descriptors import check_limit
from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf, open_source
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.files.rows import NAMED, Rows
from ota_core.files.safetensors_io import TensorInfo, other_format
from ota_core.reading import quoted


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
            raise CheckpointError(_unreadable(path, source_of, str(error).split("\n")[0])) from None
        if not isinstance(state, dict) or not all(isinstance(value, SavedTensor) for value in state.values()):
            self._file.close()
            raise CheckpointError(_no_weights(path, state))
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


def _unreadable(path: Path, source_of: SourceOf | None, why: str) -> str:
    try:
        source = open_source(path, source_of)
        first = bytes(source.read(0, min(16, source.size)))
        source.close()
    except OSError:
        first = b"?"
    if not first:
        return f"{path} cannot be read as PyTorch weights: it is empty; fetch the file again"
    text = f"{path} cannot be read as PyTorch weights ({why}); expected a file of torch.save with tensors only."
    if not first.startswith((b"PK", b"\x80")):
        return f"{text}{other_format(first)} Save the model as safetensors, or fetch the file again"
    if "is compressed" in why:
        return f"{text} Write it as torch.save does: {_python(path, 'torch.load(%r, weights_only=True)')}"
    if "could run code" in why:
        return f"{text} Save its tensors alone where it is trusted, as loading it runs what it names: " + _python(
            path, "torch.load(%r, weights_only=False).state_dict()"
        )
    return f"{text} Save the model as safetensors, or fetch the file again"


def _no_weights(path: Path, state: Any) -> str:
    """What a file of torch.save holds instead of a dictionary of tensors, and what to do."""
    if not isinstance(state, dict):
        return f"{path} holds {type(state).__name__}, expected a dictionary of tensors: is this a model's state dict?"
    inside = [
        key for key, value in state.items() if isinstance(value, dict) and any(isinstance(x, SavedTensor) for x in value.values())
    ]
    if len(inside) == 1 or "state_dict" in inside or "model" in inside:
        key = next((key for key in ("state_dict", "model") if key in inside), inside[0])
        held = ", ".join(sorted(quoted(one) for one in state if one != key)[:4]) or "nothing"
        return (
            f"{path} holds a training state: the weights are under {quoted(key)}, beside {held}, and transformers does not look there. Save them alone: "
            + _python(path, f"torch.load(%r, weights_only=True)[{key!r}]")
        )
    others = {key: type(value).__name__ for key, value in state.items() if not isinstance(value, SavedTensor)}
    said = ", ".join(f"{quoted(key)} ({kind})" for key, kind in list(others.items())[:4])
    if len(others) == len(state):
        return f"{path} holds dict without tensors ({said or 'it is empty'}), expected a dictionary of tensors: is this a model's state dict?"
    return (
        f"{path} holds {len(others)} values that are no tensors: {said}; a dictionary of tensors was expected. Save these alone: "
        + _python(path, "{k: v for k, v in torch.load(%r, weights_only=True).items() if torch.is_tensor(v)}")
    )


def _python(path: Path, loaded: str) -> str:
    return f"python -c \"import torch; torch.save({loaded % str(path)}, '{path.with_suffix('.plain.bin').name}')\""
