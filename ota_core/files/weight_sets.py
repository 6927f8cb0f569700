"""Which of a folder's files are the model's weights: those that transformers would load, where there are several sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError, raise_all
from ota_core.files.dcp.metadata import METADATA
from ota_core.files.gguf.sets import only_model
from ota_core.files.not_models import what_it_is
from ota_core.names import why_unsafe
from ota_core.reading import json_value, quoted, read_file

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""The weights of an adapter as PEFT names them."""
GGUF = ".gguf"
# In the order of transformers (modeling_utils._get_resolved_checkpoint_files): a single file wins over an index, safetensors over a pickle.
SETS = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", BIN_INDEX)
NAMED = "transformers_weights"
"""Key of config.json that names the weights' file, where other files have the usual names."""
# Tensors that transformers ties to another one and leaves out of the files; an index may list them all the same.
_ALIASES = (
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "embed_tokens.weight",
    "decoder.weight",
    "decoder.bias",
    "output.weight",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or damaged."""
    try:
        value = json_value(read_file(path))
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
    sets = _sets(folder)
    if sets:
        return _files_of(folder / sets[0])
    if (adapter := _adapter(folder)) is not None:
        return [adapter]
    candidates = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith(("exp_avg", "optimizer")))
    if len(candidates) == 1:
        return candidates
    if not candidates and (ggufs := sorted(path.name for path in folder.glob(f"*{GGUF}"))):
        return _gguf(folder, ggufs)
    if not candidates:
        from ota_core.files.dcp.weights import dcp_files, weights_folder

        if (sharded := weights_folder(folder)) is not None:
            return dcp_files(sharded)
    if (named := what_it_is(folder)) is not None:
        raise CheckpointError(f"{folder} {named}")
    if candidates:
        raise CheckpointError(
            f"{folder} holds {len(candidates)} safetensors files and no {SAFETENSORS_INDEX} "
            f"({', '.join(p.name for p in candidates[:4])}, …); expected the index that says which belong to the model"
        )
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} holds no weights (it holds: {held}); expected model.safetensors, shards with {SAFETENSORS_INDEX}, pytorch_model.bin, or "
        "pytorch_model_fsdp_0/ of FSDP"
    )


def _gguf(folder: Path, names: list[str]) -> list[Path]:
    """The files of the one GGUF model in a folder."""
    try:
        return [folder / name for name in only_model(folder, names, f"name the one that is meant, {folder}/{{name}}")]
    except ValueError as error:
        raise CheckpointError(str(error)) from None


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


def _sets(folder: Path) -> list[str]:
    """The sets of weights in a folder, the one that transformers loads first."""
    return [*_named(folder), *(name for name in SETS if (folder / name).exists())]


def _named(folder: Path) -> list[str]:
    config = folder / "config.json"
    name = read_json(config).get(NAMED) if config.is_file() and NAMED.encode() in _bytes_of(config) else None
    if name is None or name == "adapter_model.bin":
        return []
    if not isinstance(name, str) or "/" in name or why_unsafe(name) or not (folder / name).exists():
        raise CheckpointError(f"{config} names the weights' file {quoted(name)} ({NAMED}); expected a file beside it")
    return [name]


def _bytes_of(path: Path) -> bytes:
    """A file's bytes: most configurations hold no such key, and need not be parsed for it. Raises CheckpointError."""
    try:
        return read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); fetch it again") from None


def _files_of(first: Path) -> list[Path]:
    """The files of a set, which is one file or an index of several."""
    if first.name.endswith(".index.json"):
        return [first.parent / name for name in sorted(set(weight_map(first).values()))]
    return [first]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor to the file that holds it, as an index has it. Raises CheckpointError for anything else."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} holds no weight_map; expected tensor names with the file of each")
    for name, file in listed.items():
        if not isinstance(file, str) or "/" in file or why_unsafe(file):
            raise CheckpointError(
                f"{index}: tensor '{name}' lies in {quoted(file)}; expected the name of a file beside the index"
            )
    return listed


def passed_over(folder: Path, files: Sequence[Path]) -> list[str]:
    """A note on each further set of weights in the folder, which is not read."""
    sets = _sets(folder) if files[0].name != METADATA else []
    notes = []
    if files[0].name not in ADAPTERS and any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTERS)):
        notes.append(f"{folder} holds a whole model and an adapter; the whole model is read")
    for name in sets[1:]:
        others = [file for file in _listed(folder / name) if file not in files]
        # An index that lists nothing but the files that are read describes the same set.
        if not others:
            continue
        newer = max(file.stat().st_mtime for file in others) > max(file.stat().st_mtime for file in files)
        notes.append(
            f"{folder} holds several sets of weights; {sets[0]} is read, as transformers does, and not {name}"
            + (", though its files are newer: remove the set that is not meant" if newer else "")
        )
    return notes


def _listed(first: Path) -> list[Path]:
    """Those files of a set that are there; none where its index is damaged, for it is not read."""
    try:
        return [file for file in _files_of(first) if file.exists()]
    except CheckpointError:
        return []


def check_index(folder: Path, files: Sequence[Path], where: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the index that led to the files contradicts them. where: tensor to the name of its file.

    An entry that no file holds is fine for a tensor that is tied to another one: who writes the index may list it, the files leave it out.
    """
    sets = _sets(folder) if files[0].name != METADATA else []
    if not sets or not sets[0].endswith(".index.json"):
        return
    name, listed = sets[0], weight_map(folder / sets[0])
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None) is not False
    problems = [
        f"{folder / name} says that tensor '{tensor}' lies in {file}, "
        + (f"it lies in {where[tensor]}" if tensor in where else "but no file holds it")
        for tensor, file in sorted(listed.items())
        if where.get(tensor) != file and not (tensor not in where and tied and tensor.endswith(_ALIASES))
    ]
    problems += [
        f"{folder / where[tensor]} holds tensor '{tensor}', which {name} does not list"
        for tensor in sorted(set(where) - set(listed))
    ]
    raise_all(problems, CheckpointError)
