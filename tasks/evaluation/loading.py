"""Models as lm-eval's model classes: loaded in this process, or asked for at a server."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import read_json
from tasks.evaluation.backend import CHAT, Backend
from tasks.evaluation.suites import Suite, SuiteError

_OWN_DEVICES = ("vllm", "vllm-vlm", "sglang")
"""Backends that choose their GPUs by themselves."""


def backend_class(backend: Backend) -> Any:
    """lm-eval's class of that name. Raises SuiteError for an unknown one, and for one that needs what is not installed."""
    import lm_eval.models  # noqa: F401 - fills the registry
    from lm_eval.api.registry import get_model

    try:
        return get_model(backend.name)
    except ImportError as error:
        raise SuiteError(f"{backend.not_installed()} ({error})") from error
    except ValueError as error:
        raise SuiteError(f"backend: {error}") from error


def load_model(model: Path, suite: Suite, device: str, served_as: Sequence[str] = ()) -> Any:
    """The model as lm-eval asks it. Raises CheckpointError for one that cannot be loaded, SuiteError for a server that does not serve it."""
    from safetensors import SafetensorError

    backend = suite.backend
    kind = backend_class(backend)
    # An absolute path can never be taken for a name on the hub.
    folder = str(model.resolve())
    if backend.is_server:
        arguments = _at_server(model, suite, [*served_as, folder])
    else:
        arguments = {"pretrained": folder, "dtype": suite.dtype or "auto"}
        arguments |= {} if backend.name in _OWN_DEVICES else {"device": device}
    try:
        lm = kind(**(arguments | {"batch_size": suite.batch_size} | backend.args))
    except ModuleNotFoundError as error:
        raise SuiteError(f"{backend.not_installed()} ({error})") from error
    except TypeError as error:
        raise SuiteError(f"backend {backend.name} does not take these arguments: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{model} cannot be loaded for the benchmark: {type(error).__name__}: {error}") from error
    if backend.is_server and backend.name != CHAT:
        _begin_once(lm)
    if suite.apply_chat_template and backend.name != CHAT and not getattr(lm.tokenizer, "chat_template", None):
        raise SuiteError(f"suite {suite.name} sets apply_chat_template, but the tokenizer of {model} has no chat template")
    return lm


def _at_server(model: Path, suite: Suite, names: Sequence[str]) -> dict[str, Any]:
    """What lm-eval needs to ask a server as it asks a loaded model: the same tokens, as long a context."""
    backend = suite.backend
    if backend.server is None:
        raise SuiteError(f"backend {backend.name} asks a server; name it: server in the suite's backend, or the option --server")
    served = _served(backend.server)
    name = next((one for one in names if one in served), None)
    if name is None:
        raise SuiteError(
            f"{backend.server} serves {', '.join(served) or 'nothing'}, not {names[0]}; serve the model under that name "
            f"(vllm serve {names[-1]} --served-model-name {names[0]})"
        )
    if backend.name == CHAT:
        return {"model": name, "base_url": f"{backend.server}/chat/completions"}
    length = read_json(model / "config.json").get("max_position_embeddings")
    return {
        "model": name, "base_url": f"{backend.server}/completions", "tokenizer": names[-1], "tokenizer_backend": "huggingface",
        "add_bos_token": _adds_special_tokens(names[-1]), **({"max_length": length} if length else {}),
    }  # fmt: skip


def _served(server: str) -> list[str]:
    """The names of the models that a server serves."""
    import httpx

    key = os.environ.get("OPENAI_API_KEY")
    try:
        answer = httpx.get(f"{server}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30)
        answer.raise_for_status()
        return [str(one["id"]) for one in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise SuiteError(
            f"{server} does not say which models it serves ({type(error).__name__}: {error}); expected the API of an OpenAI-style server, such "
            "as http://host:8000/v1"
        ) from error


def _adds_special_tokens(model: str) -> bool:
    """Whether the tokenizer puts special tokens around every text, which lm-eval's ``hf`` lets it do."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return bool(tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids)


def _begin_once(lm: Any) -> None:
    """Where a template has written the token that texts begin with, it is not put there again, as with lm-eval's ``hf``."""
    encode, first = lm.tok_encode, getattr(lm.tokenizer, "bos_token_id", None)

    def once(ids: list[Any]) -> list[Any]:
        if ids and isinstance(ids[0], list):
            return [once(one) for one in ids]
        return ids[1:] if first is not None and ids[:2] == [first, first] else ids

    lm.tok_encode = lambda *args, **kwargs: once(encode(*args, **kwargs))
