"""Checkpoints of one model whose tensors have other names, as transformers' versions and other tools write them. Cases name their public thread."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ota_core.plan.fit.names import only_prefix
from tests.tasks.merging.merging import average, check, configure, family, loads, merged, ota, refused, rewrite, weights
from tests.tasks.merging.test_conversion import train
from tests.tasks.merging.tiny_architectures import llama, qwen2_5_vl, t5

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY))


def without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 16, 16)) for i in range(2)}
    return {name.removeprefix("transformer."): x for name, x in state.items()} | masks


def test_the_hubs_gpt2_and_experts_with_the_prefix(tmp_path: Path) -> None:
    """arcee-ai/mergekit#450: names without ``transformer.`` and with causal masks; second moments go by the experts' own names."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(gpt2(), tmp_path / f"e{seed}")
    rewrite(tmp_path / "base", without_prefix)
    got, said = merged(tmp_path, "ota", parameters={"density": 0.5})
    assert set(got) == {name.removeprefix("transformer.") for name in weights(tmp_path / "e1")} - {"lm_head.weight"}
    assert "prefix 'transformer.'" in said
    loads(tmp_path / "out", transformers.GPT2LMHeadModel)
    # The same numbers as from a base with the experts' names.
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "out").rename(tmp_path / "before")
    plain, _ = merged(tmp_path, "ota", parameters={"density": 0.5})
    assert all(torch.equal(x, plain[f"transformer.{name}"]) for name, x in got.items())


@pytest.mark.parametrize("compression", ["rank1", "log8", "none"])
def test_compressed_second_moments_follow_renamed_weights(tmp_path: Path, compression: str) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        train(gpt2(), tmp_path / f"e{seed}")
    parameters = {"compression": compression}
    plain, _ = merged(tmp_path, "ota", parameters=parameters)
    (tmp_path / "out").rename(tmp_path / "before")
    rewrite(tmp_path / "base", without_prefix)
    got, _ = merged(tmp_path, "ota", parameters=parameters)
    assert {f"transformer.{name}" for name in got} == set(plain)
    assert all(torch.equal(x, plain[f"transformer.{name}"]) for name, x in got.items())


def test_rotary_frequencies_that_one_checkpoint_stores(tmp_path: Path) -> None:
    """jzhang38/TinyLlama#127: buffers that every model computes itself."""
    family(tmp_path, llama())
    rewrite(tmp_path / "e1", lambda s: s | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    got, said = merged(tmp_path)
    assert "inv_freq left out" in said and set(got) == set(weights(tmp_path / "base"))
    loads(tmp_path / "out", transformers.LlamaForCausalLM)


@pytest.mark.parametrize("who", ["base", "e1"])
@pytest.mark.parametrize("silent", [True, False], ids=["by the class's default", "as config.json says"])
def test_a_stored_head_that_is_tied(tmp_path: Path, who: str, silent: bool) -> None:
    """vllm-project/vllm#6758, google-deepmind/gemma#8: trainers store the head of tied models, or save .bin files that do."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    family(tmp_path, transformers.GemmaForCausalLM(transformers.GemmaConfig(vocab_size=48, **text)))
    wanted = average(tmp_path)
    for folder in ("base", "e1", "e2"):
        configure(tmp_path / folder, ("tie_word_embeddings",)) if silent else configure(
            tmp_path / folder, tie_word_embeddings=True
        )
    rewrite(tmp_path / who, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"]})
    got, _ = merged(tmp_path)
    check(got, wanted)
    loads(tmp_path / "out", transformers.GemmaForCausalLM)


def test_a_stored_head_of_its_own_is_not_dropped_in_silence(tmp_path: Path) -> None:
    """vllm-project/vllm#6758: trained apart in spite of ``tie_word_embeddings``; transformers would load both."""
    family(tmp_path, llama(tie_word_embeddings=True))
    rewrite(tmp_path / "e1", lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    assert "hold different values" in refused(tmp_path)


def test_only_the_head_of_a_tied_model_is_stored(tmp_path: Path) -> None:
    """huggingface/lerobot#1529: of two names for one tensor, the file has the alias."""
    family(tmp_path, llama(tie_word_embeddings=True))
    wanted = average(tmp_path)
    rewrite(tmp_path / "e1", lambda s: {("lm_head.weight" if n == "model.embed_tokens.weight" else n): x for n, x in s.items()})
    got, _ = merged(tmp_path)
    check(got, wanted)
    loads(tmp_path / "out", transformers.LlamaForCausalLM)


def test_an_encoder_decoder_that_stores_every_alias(tmp_path: Path) -> None:
    """T5 checkpoints of transformers before 4.46 hold the shared embedding under three names, and the head under a fourth."""
    family(tmp_path, t5())
    wanted = average(tmp_path)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    rewrite(tmp_path / "e1", lambda s: s | dict.fromkeys(names, s["shared.weight"]))
    got, _ = merged(tmp_path)
    check(got, wanted)
    loads(tmp_path / "out", transformers.T5ForConditionalGeneration)


def flat(name: str) -> str:
    """The hub's names of Qwen2.5-VL, of transformers before 4.52 (hiyouga/LlamaFactory#8338, vllm-project/vllm#19054)."""
    name = name.removeprefix("model.") if name.startswith("model.visual.") else name
    return name.replace("model.language_model.", "model.", 1)


def nested(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name if "language_model" in name else name.replace("model.", "model.language_model.", 1)


def test_both_layouts_of_an_image_text_model(tmp_path: Path) -> None:
    family(tmp_path, qwen2_5_vl())
    rewrite(tmp_path / "base", lambda s: {flat(n): x for n, x in s.items()})
    rewrite(tmp_path / "e2", lambda s: {flat(n): x for n, x in s.items()})
    rewrite(tmp_path / "e1", lambda s: {nested(flat(n)): x for n, x in s.items()})
    names = {name: nested(name) for name in weights(tmp_path / "e2")}
    got, said = merged(tmp_path)
    assert "under other names" in said
    check(got, average(tmp_path, names))
    loads(tmp_path / "out", transformers.Qwen2_5_VLForConditionalGeneration)


def test_heads_for_next_tokens_that_training_left_out(tmp_path: Path) -> None:
    """modelscope/ms-swift#9802: transformers does not load ``mtp.``, so that fine-tuned checkpoints lack it; the base's is copied."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=48, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4, shared_expert_intermediate_size=4, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    family(tmp_path, transformers.Qwen3NextForCausalLM(config))
    head = torch.randn(8, 16)
    rewrite(tmp_path / "base", lambda s: s | {"mtp.fc.weight": head})
    got, said = merged(tmp_path)
    assert torch.equal(got.pop("mtp.fc.weight"), head) and "mtp.fc.weight copied from base" in said
    check(got, average(tmp_path))


def test_wrappers_of_single_layers(tmp_path: Path) -> None:
    """huggingface/transformers#29659: FSDP on XLA leaves ``_orig_module`` inside the names; karpathy/nanoGPT#325: torch.compile before them."""
    family(tmp_path, llama())
    wanted = average(tmp_path)
    rewrite(tmp_path / "e1", lambda s: {n.replace(".0.", ".0._orig_module."): x for n, x in s.items()})
    rewrite(tmp_path / "e2", lambda s: {f"_orig_mod.{n}": x for n, x in s.items()})
    check(merged(tmp_path)[0], wanted)


def test_a_prefix_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """verl-project/verl#119: a wrapper's own prefix."""
    family(tmp_path, llama())
    rewrite(tmp_path / "e1", lambda s: {f"policy.{n}": x for n, x in s.items()})
    said = refused(tmp_path)
    assert "same names but for a prefix" in said and "'policy.'" in said and "embed_tokens" not in said


def test_only_prefix() -> None:
    assert (
        only_prefix(["a.b.x", "a.b.y"], ["x", "y"])
        == "the same names but for a prefix: its names have the prefix 'a.b.', those of {} do not"
    )
    assert (
        only_prefix(["x", "y"], ["a.x", "a.y"])
        == "the same names but for a prefix: those of {} have the prefix 'a.', its names do not"
    )
    assert (
        only_prefix(["a.x", "a.z"], ["x", "y"]) is None and only_prefix(["x"], ["x"]) is None and only_prefix([], ["x"]) is None
    )


def test_two_tensors_that_are_one_are_refused(tmp_path: Path) -> None:
    family(tmp_path, llama())
    rewrite(tmp_path / "e1", lambda s: s | {"model._orig_mod.norm.weight": s["model.norm.weight"]})
    assert "keep one of them" in refused(tmp_path)


def test_a_plan_says_the_same_and_reads_no_weights(tmp_path: Path) -> None:
    family(tmp_path, gpt2())
    rewrite(tmp_path / "base", without_prefix)
    result = ota("plan", tmp_path)
    assert result.exit_code == 0 and "prefix 'transformer.'" in result.output and "no problems found" in result.output


def test_the_table_is_what_the_installed_transformers_says() -> None:
    from ota_core.files import architecture
    from tasks.merging.known import table

    held = json.loads(architecture.TABLE.read_text())
    assert held["transformers"] == transformers.__version__, "write it again: python -m tasks.merging.known"
    folders = ["llama", "gpt2", "t5", "bert", "qwen2_vl", "gemma3", "mamba", "qwen3_next"]
    made = table(folders)
    classes = {name: {k: v for k, v in one.items() if k != "classes"} for one in held["entries"] for name in one["classes"]}
    for one in made["entries"]:
        for name in one["classes"]:
            assert classes[name] == {key: value for key, value in one.items() if key != "classes"}
    assert set(made["tied_by_default"]) <= set(held["tied_by_default"])
