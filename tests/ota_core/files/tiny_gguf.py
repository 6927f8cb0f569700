"""GGUF files of small real models, written as llama.cpp's converter lays them out: interleaved rotary halves for Llama, norms with one
added for Gemma, experts in stacks."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

KINDS = {"F32": None, "F16": None, "BF16": None, "Q8_0": None, "Q4_0": None, "Q4_1": None}


def tiny(kind: str) -> Any:
    """A model of one layer whose rows are 64 numbers or multiples of it, as quantised blocks of 32 need."""
    import transformers as t

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if kind == "mixtral":
        model: Any = t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=4))
    elif kind == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**small, tie_word_embeddings=True))
    elif kind == "qwen3moe":
        model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**small, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2))
    elif kind == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**small))
    elif kind == "gemma3":
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**small, layer_types=["sliding_attention", "full_attention"]))
    elif kind == "gemma2":
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**small))
    elif kind == "phi3":
        del small["head_dim"]
        model = t.Phi3ForCausalLM(t.Phi3Config(**small))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**small))
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    return model


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {
    "mixtral": "llama",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3moe": "qwen3moe",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
GEMMAS = {"gemma2", "gemma3"}


def write_gguf(path: Path, folder: Path, kind: str, quant: str, split: int = 0, factors: bool = False) -> None:
    """The checkpoint in ``folder`` (safetensors and config.json) as a GGUF file; matrices in the type ``quant``, vectors in float32.

    split: tensors in each of several parts, which are named as llama.cpp names them. factors: with a tensor that scales the rotary embeddings.
    """
    import json

    from safetensors.torch import load_file

    tensors = {name: one.float().numpy() for name, one in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    arch, heads, shared = ARCHITECTURES[kind], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if "expert" in " ".join(tensors):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    if factors:
        writer.add_tensor("rope_freqs.weight", np.full(8, 8.0, np.float32))
    for name, one in gguf_tensors(tensors, kind, heads, shared).items():
        if quant == "F32" or one.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(one, np.float32))
        elif quant == "F16":
            writer.add_tensor(name, np.ascontiguousarray(one, np.float16))
        else:
            type_ = getattr(gguf.GGMLQuantizationType, quant)
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(one, np.float32), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(tensors: dict[str, Any], kind: str, heads: int, shared: int) -> dict[str, Any]:
    names = NAMES | (GEMMA if kind in GEMMAS else {})
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        module, _, last = name.rpartition(".")
        layer, own = ("", module) if "layers." not in module else module.removeprefix("model.layers.").split(".", 1)
        front = f"blk.{layer}." if layer else ""
        if ".experts." in f".{own}":
            place, number, which = own.split("experts.")[0], *own.split("experts.")[1].split(".")
            stack = {"w1": "ffn_gate_exps", "gate_proj": "ffn_gate_exps", "w3": "ffn_up_exps", "up_proj": "ffn_up_exps"}.get(
                which, "ffn_down_exps"
            )
            found.setdefault(f"{front}{stack}.weight", []).append((int(number), one))
            assert place
            continue
        short = names[own]
        if ARCHITECTURES[kind] == "llama" and short in ("attn_q", "attn_k"):
            count = heads if short == "attn_q" else shared
            one = one.reshape(count, 2, one.shape[0] // count // 2, *one.shape[1:]).swapaxes(1, 2).reshape(one.shape)
        if kind in GEMMAS and short.endswith("norm"):
            one = one + 1
        found[f"{front}{short}.{last}"] = one
    return {
        name: np.stack([part for _, part in sorted(one, key=lambda pair: pair[0])]) if isinstance(one, list) else one
        for name, one in found.items()
    }
