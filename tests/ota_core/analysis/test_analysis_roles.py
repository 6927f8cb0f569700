"""Where tensors stand, by the names that Hugging Face's architectures give them."""

import pytest

from ota_core.plan.roles import ROLES, WHOLE, Place, place_of, totals

NAMES = {
    # Llama, Mistral, Qwen, Gemma
    "model.embed_tokens.weight": (None, "embed"),
    "model.layers.0.self_attn.q_proj.weight": (0, "q"),
    "model.layers.11.self_attn.k_proj.bias": (11, "k"),
    "model.layers.11.self_attn.v_proj.weight": (11, "v"),
    "model.layers.11.self_attn.o_proj.weight": (11, "o"),
    "model.layers.11.self_attn.q_norm.weight": (11, "norm"),
    "model.layers.3.mlp.gate_proj.weight": (3, "gate"),
    "model.layers.3.mlp.up_proj.weight": (3, "up"),
    "model.layers.3.mlp.down_proj.weight": (3, "down"),
    "model.layers.3.input_layernorm.weight": (3, "norm"),
    "model.layers.3.pre_feedforward_layernorm.weight": (3, "norm"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "head"),
    "model.language_model.layers.2.mlp.up_proj.weight": (2, "up"),
    # Mixtures of experts: the router is no gate of an MLP
    "model.layers.5.block_sparse_moe.experts.7.w1.weight": (5, "gate"),
    "model.layers.5.block_sparse_moe.experts.7.w2.weight": (5, "down"),
    "model.layers.5.block_sparse_moe.experts.7.w3.weight": (5, "up"),
    "model.layers.5.block_sparse_moe.gate.weight": (5, "other"),
    "model.layers.5.mlp.gate.weight": (5, "other"),
    "model.layers.5.mlp.experts.12.down_proj.weight": (5, "down"),
    "model.layers.5.mlp.experts.gate_up_proj": (5, "gate_up"),
    "model.layers.5.mlp.experts.down_proj": (5, "down"),
    "model.layers.5.mlp.shared_expert_gate.weight": (5, "other"),
    "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": (5, "other"),
    # Phi-3; Phi-2
    "model.layers.1.self_attn.qkv_proj.weight": (1, "qkv"),
    "model.layers.1.mlp.gate_up_proj.weight": (1, "gate_up"),
    "model.layers.1.self_attn.dense.weight": (1, "o"),
    "model.layers.1.mlp.fc1.weight": (1, "up"),
    "model.layers.1.mlp.fc2.bias": (1, "down"),
    "model.final_layernorm.bias": (None, "norm"),
    # GPT-2, GPT-J
    "transformer.wte.weight": (None, "embed"),
    "wte.weight": (None, "embed"),
    "transformer.wpe.weight": (None, "other"),
    "transformer.h.4.attn.c_attn.weight": (4, "qkv"),
    "h.4.attn.c_proj.bias": (4, "o"),
    "transformer.h.4.mlp.c_fc.weight": (4, "up"),
    "transformer.h.4.mlp.c_proj.weight": (4, "down"),
    "transformer.h.4.ln_2.weight": (4, "norm"),
    "transformer.ln_f.bias": (None, "norm"),
    "transformer.h.4.mlp.fc_out.weight": (4, "down"),
    # GPT-NeoX
    "gpt_neox.embed_in.weight": (None, "embed"),
    "gpt_neox.layers.2.attention.query_key_value.weight": (2, "qkv"),
    "gpt_neox.layers.2.attention.dense.weight": (2, "o"),
    "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": (2, "up"),
    "gpt_neox.layers.2.mlp.dense_4h_to_h.bias": (2, "down"),
    "gpt_neox.final_layer_norm.weight": (None, "norm"),
    "embed_out.weight": (None, "head"),
    # OPT
    "model.decoder.embed_tokens.weight": (None, "embed"),
    "model.decoder.embed_positions.weight": (None, "other"),
    "model.decoder.layers.6.self_attn.out_proj.weight": (6, "o"),
    "model.decoder.layers.6.fc1.weight": (6, "up"),
    "model.decoder.layers.6.self_attn_layer_norm.bias": (6, "norm"),
    # Falcon, Bloom
    "transformer.word_embeddings.weight": (None, "embed"),
    "transformer.word_embeddings_layernorm.weight": (None, "norm"),
    "transformer.h.9.self_attention.query_key_value.weight": (9, "qkv"),
    "transformer.h.9.self_attention.dense.weight": (9, "o"),
    "transformer.h.9.ln_attn.weight": (9, "norm"),
    "rotary.inv_freq": (None, "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_place_of_a_name(name: str) -> None:
    assert place_of(name) == NAMES[name] and place_of(name).role in ROLES


def test_a_cell_adds_to_its_layer_and_to_the_whole() -> None:
    assert totals(Place(3, "q")) == (Place(3, "q"), Place(3, "all"), WHOLE)
    assert totals(Place(None, "embed")) == (Place(None, "embed"), WHOLE)


def test_the_names_that_transformers_builds_are_known() -> None:
    """Whole models, so that no parameter of a common architecture falls to ``other`` unnoticed."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 24}
    cases = {
        "LlamaConfig": {"num_key_value_heads": 1},
        "Qwen3Config": {"num_key_value_heads": 1, "head_dim": 8},
        "Gemma2Config": {"num_key_value_heads": 1, "head_dim": 8},
        "Phi3Config": {"num_key_value_heads": 1, "pad_token_id": 0},
        "GPTNeoXConfig": {},
        "OPTConfig": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
        "FalconConfig": {},
        "GPT2Config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    }
    for name, more in cases.items():
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**small, **more))
        places = {parameter: place_of(parameter) for parameter, _ in model.named_parameters()}
        assert {p for p, place in places.items() if place.role == "other" and "pos" not in p and "wpe" not in p} == set(), name
        assert {place.layer for place in places.values()} == {None, 0, 1}, name
