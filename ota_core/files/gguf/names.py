"""From the tensors of a GGUF file to those that Hugging Face's class has: names by the tables of the ``gguf`` package, and how rows lie.

What llama.cpp's converters change on the way is undone here: rotary halves that are interleaved (Llama), norms that are stored with one
added (Gemma), and experts that are stacked.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ota_core.errors import CheckpointError

_ATTENTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
)
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Architecture:
    """What an architecture of GGUF is in transformers."""

    model_type: str
    modules: tuple[str, ...] = (*_ATTENTION, *_MLP, *_NORMS)
    """Of a layer."""
    rotary: bool = False
    """Whether q and k have their rotary halves interleaved."""
    norm_plus_one: bool = False
    router: str = ""
    experts: tuple[str, str, str] | None = None
    """Names of an expert's gate, up and down, behind ``….experts.<number>.``."""


_GEMMA = (*_ATTENTION, *_MLP, *_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", rotary=True, router="block_sparse_moe.gate", experts=("w1", "w3", "w2")),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", router="mlp.gate", experts=_EXPERTS),
    "phi3": Architecture("phi3", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS)),
    "gemma2": Architecture("gemma2", _GEMMA, norm_plus_one=True),
    "gemma3": Architecture("gemma3_text", _GEMMA, norm_plus_one=True),
}
# Tables that follow from the configuration; no class of transformers stores them.
_ROTATION = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SIZES = {"head_dim": "attention.key_length", "moe_intermediate_size": "expert_feed_forward_length"}
_MIXTRAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
"""Settings of transformers by the keys of the metadata behind the architecture: those that transformers' own reading leaves out of some."""
_STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class Part:
    """A tensor of the model: rows of one of the file's, and what is done to them."""

    stored: str
    shape: tuple[int, ...]
    first: int = 0
    """The first of its rows in the file's tensor."""
    heads: int = 0
    """Heads whose rotary halves are interleaved in the file; 0: rows lie as they are."""
    plus_one: bool = False


def parts_of(path: Any, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Hugging Face's names to parts of the file's tensors. shapes: of the file's tensors, rows first. Raises CheckpointError for an architecture
    that is not known, and for tensors of which nothing is known."""
    named = str(metadata.get("general.architecture", "nothing"))
    if named not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF of the architecture {named} cannot be read; known are {', '.join(ARCHITECTURES)}. Name the model in safetensors, or "
            "load it with transformers (gguf_file=…) and save it"
        )
    one = ARCHITECTURES[named]
    layers = int(metadata[f"{named}.block_count"])
    table = _names(one, named, layers)
    heads = int(metadata.get(f"{named}.attention.head_count", 0) or 0)
    shared = int(metadata.get(f"{named}.attention.head_count_kv", heads) or heads)
    found: dict[str, Part] = {}
    unknown = []
    for stored, shape in shapes.items():
        module, _, last = stored.rpartition(".")
        own = module.rpartition(".")[2]
        if stored.endswith(_ROTATION):
            continue
        if own in _STACKS and one.experts is not None and len(shape) == 3:
            found |= _experts(one, stored, shape)
        elif module in table:
            rotary = own in ("attn_q", "attn_k") and one.rotary
            found[f"{table[module]}.{last}"] = Part(
                stored, shape, heads=(heads if own == "attn_q" else shared) if rotary else 0, plus_one=one.norm_plus_one and own.endswith("norm"),
            )  # fmt: skip
        else:
            unknown.append(stored)
    if unknown:
        raise CheckpointError(
            f"{path}: of {len(unknown)} tensors of this {named} model it is not known what they are in transformers: {', '.join(unknown[:6])}"
        )
    return found


def _names(one: Architecture, named: str, layers: int) -> dict[str, str]:
    """Module in the file to module of the class."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == named)
    table = gguf.get_tensor_name_map(arch, layers)
    return {stored: name for name in _modules(one, layers) if (stored := table.get_name(name)) is not None}


def _modules(one: Architecture, layers: int) -> Iterator[str]:
    yield from ("model.embed_tokens", "model.norm", "lm_head")
    for layer in range(layers):
        yield from (f"model.layers.{layer}.{module}" for module in (*one.modules, *([one.router] if one.router else [])))


def _experts(one: Architecture, stored: str, shape: tuple[int, ...]) -> dict[str, Part]:
    assert one.experts is not None
    _, layer, kind, _ = stored.split(".")
    own = one.experts[_STACKS.index(kind)]
    front = f"model.layers.{layer}.{one.router.rpartition('.')[0]}.experts"
    return {f"{front}.{expert}.{own}.weight": Part(stored, shape[1:], first=expert * shape[1]) for expert in range(shape[0])}


def config_of(metadata: Mapping[str, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
    """The little of a configuration that a merge itself asks for."""
    named = str(metadata.get("general.architecture"))
    one = ARCHITECTURES[named]
    embedding = parts.get("model.embed_tokens.weight")
    mixtral = named == "llama" and bool(metadata.get(f"{named}.expert_count"))
    sizes = {key: metadata.get(f"{named}.{stored}") for key, stored in (_SIZES | (_MIXTRAL if mixtral else {})).items()}
    return {
        "model_type": "mixtral" if mixtral else one.model_type,
        **{key: int(size) for key, size in sizes.items() if size},
        "tie_word_embeddings": "lm_head.weight" not in parts,
        **({"vocab_size": embedding.shape[0]} if embedding else {}),
    }


def scales_rotation(metadata: Mapping[str, Any], stored: Iterable[str]) -> bool:
    """Whether rotary embeddings are scaled, by a setting or by factors in a tensor; what a configuration would say of it cannot be told from the factors."""
    kind = metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.type", "none")
    return kind != "none" or any(name.endswith(_ROTATION) for name in stored)
