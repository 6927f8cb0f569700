"""What is known of the names in a checkpoint: which are one tensor under two names, which are buffers, what stands before a base model's.

``architectures.json`` holds what transformers' own tables say; ``tasks/merging/known.py`` writes it, and nothing here imports transformers.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("architectures.json")

# Rows of these stand for tokens, by the names that most architectures use: ends of names, and whole ones that are too short for an end.
_INPUT = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight")
_INPUT_WHOLE = frozenset({"shared.weight", "model.shared.weight", "backbone.embeddings.weight"})
_OUTPUT = ("lm_head.weight", "lm_head.bias", "embed_out.weight")
# What a model computes from its configuration, and old versions of transformers stored with the weights, by the number of its axes.
_BUFFERS = (
    (re.compile(r"(^|\.)(rotary_emb|rotary_embed|rope|rotary)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"), None),
    (re.compile(r"(^|\.)(attn|attention)(\.attention)?\.bias$"), 4),
    (re.compile(r"(^|\.)(attn|attention)(\.attention)?\.masked_bias$"), None),
    (re.compile(r"(^|\.)embeddings?\.(position_ids|token_type_ids)$"), None),
    (re.compile(r"(^|\.)embed_positions\.(weights|_float_tensor)$"), None),
)


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, as far as names go."""

    prefix: str = ""
    """Stands before the names of the base model's parameters in the class with a head; a base model saved alone lacks it."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias to the parameter that it is where ``tie_word_embeddings`` is on."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of names that checkpoints hold and the class leaves aside."""

    def leaves_aside(self, name: str) -> bool:
        """Whether loading takes no notice of a tensor of this name."""
        return any(re.search(pattern, name) for pattern in self.ignored)


@cache
def _table() -> tuple[frozenset[str], dict[str, Architecture]]:
    held = json.loads(TABLE.read_text(encoding="utf-8"))
    classes: dict[str, Architecture] = {}
    for entry in held["entries"]:
        made = Architecture(entry["prefix"], entry["tied"], tuple(entry["ignored"]))
        classes |= dict.fromkeys(entry["classes"], made)
    return frozenset(held["tied_by_default"]), classes


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """What is known of the class that a configuration names; nothing of one that transformers does not have."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return _table()[1].get(first, Architecture()) if isinstance(first, str) else Architecture()


def ties(config: Mapping[str, Any]) -> bool:
    """Whether embedding and output are one tensor: what ``tie_word_embeddings`` says, else the default of the configuration's class."""
    if config.get("tie_word_embeddings") is not None:
        return bool(config["tie_word_embeddings"])
    if config.get("model_type") in _table()[0]:
        return True
    text = config.get("text_config")
    return isinstance(text, dict) and bool(text.get("tie_word_embeddings", False))


def is_embedding(name: str) -> bool:
    """Whether the rows of this tensor are what tokens become on the way in."""
    return name.endswith(_INPUT) or name in _INPUT_WHOLE


def is_vocabulary(name: str) -> bool:
    """Whether the rows of this tensor stand for tokens, on the way in or out."""
    return is_embedding(name) or name.endswith(_OUTPUT)


def tied_names(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Alias to the tensor that it is tied to, of which ``names`` holds the second; the first need not be there."""
    held = frozenset(names)
    pairs = {alias: source for alias, source in _pairs(config) if source in held}
    if not ties(config):  # encoder and decoder share their input all the same
        return {alias: source for alias, source in pairs.items() if is_embedding(alias) and is_embedding(source)}
    inputs = [name for name in names if is_embedding(name)]
    outputs = [name for name in (*names, "lm_head.weight") if name.endswith(_OUTPUT) and name.endswith(".weight")]
    return (dict.fromkeys(outputs, inputs[0]) if len(inputs) == 1 else {}) | pairs


def alone(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Aliases that are stored where what they are tied to is not, each with the name of that: what transformers takes them for."""
    if not ties(config):
        return {}
    held = frozenset(names)
    found: dict[str, str] = {}
    for alias, source in architecture_of(config).tied.items():
        last = ".".join(source.split(".")[-2:])  # of the source under any prefix
        if alias in held and source not in found.values() and not any(name.endswith(last) for name in held - {alias}):
            found[alias] = source
    return found


def _pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The class's aliases and what they are tied to, also without the base model's prefix."""
    known = architecture_of(config)
    front = f"{known.prefix}."
    for alias, source in known.tied.items():
        if re.fullmatch(r"[\w.]+\.(weight|bias)", alias):
            yield alias, source
            if known.prefix and source.startswith(front):
                yield alias.removeprefix(front), source.removeprefix(front)


def is_buffer(name: str, axes: int) -> bool:
    """Whether a tensor is a buffer that every model computes itself, such as a causal mask or rotary frequencies."""
    return any(pattern.search(name) and wanted in (None, axes) for pattern, wanted in _BUFFERS)
