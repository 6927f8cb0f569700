"""What stands beside the weights of a merged model: its configuration, tokenizer, chat template and the code that it brings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ota_core.plan.fit.chat_template import template_in, write_template

CODE = ("*.py",)
"""Code that a model brings along, which ``auto_map`` of its configuration names: copied, never run."""
_TEXT = ("text_config", "llm_config", "language_config")


def set_rows(config: dict[str, Any], rows: int) -> None:
    """Say that the vocabulary has this many rows, where the configuration says how many: at its top, in its language model's part, or both."""
    parts = [config[key] for key in _TEXT if isinstance(config.get(key), dict)]
    for part in parts:
        if "vocab_size" in part or "vocab_size" not in config:
            set_rows(part, rows)
    if "vocab_size" in config or not parts:
        config["vocab_size"] = rows


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Say of which type the weights are: at the top, and in parts (of the text, of images) that say it themselves."""
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"}:
            set_dtype(part, dtype)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype


def bring_template(folder: Path, others: Sequence[tuple[str, Path]]) -> str | None:
    """Give a folder without a chat template that of the first model that has one, and say whose it is. others: name and folder.

    For vocabularies that are joined: the tokens that an expert was asked with came with it, and so does its template.
    """
    if template_in(folder) is not None:
        return None
    for name, other in others:
        if (found := template_in(other)) is not None:
            write_template(folder, found)
            return f"the chat template is that of {name}, which brought its tokens"
    return None


def write_json(path: Path, value: Any) -> None:
    """A configuration as transformers writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
