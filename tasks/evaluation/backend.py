"""What computes the answers of a benchmarked model: any model class of lm-eval by its name, in this process or behind a server's URL."""

import importlib.metadata
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ota_core.frozen import Frozen

HF = "hf"
CHAT = "local-chat-completions"
SERVERS = ("local-completions", CHAT)
"""Names in lm-eval of what asks a server of OpenAI's style."""

_PLAIN = (HF, "hf-auto", "huggingface")
_PACKAGES = {"vllm": "vllm", "vllm-vlm": "vllm", "sglang": "sglang"}
"""Backends whose package decides numbers, and has a version."""
_OURS = {
    "pretrained": "it is the model that is benchmarked",
    "model": "it is the model that is benchmarked; the server must serve it under its name",
    "base_url": "give it as server",
    "batch_size": "it is a key of the suite",
    "dtype": "it is a key of the suite",
    "device": "it is an option of the command",
}
_SECRET = ("auth_token", "header", "api_key", "token")
_RESOURCES = {
    "tensor_parallel_size", "tp_size", "pipeline_parallel_size", "data_parallel_size", "dp_size", "parallelize", "gpu_memory_utilization",
    "mem_fraction_static", "max_batch_size", "max_num_seqs", "num_concurrent", "timeout", "max_retries", "verify_certificate", "ca_cert_path",
}  # fmt: skip
"""Arguments that say with what means something is computed, not what."""


class Backend(Frozen):
    """One of lm-eval's model classes, and what is passed on to it."""

    name: str = Field(HF, min_length=1, description="As lm-eval names it: hf, vllm, sglang, local-completions, ….")
    server: str | None = Field(None, description="URL of the server's API, such as http://host:8000/v1.")
    args: dict[str, str | int | float | bool] = Field({}, description="Passed on to lm-eval's class under its own names.")

    @field_validator("server")
    @classmethod
    def _no_secrets(cls, raw: str | None) -> str | None:
        if raw is None:
            return None
        url = urlsplit(raw)
        if url.username or url.password or url.query or url.fragment:
            raise ValueError(
                "the server's URL carries more than an address; keys come from the environment (OPENAI_API_KEY), not from the URL"
            )
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError(f"server: got '{raw}', expected the URL of an API such as http://host:8000/v1")
        return raw.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [f"backend.args.{key}: {why}" for key, why in _OURS.items() if key in self.args]
        problems += [
            f"backend.args.{key}: keys come from the environment (OPENAI_API_KEY)" for key in _SECRET if key in self.args
        ]
        if self.server is not None and self.name not in SERVERS:
            problems.append(f"backend: {self.name} asks no server; take {' or '.join(SERVERS)} for one")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def is_server(self) -> bool:
        return self.name in SERVERS

    @property
    def package(self) -> str | None:
        """What must be installed for it beside lm-eval."""
        return _PACKAGES.get(self.name)

    def not_installed(self) -> str:
        """What to do where it cannot be imported."""
        extra = {
            "vllm": "pip install 'lm-eval[vllm]'",
            "sglang": "pip install sglang (https://docs.sglang.ai/get_started/install.html)",
        }
        how = extra.get(
            self.package or "", "pip install 'lm-eval[api]'" if self.is_server else "see lm-eval's documentation of it"
        )
        return f"backend {self.name} is not installed on this machine: {how}, on every machine that benchmarks"

    def identity(self) -> dict[str, Any]:
        """What of it identifies scores: nothing of the default (``hf`` without arguments), else name, arguments and the package's version.

        A server's address does not count, nor with what means something is computed (GPUs, memory, requests at a time); what software a
        server runs is not known. Raises PackageNotFoundError for a backend that is not installed.
        """
        args = {key: value for key, value in self.args.items() if key not in _RESOURCES}
        if self.name in _PLAIN and not args:
            return {}
        version = {"backend_version": importlib.metadata.version(self.package)} if self.package else {}
        return {"backend": {"name": self.name, "args": args}} | version

    def label(self) -> str | None:
        """For people; None for the default."""
        found = self.identity()
        return f"{self.name} {found.get('backend_version', '')}".strip() if found else None
