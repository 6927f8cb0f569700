"""A checkpoint folder as named tensors, read lazily: safetensors, sharded or not, PyTorch's ``.bin``, or the shards of FSDP."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.dcp.metadata import METADATA
from ota_core.files.prefixes import plain_names, twice
from ota_core.files.rows import Dtype, Rows
from ota_core.files.safetensors_io import SafetensorsFile, TensorInfo
from ota_core.names import why_unsafe

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""The weights of an adapter as PEFT names them."""
GGUF = ".gguf"
# Files beside the weights that belong to a model. What matches is copied from the source of the output's tokenizer and config.
CONFIG_FILES = ("config.json", "generation_config.json")
# One of these is there where a folder holds a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


if TYPE_CHECKING:
    from ota_core.files.bin_file import BinFile
    from ota_core.files.dcp.weights import DcpWeights
    from ota_core.files.gguf.file import GgufFile  # it needs gguf

WeightFile: TypeAlias = "SafetensorsFile | BinFile | DcpWeights | GgufFile"
"""One file of tensors."""


class Checkpoint:
    """The tensors of one model folder. Raises CheckpointError when files are missing, truncated or contradict the index."""

    def __init__(self, path: Path | str, source_of: SourceOf | None = None) -> None:
        """``source_of`` says where the weights' bytes come from; configuration, index and file names are always the folder's own."""
        self.path = Path(path)
        files = weight_files(self.path)
        if files[0].name in ADAPTERS:
            raise CheckpointError(
                f"{self.path} holds a LoRA adapter, not a whole model; name it together with its base, as base+adapter, or give the recipe "
                "the base_model that it was trained on"
            )
        self.folders: tuple[Path, ...] = (self.path,)
        """Where configuration and tokenizer are looked for, the first that holds them."""
        self.known_as: tuple[str, ...] = ()
        """What else the model is called, beside its folder."""
        self.notes = _notes(self.path)
        """What a user should know of how the folder was read."""
        self.sharded = files[0].name == METADATA
        """Whether the weights are the shards of FSDP, whose folder usually holds no configuration."""
        # The ranks' files of a sharded checkpoint are read together, through their description.
        self.files = [open_weights(file, source_of) for file in (files[:1] if self.sharded else files)]
        where: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.infos:
                if name in where:
                    raise CheckpointError(
                        f"{self.path}: tensor '{name}' is in both {where[name].path.name} and {file.path.name}; expected it once"
                    )
                where[name] = file
        _check_index(self.path, where)
        plain = plain_names(where)
        if double := twice(plain):
            raise CheckpointError(
                f"{self.path}: tensor '{double[0]}' and another one are both '{plain[double[0]]}' without the prefixes that wrappers "
                "of a model leave in names; keep one of them"
            )
        self._where = {plain[name]: (file, name) for name, file in where.items()}
        # Trainers write it into the folder of the run, where a sharded checkpoint's own folder has none.
        configs = [folder / "config.json" for folder in ((self.path, self.path.parent) if self.sharded else (self.path,))]
        self.config = next((read_json(config) for config in configs if config.exists()), getattr(self.files[0], "config", {}))

    def names(self) -> list[str]:
        """All tensor names, sorted, without what ``torch.compile``, FSDP and other wrappers put into them."""
        return sorted(self._where)

    def names_by_place(self) -> list[str]:
        """The same in the order of the tensors in their files."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor."""
        if name not in self._where:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        file, stored = self._where[name]
        return file.infos[stored]

    def kept_dtype(self, name: str) -> Dtype:
        """The type that the tensor has in a model like this one: as it is stored, where reading it does not make another of it."""
        dtype = self.info(name).dtype
        return getattr(self.files[0], "kept", dtype) if dtype.is_floating_point else dtype

    @property
    def config_folder(self) -> Path:
        """The folder of the model's configuration."""
        return next((folder for folder in self.folders if (folder / "config.json").is_file()), self.path)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the model's tokenizer."""
        return next((folder for folder in self.folders if companion_files(folder, TOKENIZERS)), self.config_folder)

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows start:stop of the matrix of ``blocks.matrix_shape``, in the stored dtype; a view of the file, not to be written to."""
        file, stored = self._where[name]
        return file.read_rows(stored, start, stop)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """The same rows are read soon: a hint that costs little and may be repeated."""
        file, stored = self._where[name]
        file.prefetch(stored, start, stop)

    def drop_pages(self) -> None:
        """Give the mapped pages that were read back to the kernel; what is read again comes from its page cache."""
        for file in self.files:
            file.drop_pages()

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_weights(path: Path, source_of: SourceOf | None = None) -> WeightFile:
    """One file of tensors, of whichever kind. Raises CheckpointError."""
    if path.name == METADATA:
        from ota_core.files.dcp.weights import DcpWeights

        return DcpWeights(path.parent, source_of)
    if path.suffix == GGUF:
        from ota_core.files.gguf.file import GgufFile

        return GgufFile(path, source_of)
    if path.suffix != ".safetensors":
        from ota_core.files.bin_file import BinFile

        return BinFile(path, source_of)
    return SafetensorsFile(path, source_of(path) if source_of else None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a JSON file") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights. Raises CheckpointError when there are none, or it is unclear which."""
    if not folder.is_dir():
        seen = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {seen}; expected a checkpoint folder with config.json and *.safetensors")
    for index in (SAFETENSORS_INDEX, BIN_INDEX):
        if (folder / index).exists():
            return [folder / name for name in sorted(set(_weight_map(folder / index).values()))]
        single = folder / index.removesuffix(".index.json")
        if single.exists():
            return [single]
    if (adapter := _adapter(folder)) is not None:
        return [adapter]
    candidates = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith(("exp_avg", "optimizer")))
    if len(candidates) == 1:
        return candidates
    if candidates:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} safetensors files and no {SAFETENSORS_INDEX} "
            f"({', '.join(p.name for p in candidates[:4])}, …); expected the index that says which belong to the model"
        )
    if ggufs := sorted(folder.glob(f"*{GGUF}")):
        if len(ggufs) > 1:
            raise CheckpointError(
                f"{folder} holds {len(ggufs)} GGUF files ({', '.join(path.name for path in ggufs[:6])}); name the one that is meant, {ggufs[0]}"
            )
        return ggufs
    from ota_core.files.dcp.weights import dcp_files, weights_folder

    if (sharded := weights_folder(folder)) is not None:
        return dcp_files(sharded)
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} holds no weights (it holds: {held}); expected model.safetensors, shards with {SAFETENSORS_INDEX}, pytorch_model.bin, or pytorch_model_fsdp_0/ of FSDP"
    )


def adapter_of(folder: Path) -> Path | None:
    """The file of an adapter's weights, where a folder holds an adapter and no whole model. Raises CheckpointError as ``weight_files``."""
    if not any((folder / name).exists() for name in (ADAPTER_CONFIG, *ADAPTERS)):
        return None
    first = weight_files(folder)[0]
    return first if first.name in ADAPTERS else None


def _adapter(folder: Path) -> Path | None:
    """The file of an adapter's weights. Raises CheckpointError where it is missing, or lies in subfolders."""
    if (found := next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)) is not None:
        return found
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} holds {ADAPTER_CONFIG} and none of {', '.join(ADAPTERS)}; fetch the adapter again")
    if inside and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds adapters in folders of their own: {', '.join(inside)}; name the one that is meant")
    return None


def _notes(folder: Path) -> list[str]:
    if any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTERS)):
        return [f"{folder} holds a whole model and an adapter; the whole model is read"]
    return []


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} holds no weight_map; expected tensor names with the file of each")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or why_unsafe(file):
            raise CheckpointError(f"{index}: tensor '{name}' lies in {file!r}; expected the name of a file beside the index")
    return weight_map


def _check_index(folder: Path, where: dict[str, WeightFile]) -> None:
    for name in (SAFETENSORS_INDEX, BIN_INDEX):
        if (folder / name).exists():
            listed = _weight_map(folder / name)
            problems = [
                f"{folder / name} says that tensor '{tensor}' lies in {file}, "
                + (f"it lies in {where[tensor].path.name}" if tensor in where else "but no file holds it")
                for tensor, file in sorted(listed.items())
                if tensor not in where or where[tensor].path.name != file
            ]
            problems += [
                f"{where[tensor].path} holds tensor '{tensor}', which {name} does not list"
                for tensor in sorted(set(where) - set(listed))
            ]
            raise_all(problems, CheckpointError)
            return


def companion_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of a model folder that match, each once, sorted by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
