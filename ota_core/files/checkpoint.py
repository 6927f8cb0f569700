"""A checkpoint folder as named tensors, read lazily: safetensors, sharded or not, PyTorch's ``.bin``, or the shards of FSDP."""

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from ota_core.errors import CheckpointError
from ota_core.files.architecture import alone
from ota_core.files.byte_source import SourceOf
from ota_core.files.dcp.metadata import METADATA
from ota_core.files.gguf.sets import model_of
from ota_core.files.not_models import check_gathered
from ota_core.files.prefixes import plain_names, twice
from ota_core.files.rows import NUMBERS, Dtype, Rows
from ota_core.files.safetensors_io import SafetensorsFile, TensorInfo
from ota_core.files.weight_sets import ADAPTER_CONFIG as ADAPTER_CONFIG
from ota_core.files.weight_sets import ADAPTERS as ADAPTERS
from ota_core.files.weight_sets import GGUF as GGUF
from ota_core.files.weight_sets import SAFETENSORS_INDEX as SAFETENSORS_INDEX
from ota_core.files.weight_sets import adapter_of as adapter_of
from ota_core.files.weight_sets import check_index, passed_over
from ota_core.files.weight_sets import read_json as read_json
from ota_core.files.weight_sets import weight_files as weight_files
from ota_core.reading import printable, quoted

# Files beside the weights that belong to a model. What matches is copied from the source of the output's tokenizer and config.
CONFIG_FILES = ("config.json", "generation_config.json")
# One of these is there where a folder holds a tokenizer.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "spm*.model", "sentencepiece*.model", "*.spm",
)  # fmt: skip
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "tekken.json", "spm*.model", "sentencepiece*.model", "*.spm", "*vocab*.json", "vocab-*.json", "bpe.codes", "byte_maps.json",
    "dict.txt", "emoji.json", "normalizer.json", "prophetnet.tokenizer", "word_*.json",
)  # fmt: skip
"""What transformers' tokenizers and processors call their files, and Mistral's own (tekken.json)."""
SENTENCES = (
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/config.json", "[0-9]_*/*.safetensors", "[0-9]_*/*.bin",
)  # fmt: skip
"""How sentence-transformers makes one vector of a text: without these files it takes a mean, whatever the model was trained with."""


LONGEST_NAME = 1000
"""Characters of a tensor's name."""

if TYPE_CHECKING:
    from ota_core.files.dcp.weights import DcpWeights
    from ota_core.files.gguf.file import GgufFile  # it needs gguf
    from ota_core.files.layouts.relaid import RelaidWeights
    from ota_core.files.pickled.bin_file import BinFile
    from ota_core.files.quantised.model import QuantisedWeights  # it needs numba

WeightFile: TypeAlias = "SafetensorsFile | BinFile | DcpWeights | GgufFile | QuantisedWeights | RelaidWeights"
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
        self.notes = passed_over(self.path, files)
        """What a user should know of how the folder was read."""
        self.sharded = files[0].name == METADATA
        """Whether the weights are the shards of FSDP, whose folder usually holds no configuration."""
        # The ranks' files of a sharded checkpoint are read together, through their description, and so are the parts of a GGUF file.
        together = self.sharded or files[0].suffix == GGUF
        self.files = [open_weights(file, source_of) for file in (files[:1] if together else files)]
        where: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.infos:
                if name in where:
                    raise CheckpointError(
                        f"{self.path}: tensor '{name}' is in both {where[name].path.name} and {file.path.name}; expected it once"
                    )
                where[name] = file
        if (odd := next((name for name in where if len(name) > LONGEST_NAME or name != printable(name)), None)) is not None:
            raise CheckpointError(
                f"{self.path}: a tensor is called {quoted(odd, 80)} in {where[odd].path.name}; expected a name of at most {LONGEST_NAME} characters without control "
                "characters: fetch or save the model again"
            )
        plain = plain_names(where)
        if double := twice(plain):
            raise CheckpointError(
                f"{self.path}: tensor '{double[0]}' and another one are both '{plain[double[0]]}' without the prefixes that wrappers "
                "of a model leave in names; keep one of them"
            )
        # Trainers write it into the folder of the run, where a sharded checkpoint's own folder has none.
        configs = [folder / "config.json" for folder in ((self.path, self.path.parent) if self.sharded else (self.path,))]
        self.config = next((read_json(config) for config in configs if config.exists()), getattr(self.files[0], "config", {}))
        check_index(self.path, files, {name: file.path.name for name, file in where.items()}, self.config)
        self._where = {plain[name]: (file, name) for name, file in where.items()}
        check_gathered(self.path, {name: file.infos[stored] for name, (file, stored) in self._where.items()})
        self.quantised = self._read_codes()
        """The weights that are stored as codes and read as the numbers that they stand for; None where all are plain."""
        if self.quantised is not None:
            self.notes.append(
                f"{self.quantised.label}: dequantised with their own scales as they are read; the output is not quantised"
            )
        self.rename(alone(self.config, self._where))

    def _read_codes(self) -> "QuantisedWeights | None":
        """Put the weights that are stored as codes in the place of the codes; scales are no tensors of the model."""
        if all(file.infos[held].dtype in NUMBERS for file, held in self._where.values()):
            return None
        from ota_core.files.quantised.model import quantised_weights
        from ota_core.files.quantised.stored import Stored

        stored = {name: Stored(file, held) for name, (file, held) in self._where.items()}
        found = quantised_weights(self.path, self.config, stored)
        if found is not None:
            at = {found.place(name): name for name in found.infos}
            places = {at.get(name, name): place for name, place in self._where.items() if name not in found.parts}
            self._where = {name: (found, name) if name in found.infos else place for name, place in places.items()}
        return found

    def names(self) -> list[str]:
        """All tensor names, sorted, without what ``torch.compile``, FSDP and other wrappers put into them."""
        return sorted(self._where)

    def rename(self, names: Mapping[str, str]) -> None:
        """Know tensors by other names from now on. names: present name to new one. Raises CheckpointError when two would be one."""
        renamed = {names.get(name, name): place for name, place in self._where.items()}
        if len(renamed) < len(self._where):
            (double, *_) = [name for name in names if names[name] in self._where and names[name] not in names]
            raise CheckpointError(
                f"{self.path}: '{double}' and '{names[double]}' are the same tensor of the model; keep one of them"
            )
        self._where = renamed

    def leave_aside(self, names: Collection[str]) -> None:
        """Take no notice of these tensors from now on."""
        self._where = {name: place for name, place in self._where.items() if name not in names}

    def as_it_is(self) -> Self:
        """The same tensors under the names that they have now, whatever these become; closing it is not needed."""
        return copy(self)

    def replace(self, names: Collection[str], made: "RelaidWeights") -> None:
        """From now on hold these tensors in the place of those."""
        self.leave_aside(names)
        self._where = self._where | {name: (made, name) for name in made.infos}

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

        return GgufFile(
            [path.parent / name for name in model_of(path.name, (one.name for one in path.parent.glob(f"*{GGUF}")))], source_of
        )
    if path.suffix != ".safetensors":
        from ota_core.files.pickled.bin_file import BinFile

        return BinFile(path, source_of)
    return SafetensorsFile(path, source_of(path) if source_of else None)


def companion_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of a model folder that match, each once, sorted by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
