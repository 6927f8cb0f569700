"""nanotron's names for a decoder, and the order of rows in its fused matrices.

From the public source: nanotron/models/{llama,qwen}.py, examples/llama/convert_weights.py, examples/llama/convert_nanotron_to_hf.py.
``qkv_proj`` holds the rows of all queries, then those of all keys, then those of all values; ``gate_up_proj`` gate before up.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ota_core.errors import MomentsError
from ota_core.moments.base import Shape
from ota_core.moments.foreign.model import Indices, Model, halves_of_pairs
from ota_core.moments.foreign.taken import Taken

TITLE = "nanotron"
KNOWN = frozenset({"llama", "qwen2"})
_LAYER = re.compile(r"model\.decoder\.(?P<number>\d+)\.pp_block\.(?P<part>.+)\.(?P<end>weight|bias)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE = {
    "model.token_position_embeddings.pp_block.token_embedding.weight": _EMBEDDING,
    "model.final_layer_norm.pp_block.weight": "model.norm.weight",
    "model.lm_head.pp_block.weight": _HEAD,
}
_INSIDE = {
    "attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj", "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}  # fmt: skip


def take_all(path: Path, shapes: Mapping[str, Shape], model: Model, interleaved: bool) -> dict[str, Taken]:
    """Parameters of the Hugging Face model, each with where it comes from. Raises MomentsError for kinds and names that are not known."""
    if model.kind not in KNOWN:
        raise MomentsError(
            f"{path} is nanotron's, of a model of the kind {model.kind!r}; how its rows lie is known for {', '.join(sorted(KNOWN))}. "
            "Convert the second moments yourself and save them by name as exp_avg_sq.safetensors"
        )
    taken: dict[str, Taken] = {}
    unknown = []
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        if match is None and name in _OUTSIDE:
            own = _OUTSIDE[name]
            if model.tied and own == _HEAD:  # the two share their state, under the name of either
                own = _EMBEDDING
            taken[own] = _tokens(path, name, shape, model) if own in (_EMBEDDING, _HEAD) else Taken(name, shape)
        elif match is not None and match["part"] in ("attn.qkv_proj", "mlp.gate_up_proj", *_INSIDE):
            prefix = f"model.layers.{match['number']}."
            for own, rows in _pieces(match["part"], shape, model, interleaved).items():
                taken[f"{prefix}{own}.{match['end']}"] = Taken(name, shape if rows is None else (len(rows), *shape[1:]), rows)
        else:
            unknown.append(name)
    if unknown:
        raise MomentsError(
            f"{path} is nanotron's and holds {len(unknown)} names that are not known (dense decoders are), such as {unknown[0]!r}: convert "
            "the second moments yourself and save them by name as exp_avg_sq.safetensors"
        )
    return taken


def _pieces(part: str, shape: Shape, model: Model, interleaved: bool) -> dict[str, Indices | None]:
    if part == "mlp.gate_up_proj":
        half = shape[0] // 2
        return {f"mlp.{key}_proj": np.arange(a, a + half, dtype=np.int64) for key, a in (("gate", 0), ("up", half))}
    if part in _INSIDE:
        return {_INSIDE[part]: None}
    found: dict[str, Indices | None] = {}
    start = 0
    for key, heads in (("q", model.heads), ("k", model.groups), ("v", model.groups)):
        rows = (
            halves_of_pairs(heads, model.width) if interleaved and key != "v" else np.arange(heads * model.width, dtype=np.int64)
        )
        found[f"self_attn.{key}_proj"] = start + rows
        start += heads * model.width
    return found


def _tokens(path: Path, name: str, shape: Shape, model: Model) -> Taken:
    """The rows of tokens, without those that fill up a vocabulary for tensor parallelism."""
    if shape[0] < model.vocabulary:
        raise MomentsError(f"{path}: {name!r} has {shape[0]} rows, the configuration says {model.vocabulary} tokens")
    return Taken(name, (model.vocabulary, *shape[1:]), np.arange(model.vocabulary, dtype=np.int64))
