"""The numbered layers of a model: which stack a tensor stands in, where in it, and what of a configuration counts layers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ota_core.errors import CheckpointError

_NUMBERED = re.compile(r"^((?:.+?\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.(.+)$")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
_DECODER = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")
# Lists of numbers of layers. Any other list with one entry for each layer, and "layer" in its name, says what each layer is.
_NUMBERS = {
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "full_attention_layers", "attn_layer_indices", "cross_attention_layers",
    "global_attn_layers", "sliding_window_layers", "attention_layers_idx", "layers_to_transform", "hybrid_layer_ids", "fullatt_block_indexes",
}  # fmt: skip
_LISTS = {
    "layer_types",
    "no_rope_layers",
    "attention_layers",
    "block_types",
    "layers_block_type",
    "num_key_value_heads_per_layer",
}


class Numbered(NamedTuple):
    """The name of a tensor in a layer: ``stack.number.rest``."""

    stack: str
    number: int
    rest: str


def numbered(name: str) -> Numbered | None:
    """Stack and layer of a tensor; None outside of layers."""
    found = _NUMBERED.match(name)
    return Numbered(found[1], int(found[2]), found[3]) if found else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Stack → its number of layers, in the order in which the names come."""
    counts: dict[str, int] = {}
    for name in names:
        if (layer := numbered(name)) is not None:
            counts[layer.stack] = max(counts.get(layer.stack, 0), layer.number + 1)
    return counts


def position(number: int, count: int) -> float:
    """Where a layer lies among the layers of its slice: from 0, the first, to 1, the last one; 1 where it is alone."""
    return number / (count - 1) if count > 1 else 1.0


def positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor of a whole model lies in its stack; 0 outside of layers."""
    names = list(names)
    counts = stacks(names)
    return {name: position(layer.number, counts[layer.stack]) if (layer := numbered(name)) else 0.0 for name in names}


def stack_of(module: str, found: Sequence[str]) -> str | None:
    """The stack that a recipe's module means: by a word of its name, or the only one. None where that is not clear."""
    if len(found) == 1 and module in {"default", "decoder", "text_decoder", "language_model", "transformer", "model"}:
        return found[0]
    named = [stack for stack in found if module in stack.split(".")]
    if not named:
        wanted = {
            "text_decoder": _text,
            "language_model": _text,
            "vision_tower": _vision,
            "vision_encoder": _vision,
            "vision_model": _vision,
        }
        named = [stack for stack in found if (fits := wanted.get(module)) and fits(stack)]
    return named[0] if len(named) == 1 else None


def _vision(stack: str) -> bool:
    return any(word in stack for word in ("vision", "visual", "vit", "image"))


def _text(stack: str) -> bool:
    return not _vision(stack) and "audio" not in stack


def with_layers(config: dict[str, Any], taken: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A configuration for other layers. taken: stack → for each layer of the result, the layer that it was.

    Numbers of layers, lists with an entry for each layer and lists of layers' numbers follow. Raises CheckpointError where nothing in the
    configuration counts the layers of a stack.
    """
    changed = dict(config)
    for stack, layers in taken.items():
        holder, keys = _place(changed, stack)
        section = dict(changed if holder is None else changed[holder])
        key = next((key for key in keys if isinstance(section.get(key), int)), None)
        if key is None:
            raise CheckpointError(
                f"config.json has none of {', '.join(keys)}{f' in {holder}' if holder else ''}, so that the number of layers in {stack} cannot be written"
            )
        changed_section = _section(section, key, layers)
        changed = changed_section if holder is None else changed | {holder: changed_section}
    return changed


def _place(config: Mapping[str, Any], stack: str) -> tuple[str | None, tuple[str, ...]]:
    """The part of a configuration that speaks of a stack (None: its top level), and the keys that count its layers there."""
    sections = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    kind = "vision" if _vision(stack) else "audio" if "audio" in stack else ""
    if kind:
        holder = next((key for key in sections if key.startswith(kind)), None)
        return holder, (*_COUNTS, "depth", "encoder_layers")
    holder = "text_config" if "text_config" in sections else None
    words = stack.split(".")
    if "decoder" in words:
        return ("decoder_config" if "decoder_config" in sections else holder), _DECODER
    if "encoder" in words:
        return ("encoder_config" if "encoder_config" in sections else holder), _ENCODER
    return holder, _COUNTS


def _section(section: dict[str, Any], key: str, layers: Sequence[int]) -> dict[str, Any]:
    before = section[key]
    changed = section | {key: len(layers)}
    for name, value in section.items():
        if not isinstance(value, list):
            continue
        if name in _NUMBERS:
            changed[name] = [new for new, old in enumerate(layers) if old in value]
        elif len(value) == before and (name in _LISTS or "layer" in name):
            changed[name] = [value[old] for old in layers]
    if "attention_types" in section and isinstance(changed.get("attention_layers"), list):  # GPT-Neo says it twice
        changed["attention_types"] = [[[kind], 1] for kind in changed["attention_layers"]]
    return changed
