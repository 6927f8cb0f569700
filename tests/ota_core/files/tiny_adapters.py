"""Adapters that PEFT itself writes, on small real models, with factors that are not zero; and what PEFT merges of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import write_tiny_llama


def tiny_base(folder: Path, kind: str, **options: Any) -> Path:
    """A model of one layer with random weights: ``llama`` (with tokenizer), ``gpt2``, ``mixtral``, ``gpt_oss``, ``qwen2`` (with biases)."""
    if kind == "llama":
        return write_tiny_llama(folder, **options)
    import transformers as t

    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    if kind == "gpt2":
        model: Any = t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
        )
    elif kind == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=4))
    elif kind == "gpt_oss":
        # Experts whose matrices are square: nothing but the class says which way round they are.
        model = t.GptOssForCausalLM(
            t.GptOssConfig(
                **small | {"intermediate_size": 32, "head_dim": 8}, num_local_experts=4, layer_types=["full_attention"]
            )
        )
    else:
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**small))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, *, seed: int = 1, merged: Path | None = None, safe: bool = True, **config: Any
) -> Path:
    """An adapter of ``base`` as PEFT saves it, and, where ``merged`` is given, the model that PEFT merges of both."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | config))
    trained = re.compile(r"lora_|tokens_delta|modules_to_save")
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape)
        elif trained.search(name):
            parameter.data += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder, safe_serialization=safe)
    if not safe:
        import safetensors.torch

        file = folder / "adapter_model.safetensors"
        if file.exists():  # what newer versions write in any case
            torch.save(safetensors.torch.load_file(file), folder / "adapter_model.bin")
            file.unlink()
    if merged is not None:
        adapted.merge_and_unload().save_pretrained(merged)
    return folder
