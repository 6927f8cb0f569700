"""Megatron-LM and NeMo: layers stacked in one tensor, queries, keys and values in one matrix, gate and up in another, a padded vocabulary.

From the public source: megatron/core/optimizer/distrib_optimizer.py (``fully_reshardable``: states in the shape of the parameters, as
``optimizer.state.exp_avg_sq.<parameter>``) and megatron/core/transformer.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ota_core.errors import MomentsError
from ota_core.moments.foreign.model import Indices, Model, cut_groups
from ota_core.moments.foreign.taken import Taken

KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LAYER = re.compile(r"(?:module\.|model\.)*decoder\.layers\.(?:(?P<number>\d+)\.)?(?P<part>.+)")
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}  # fmt: skip
_INSIDE = {
    "self_attention.linear_proj": "self_attn.o_proj", "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm", "mlp.linear_fc2": "mlp.down_proj",
    "input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
}  # fmt: skip
# Transformer Engine keeps a norm with the matrix that follows it.
_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "post_attention_layernorm"}


def is_megatron(names: Mapping[str, object]) -> bool:
    """Whether these are Megatron's names."""
    return any(_LAYER.fullmatch(name) for name in names)


def take_all(path: Path, shapes: Mapping[str, tuple[int, ...]], model: Model) -> dict[str, Taken]:
    """Parameters of the Hugging Face model, each with where it comes from. Raises MomentsError for what is not known."""
    if model.kind not in KNOWN:
        raise MomentsError(
            f"{path} is Megatron's, of a model of the kind {model.kind!r}; how its rows lie is known for {', '.join(sorted(KNOWN))}"
        )
    taken: dict[str, Taken] = {}
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        found = _layers(path, name, match, shape, model) if match else _outside(path, name, shape, model)
        taken |= found
    if model.tied:
        taken.pop("lm_head.weight", None)
    return taken


def _outside(path: Path, name: str, shape: tuple[int, ...], model: Model) -> dict[str, Taken]:
    own = _OUTSIDE.get(re.sub(r"^(?:module\.|model\.)+", "", name))
    if own is None:
        raise _unknown(path, name)
    if len(shape) == 2 and own != "model.norm.weight":
        if shape[0] < model.vocabulary:
            raise MomentsError(f"{path}: {name!r} has {shape[0]} rows, the configuration says {model.vocabulary} tokens")
        return {own: Taken(name, (model.vocabulary, shape[1]), np.arange(model.vocabulary, dtype=np.int64))}
    if len(shape) != 1:
        raise _flat(path, name, shape)
    return {own: Taken(name, shape)}


def _layers(path: Path, name: str, match: re.Match[str], shape: tuple[int, ...], model: Model) -> dict[str, Taken]:
    """One layer's parameters, or those of all layers out of a stack."""
    part, _, end = match["part"].rpartition(".")
    pieces: dict[str, Indices | None]
    if end == "layer_norm_weight" and part in _NORMS:
        pieces, end = {_NORMS[part]: None}, "weight"
    elif part == "self_attention.linear_qkv":
        pieces = {f"self_attn.{key}_proj": rows for key, rows in cut_groups(model).items()}
    elif part == "mlp.linear_fc1":
        height = shape[-2 if end == "weight" else -1]
        pieces = {
            f"mlp.{key}_proj": np.arange(a, a + height // 2, dtype=np.int64) for key, a in (("gate", 0), ("up", height // 2))
        }
    elif part in _INSIDE:
        pieces = {_INSIDE[part]: None}
    else:
        raise _unknown(path, name)
    vector = end == "bias" or any(own.endswith("norm") for own in pieces)
    stacked = match["number"] is None
    if len(shape) != (1 if vector else 2) + stacked:
        raise _flat(path, name, shape)
    taken = {}
    for layer in range(shape[0]) if stacked else (int(match["number"]),):
        for own, rows in pieces.items():
            taken[f"model.layers.{layer}.{own}.{end}"] = _piece(name, shape, rows, layer if stacked else None, vector)
    return taken


def _piece(name: str, shape: tuple[int, ...], rows: Indices | None, layer: int | None, vector: bool) -> Taken:
    if layer is None:
        return Taken(name, shape if rows is None else (len(rows), *shape[1:]), rows)
    rows = np.arange(shape[1], dtype=np.int64) if rows is None else rows
    if vector:
        return Taken(name, (len(rows),), rows, row=layer)
    return Taken(name, (len(rows), shape[2]), layer * shape[1] + rows)


def _unknown(path: Path, name: str) -> MomentsError:
    return MomentsError(
        f"{path} is Megatron's and holds {name!r}, which is not known (dense decoders are): convert the second moments yourself and save "
        "them by name as exp_avg_sq.safetensors"
    )


def _flat(path: Path, name: str, shape: tuple[int, ...]) -> MomentsError:
    return MomentsError(
        f"{path}: v of {name!r} has the shape {list(shape)}, not that of its parameter, as the formats fully_sharded_model_space and "
        "dp_reshardable leave it. Save the checkpoint with --dist-ckpt-optim-fully-reshardable"
    )
