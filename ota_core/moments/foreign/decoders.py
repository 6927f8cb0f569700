"""torchtitan, torchtune and OLMo-core: names of their own for the parts of a decoder, in Meta's order of rows or in Hugging Face's.

From the public sources: torchtitan/models/*/state_dict_adapter.py, torchtune/models/convert_weights.py (and those of its models),
olmo_core/nn/hf/convert.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ota_core.errors import MomentsError
from ota_core.moments.foreign.model import Model, cut_groups, halves_of_pairs
from ota_core.moments.foreign.taken import Taken

ATTENTION, MLP = "self_attn.", "mlp."


@dataclass(frozen=True)
class Trainer:
    """How one trainer names a decoder."""

    title: str
    layer: str
    """The beginning of a layer's names, before its number."""
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    """Within a layer, without ``weight`` and ``bias``: its name for a part to Hugging Face's."""
    interleaved: frozenset[str]
    """Kinds of models whose queries and keys have Meta's order of rows."""
    known: frozenset[str]
    """Kinds of models whose conversion is known."""


_META = {
    "feed_forward.w1": f"{MLP}gate_proj", "feed_forward.w2": f"{MLP}down_proj", "feed_forward.w3": f"{MLP}up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_TITAN = {
    **_META,
    **{f"attention.{part}w{key}": f"{ATTENTION}{key}_proj" for part in ("", "qkv_linear.") for key in "qkvo"},
    **{f"attention.{key}_norm": f"{ATTENTION}{key}_norm" for key in "qk"},
    "moe.router.gate": f"{MLP}gate",
}
_TUNE = {
    **{f"attn.{key}_proj": f"{ATTENTION}{key}_proj" for key in "qkv"}, "attn.output_proj": f"{ATTENTION}o_proj",
    **{f"attn.{key}_norm": f"{ATTENTION}{key}_norm" for key in "qk"},
    "mlp.w1": f"{MLP}gate_proj", "mlp.w2": f"{MLP}down_proj", "mlp.w3": f"{MLP}up_proj",
    "sa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip
_OLMO = {
    **{f"attention.w_{key}": f"{ATTENTION}{key}_proj" for key in "qkv"}, "attention.w_out": f"{ATTENTION}o_proj",
    **{f"attention.{key}_norm": f"{ATTENTION}{key}_norm" for key in "qk"},
    "feed_forward.w1": f"{MLP}gate_proj", "feed_forward.w2": f"{MLP}down_proj", "feed_forward.w3": f"{MLP}up_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip
_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "lm_head": "lm_head"}
_LLAMA, _OTHERS = frozenset({"llama"}), frozenset({"llama", "qwen2", "qwen3", "qwen3_moe"})
TITAN = Trainer("torchtitan", "layers.", _ENDS, _TITAN, _LLAMA, _OTHERS)
TUNE = Trainer("torchtune", "layers.", _ENDS, _TUNE, _LLAMA | {"mistral"}, _OTHERS | {"mistral"})
OLMO = Trainer(
    "OLMo-core", "blocks.", {"embeddings": "model.embed_tokens", "lm_head.norm": "model.norm", "lm_head.w_out": "lm_head"}, _OLMO,
    frozenset(), frozenset({"llama", "qwen2", "qwen3", "olmo2", "olmo3"}),
)  # fmt: skip
# These normalise what comes out of attention and of the feed forward part, rather than what goes in.
_NORMS_AFTER = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "post_feedforward_layernorm"}


def trainer_of(names: Mapping[str, object]) -> Trainer | None:
    """The trainer whose names these are; None for names of Hugging Face, or of nobody here."""
    signs = ((TITAN, r"layers\.\d+\.attention\..+"), (TUNE, r"layers\.\d+\.attn\..+"), (OLMO, r"blocks\.\d+\.attention\.w_.+"))
    return next((trainer for trainer, sign in signs if any(re.fullmatch(sign, name) for name in names)), None)


def take_all(path: Path, trainer: Trainer, shapes: Mapping[str, tuple[int, ...]], model: Model) -> dict[str, Taken]:
    """Parameters of the Hugging Face model, each with where it comes from. Raises MomentsError for kinds and names that are not known."""
    if model.kind not in trainer.known:
        raise MomentsError(
            f"{path} is {trainer.title}'s, of a model of the kind {model.kind!r}; how its rows lie is known for "
            f"{', '.join(sorted(trainer.known))}. Convert the second moments yourself and save them by name as exp_avg_sq.safetensors"
        )
    taken: dict[str, Taken] = {}
    unknown = []
    for name, shape in shapes.items():
        found = _take(trainer, name, shape, model)
        if found is None:
            unknown.append(name)
        else:
            taken |= found
    if unknown:
        raise MomentsError(
            f"{path} is {trainer.title}'s and holds {len(unknown)} names that are not known, such as {unknown[0]!r}: convert the second "
            "moments yourself and save them by name as exp_avg_sq.safetensors"
        )
    if model.tied:  # the head is the embedding, trained under that name
        taken.pop("lm_head.weight", None)
    return taken


def _take(trainer: Trainer, name: str, shape: tuple[int, ...], model: Model) -> dict[str, Taken] | None:
    match = re.fullmatch(rf"{re.escape(trainer.layer)}(?P<number>\d+)\.(?P<part>.+)", name)
    part, end = _split(match["part"] if match else name)
    if match is None:
        whole = trainer.outside.get(part)
        return None if whole is None else {f"{whole}.{end}": Taken(name, shape)}
    prefix = f"model.layers.{match['number']}."
    if part == "attention.qkv_linear.wqkv":
        return _cut(name, prefix, end, shape, model, model.kind in trainer.interleaved)
    if experts := re.fullmatch(r"moe\.experts\.w([123])", part):
        return _experts(name, f"{prefix}mlp.experts.", trainer.inside[f"feed_forward.w{experts[1]}"].removeprefix(MLP), shape)
    own = trainer.inside.get(part)
    if own is None:
        return None
    if trainer is OLMO and model.kind.startswith("olmo"):
        own = _NORMS_AFTER.get(own, own)
    rows = None
    if model.kind in trainer.interleaved and own in (f"{ATTENTION}q_proj", f"{ATTENTION}k_proj"):
        rows = halves_of_pairs(model.heads if own.endswith("q_proj") else model.groups, model.width)
    return {f"{prefix}{own}.{end}": Taken(name, shape, rows)}


def _split(name: str) -> tuple[str, str]:
    """A part's name and what of it this is; stacks of experts have no such end."""
    part, dot, end = name.rpartition(".")
    if dot and end in ("weight", "bias"):
        return part, end
    return (part, "weight") if dot and end == "scale" else (name, "weight")


def _cut(name: str, prefix: str, end: str, shape: tuple[int, ...], model: Model, interleaved: bool) -> dict[str, Taken]:
    taken = {}
    for key, rows in cut_groups(model).items():
        if interleaved and key != "v":
            rows = rows[halves_of_pairs(model.heads if key == "q" else model.groups, model.width)]
        taken[f"{prefix}{ATTENTION}{key}_proj.{end}"] = Taken(name, (len(rows), *shape[1:]), rows)
    return taken


def _experts(name: str, prefix: str, own: str, shape: tuple[int, ...]) -> dict[str, Taken]:
    """One matrix per expert out of the stack of all."""
    count, height, width = shape
    return {
        f"{prefix}{number}.{own}.weight": Taken(
            name, (height, width), np.arange(number * height, (number + 1) * height, dtype=np.int64)
        )
        for number in range(count)
    }
