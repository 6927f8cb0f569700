"""Configuration and tokenizer that a GGUF file holds itself, as transformers reads them, in a folder of the cache."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import GGUF, open_weights, weight_files
from ota_core.files.gguf.file import GgufFile
from ota_core.files.layouts.stored import Loaded
from tasks.merging.architecture import parameters_of
from tasks.storage.cache import appearing, locked, note_use

log = logging.getLogger(__name__)
VERSION = 3  # of what is written: another version does not use this one's


def gguf_companions(folder: Path, cache: Path) -> Path | None:
    """The folder, None where the model is no GGUF file or has a configuration beside it. Raises CheckpointError for metadata that transformers
    cannot read."""
    if (folder / "config.json").is_file():
        return None
    file = None
    with suppress(CheckpointError):  # said with all else that is wrong when the checkpoints are opened
        file = weight_files(folder)[0]
    if file is None or file.suffix != GGUF:
        return None
    state = file.stat()
    key = json.dumps([VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns])
    made = cache / "gguf-companions" / hashlib.sha256(key.encode()).hexdigest()[:32]
    with locked(cache, f"gguf {made.name}"):
        if not made.is_dir():
            with appearing(made) as temporary:
                _write(file, temporary)
        note_use(made)
    return made


def loaded_of(folder: Path, cache: Path, source_of: SourceOf | None) -> Callable[[], Loaded]:
    """What the tensors in a model's folder become as transformers loads it, told when it is asked for."""
    return lambda: parameters_of(folder, source_of, gguf_companions(folder, cache))


def _write(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, MixtralConfig

    try:
        config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        opened = open_weights(file)
        assert isinstance(opened, GgufFile)
        form = opened.config
        if form["model_type"] == "mixtral":  # transformers takes it for a Llama of the same sizes, as llama.cpp calls it
            known = MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
            config = MixtralConfig(**{key: value for key, value in config.to_dict().items() if key in known})
        for key in form.keys() & config.to_dict().keys() - {"model_type"}:
            setattr(config, key, form[key])
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        if opened.scales_rotation:
            _without_rotation(folder / "config.json", file)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    except Exception as error:  # the architectures' own code runs here and raises what it likes
        raise CheckpointError(
            f"{file}: transformers reads no configuration from it ({type(error).__name__}: {error}); put the model's config.json and tokenizer "
            "beside it"
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # likewise
        log.warning(
            "%s: transformers reads no tokenizer from it (%s: %s); put the model's tokenizer beside it where one is needed",
            file, type(error).__name__, error,
        )  # fmt: skip


def _without_rotation(config: Path, file: Path) -> None:
    """Take out of a configuration what it says of rotary embeddings: transformers does not read how a GGUF file scales them."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        settings.pop(key, None)
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    log.warning(
        "%s: it scales its rotary embeddings, and transformers does not read how; a merge that takes its configuration from this file lacks that: put the "
        "model's config.json beside it, or give the original checkpoint as base_model",
        file,
    )
