"""Small models of many classes with random weights, made from configurations: what trainers number, and what checkpoints call it."""

from collections.abc import Callable
from typing import Any

TEXT = {
    "vocab_size": 48, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def _model(name: str, config: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def _configs() -> Any:
    import transformers

    return transformers


def llama(**more: Any) -> Any:
    return _model("LlamaForCausalLM", _configs().LlamaConfig(**TEXT | more))


def mixtral() -> Any:
    return _model("MixtralForCausalLM", _configs().MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> Any:
    return _model(
        "Qwen3MoeForCausalLM",
        _configs().Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=4, decoder_sparse_step=1),
    )  # fmt: skip


def olmoe() -> Any:
    return _model("OlmoeForCausalLM", _configs().OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2))


def gpt_oss() -> Any:
    return _model(
        "GptOssForCausalLM",
        _configs().GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, head_dim=4, layer_types=["full_attention"] * 2),
    )  # fmt: skip


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": 8,
        "patch_size": 4,
        "fullatt_block_indexes": [1],
    }
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}
    config = _configs().Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return _model("Qwen2_5_VLForConditionalGeneration", config)


def llava() -> Any:
    t = _configs()
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION, projection_dim=8), image_token_index=3
    )
    return _model("LlavaForConditionalGeneration", config)


def gemma3() -> Any:
    t = _configs()
    text = t.Gemma3TextConfig(**TEXT, head_dim=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = t.Gemma3Config(
        text_config=text, vision_config=t.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_index=3
    )
    return _model("Gemma3ForConditionalGeneration", config)


def classifier() -> Any:
    return _model("Qwen2ForSequenceClassification", _configs().Qwen2Config(**TEXT, num_labels=3))


def bert() -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return _model("BertForSequenceClassification", _configs().BertConfig(**sizes, num_labels=2))


def t5() -> Any:
    config = _configs().T5Config(vocab_size=48, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return _model("T5ForConditionalGeneration", config)


def bart() -> Any:
    config = _configs().BartConfig(
        vocab_size=48, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12, decoder_ffn_dim=12, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return _model("BartForConditionalGeneration", config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "gpt_oss": gpt_oss,
    "qwen2_5_vl": qwen2_5_vl, "llava": llava, "gemma3": gemma3, "classifier": classifier, "bert": bert, "t5": t5, "bart": bart,
}  # fmt: skip
