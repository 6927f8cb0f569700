"""Where a tensor stands in a transformer, by its name: the block it belongs to and what it does there.

Covers the names of Llama, Mistral, Mixtral, Qwen, Gemma, Phi, GPT-2, GPT-J, GPT-NeoX, OPT, Bloom, Falcon, BERT and T5 in Hugging Face's spelling.
A name that no rule knows has the role ``other``: a router, a position embedding, a low-rank query projection.
"""

import re
from typing import NamedTuple

ROLES = ("embed", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm", "head", "other")
"""All roles, in the order in which data flows through them. ``qkv`` and ``gate_up`` are projections that a model holds in one tensor."""
ALL = "all"
"""Stands for all roles together: of one layer, or of the whole model."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_NORM = re.compile(r"norm|^ln_|^ln\d?$")
# The name of a module alone tells its role, wherever the module stands.
_MODULES = {
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared"), "embed"),
    **dict.fromkeys(("lm_head", "embed_out"), "head"),
    **dict.fromkeys(("query_key_value", "c_attn", "qkv_proj", "Wqkv", "W_pack", "qkv"), "qkv"),
    **dict.fromkeys(("q_proj", "wq", "query", "q"), "q"),
    **dict.fromkeys(("k_proj", "wk", "key", "k"), "k"),
    **dict.fromkeys(("v_proj", "wv", "value", "v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "o"), "o"),
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), "gate"),
    # Without a gate, the projection into the wider space is the "up" one.
    **dict.fromkeys(("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "wi", "wi_1"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"), "down"),
    **dict.fromkeys(("gate_up_proj", "gate_up"), "gate_up"),
}
# The same word for the last projection of attention and of the MLP: what it stands in decides.
_LAST_PROJECTIONS = {"c_proj", "dense", "wo"}
_ATTENTION = {"attn", "self_attn", "attention", "self_attention"}
_MLP = {"mlp", "ffn", "feed_forward", "DenseReluDense", "intermediate"}
_EXPERT = re.compile(r"(?:^|\.)experts(?:\.(\d+))?\.")


class Place(NamedTuple):
    """A cell of the table layer × role."""

    layer: int | None
    """The transformer block, from 0; None outside of blocks, and for the whole model."""
    role: str


WHOLE = Place(None, ALL)


def place_of(name: str) -> Place:
    """The place of a tensor with this name. A bias has the place of its weight."""
    found = _LAYER.search(name)
    parts = name.split(".")
    module = parts[-2] if parts[-1] in {"weight", "bias"} and len(parts) > 1 else parts[-1]
    return Place(int(found[1]) if found else None, _role(module, set(parts)))


def _role(module: str, parts: set[str]) -> str:
    if _NORM.search(module):
        return "norm"
    if module in _LAST_PROJECTIONS:
        return "o" if parts & _ATTENTION else "down" if parts & _MLP else "other"
    return _MODULES.get(module, "other")


def moe_expert(name: str) -> int | None:
    """The number of the expert of a mixture whose weights a tensor holds; −1 for a stack of all of them, None for any other tensor."""
    found = _EXPERT.search(name)
    return None if found is None else -1 if found[1] is None else int(found[1])


def totals(place: Place) -> tuple[Place, ...]:
    """The place itself, all of its layer, and the whole model: the sums that a tensor adds to."""
    layer = () if place.layer is None else (Place(place.layer, ALL),)
    return (place, *layer, WHOLE)
