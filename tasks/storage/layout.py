"""Which files make a checkpoint, and ``expert.json``, the manifest that makes a prefix in S3 an expert."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ota_core.artifact import CARD, EXPERT_JSON, write_text_atomic
from ota_core.errors import StorageError
from ota_core.names import why_unsafe
from ota_core.plan.fit.manifest import odd_fact
from ota_core.reading import MAX_BYTES, SMALL, json_value, quoted, read_file
from tasks.storage.cache import HASH_THREADS
from tasks.storage.states import (
    CHECKPOINT,
    DCP,
    OPTIMIZERS,
    POINTERS,
    STATE_FOLDERS,
    Taken,
    belonging,
    in_state_folder,
    is_nanotron_file,
    is_state_folder,
    taken_in,
)

BESIDE = (EXPERT_JSON, CARD)
"""Files that are brought with a checkpoint, and are no part of it: they say what it is, and enter no digest."""

CODE = "*.py"
"""Code that a model brings along: brought with it, copied to what is merged, never run, and no part of a digest."""


def is_beside(name: str) -> bool:
    """Whether a file is brought with a checkpoint though it is no part of it."""
    return name in BESIDE or ("/" not in name and fnmatchcase(name, CODE))


# Weights, what is needed to build and feed the model, and second moments as trainers leave them. Nothing else is downloaded
# or enters a digest: a README or a training log does not make another model.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json", "generation_config.json",
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "optimizer*", "exp_avg_sq*", "*.pt", "*.pth", "adapter_config.json", "*.gguf",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "tekken.json", "*.spm", "target_vocab.json", "entity_vocab.json", "bpe.codes",
    "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json", "prophetnet.tokenizer", "word_*.json", "modules.json", "config_sentence_transformers.json",
    "sentence_*_config.json",
)  # fmt: skip
NOT_MODEL_FILES = ("training_args.bin", "scheduler.pt", "rng_state*", "scaler.pt", "*.lock", "*.part", "*.tmp")
# Subfolders of trainers that keep optimizer state there; everything in any other subfolder is somebody else's.
_SUBFOLDERS = (
    *STATE_FOLDERS, "pytorch_model_fsdp*", "exp_avg_sq*", "moments", "preconditioner*", "additional_chat_templates",
)  # fmt: skip
_OF_NANOTRON = ("model", "[0-9]*")
SENTENCE_PART = "[0-9]_[A-Z]*"
"""A part of a model of sentence-transformers behind the network: 1_Pooling, 2_Dense, 3_Normalize."""
_SUBFOLDER_FILES = ("*.distcp", ".metadata", "*.jinja", *MODEL_FILES)


def is_model_file(name: str) -> bool:
    """Whether a file, named relative to the checkpoint's folder with "/" between parts, belongs to the model."""
    *folders, base = name.split("/")
    if any(fnmatchcase(base, pattern) for pattern in NOT_MODEL_FILES):
        return False
    if is_nanotron_file(name):
        return True
    if len(folders) == 1 and fnmatchcase(folders[0], SENTENCE_PART):
        return base == "config.json" or fnmatchcase(base, "*.safetensors") or fnmatchcase(base, "*.bin")
    if not folders:
        return (
            base in POINTERS
            or any(fnmatchcase(base, pattern) for pattern in DCP)
            or (not base.startswith(".") and any(fnmatchcase(base, pattern) for pattern in MODEL_FILES))
        )
    if fnmatchcase(folders[0], CHECKPOINT):
        if len(folders) == 1:
            return base in (*OPTIMIZERS, *POINTERS)
        return is_state_folder(folders[1]) and is_model_file("/".join([*folders[1:], base]))
    return (
        len(folders) <= 3
        and any(fnmatchcase(folders[0], pattern) for pattern in _SUBFOLDERS)
        and any(fnmatchcase(base, pattern) for pattern in _SUBFOLDER_FILES)
        and in_state_folder(folders[0], base)
    )


def model_files(names: Iterable[str], taken: Taken = None) -> list[str]:
    """The files of the model among these, sorted. Where weights are there in both formats, the pickled ones are left out.

    Optimizer states belong to it when its second moments come from there, and only then (``states.belonging``); ``taken``: the checkpoint-*
    that fits the weights, where there are several.
    """
    chosen = belonging(sorted(name for name in names if is_model_file(name)), taken)
    if any(fnmatchcase(name, "model*.safetensors") for name in chosen):
        chosen = [name for name in chosen if not fnmatchcase(name, "pytorch_model*.bin*")]
    if any(fnmatchcase(name, "model*.safetensors") or fnmatchcase(name, "pytorch_model*.bin*") for name in chosen):
        chosen = [name for name in chosen if name != "adapter_config.json" and not name.endswith(".gguf")]
    return chosen


def folder_model_files(folder: Path) -> list[str]:
    """The model's files in a local folder, named relative to it."""
    found = [path.name for path in folder.iterdir() if path.is_file()]
    for sub in folder.iterdir():
        if sub.is_dir() and any(
            fnmatchcase(sub.name, pattern) for pattern in (*_SUBFOLDERS, CHECKPOINT, SENTENCE_PART, *_OF_NANOTRON)
        ):
            found += [path.relative_to(folder).as_posix() for path in sub.rglob("*") if path.is_file()]
    return model_files(found, taken_in(folder))


def check_sizes(sizes: Mapping[str, int], where: str) -> None:
    """Raise StorageError, before anything is brought or hashed, where a file that is read at once is larger than any such file."""
    for name, size in sizes.items():
        if size > MAX_BYTES and name.endswith(_TEXTS):
            raise StorageError(
                f"{where}: {name} has {size:,} bytes, a file of at most {MAX_BYTES:,} was expected; fetch or save it again"
            )


_TEXTS = (".json", ".jinja", ".txt", ".model", ".md", ".py", ".tiktoken")


def expert_manifest(
    folder: Path,
    *,
    capability: str,
    base_model: str,
    trained_at: str,
    step: int | None = None,
    beta2: float | None = None,
    optimizer: str | None = None,
) -> dict[str, Any]:
    """The manifest of an expert's folder: who it is, and size and SHA-256 of each of the model's files.

    ``trained_at`` is an ISO date or time. Raises StorageError when the folder holds no model files.
    """
    names = folder_model_files(folder)
    if not names:
        raise StorageError(f"{folder} holds no model files (weights, config, tokenizer); expected a Hugging Face checkpoint")
    known = {"step": step, "beta2": beta2, "optimizer": optimizer}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        sums = dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))
    return {
        "capability": capability,
        "base_model": base_model,
        "trained_at": trained_at,
        **{key: value for key, value in known.items() if value is not None},
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sums[name]} for name in names},
    }


def write_expert_json(folder: Path, **facts: Any) -> dict[str, Any]:
    """Write the manifest of an expert into its folder; ``facts`` as for ``expert_manifest``. Raises StorageError as that does."""
    manifest = expert_manifest(folder, **facts)
    write_text_atomic(folder / EXPERT_JSON, json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_expert_json(path: Path) -> dict[str, Any]:
    """The manifest in a file of this machine. Raises StorageError as ``parse_expert_json``, and where the file cannot be read."""
    try:
        return parse_expert_json(read_file(path, SMALL), str(path))
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error}); write it again") from None


def parse_expert_json(content: bytes, where: str) -> dict[str, Any]:
    """The manifest as a mapping. Raises StorageError when it is no JSON object or lacks a key."""
    try:
        manifest = json_value(content)
    except ValueError as error:
        raise StorageError(f"{where} is not JSON ({error}); write it again") from error
    missing = [key for key in ("capability", "base_model", "trained_at") if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise StorageError(f"{where} lacks {', '.join(missing)}; expected a JSON object with capability, base_model, trained_at")
    if odd := odd_fact(manifest):
        raise StorageError(f"{where}: {odd}; write it again")
    manifest_sha256(manifest, where)
    return dict(manifest)


def manifest_sha256(manifest: Mapping[str, Any], where: str) -> dict[str, str]:
    """File name to SHA-256 in hex. Both ``"name": "<hex>"`` and ``"name": {"sha256": "<hex>"}`` are understood."""
    files = manifest.get("files", {})
    sums = {}
    for name, entry in files.items() if isinstance(files, dict) else [("files", files)]:
        value = entry.get("sha256") if isinstance(entry, dict) else entry
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise StorageError(
                f"{where}: files[{quoted(name)}] holds {quoted(entry)}, expected a sha256 of 64 hex digits; write it again"
            )
        if why := why_unsafe(name):
            raise StorageError(f"{where}: the file name {name[:80]!r} is refused: {why}; write it again")
        sums[name] = value.lower()
    return sums


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
