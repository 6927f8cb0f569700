"""``ota extract-lora``, and adapters and GGUF files in ``ota merge``, as they are typed."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.flows.cli.typed import refused, said
from tests.ota_core.files.tiny_adapters import tiny_base, write_adapter
from tests.ota_core.files.tiny_gguf import tiny, write_gguf
from tests.tasks.merging.merging import family
from tests.tasks.merging.tiny_architectures import MODELS


def test_an_adapter_is_extracted_and_merged_again(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "trained", base, merged=tmp_path / "merged", target_modules=["q_proj", "down_proj"])
    home = ("--home", tmp_path / "home")
    told = said("extract-lora", tmp_path / "merged", "--base", base, "--rank", 8, tmp_path / "out", *home)
    assert "model.layers.0.mlp.down_proj.weight" in told and "4 tensors differ" in told
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["kind"] == "adapter" and all(4 <= one["rank"] <= 8 for one in record["results"]["tensors"])
    (tmp_path / "recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": "base+out"}]}))
    said("merge", tmp_path / "recipe.yaml", tmp_path / "again", *home)
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_allclose(tensor.numpy(), expected[name].numpy(), atol=3e-6)
    assert "out exists already" in refused("extract-lora", tmp_path / "merged", "--base", base, tmp_path / "out", *home)
    assert "expected embeddings, norms or biases" in refused(
        "extract-lora", tmp_path / "merged", "--base", base, tmp_path / "x", "--whole", "all", *home
    )
    assert "they are the same model" in refused("extract-lora", base, "--base", base, tmp_path / "x", *home)
    assert not (tmp_path / "x").exists()


def test_gguf_files_are_experts_and_bases(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "quantised").mkdir()
    write_gguf(tmp_path / "quantised" / "q8.gguf", tmp_path / "base", "llama", "Q8_0")
    write_gguf(tmp_path / "f16.gguf", tmp_path / "base", "llama", "F16")
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "quantised"}, {"model": "f16.gguf"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    home = ("--home", tmp_path / "home")
    assert "no problems found" in said("plan", tmp_path / "recipe.yaml", *home)
    said("merge", tmp_path / "recipe.yaml", tmp_path / "out", *home)
    start = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == start[name].dtype
        np.testing.assert_allclose(tensor.numpy(), start[name].numpy(), atol=0.02)
    (tmp_path / "alone.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": "f16.gguf"}]}))
    said("merge", tmp_path / "alone.yaml", tmp_path / "alone", *home)
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert str(made.dtype) == "torch.float16" and type(made).__name__ == "LlamaForCausalLM"
    for name, tensor in made.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), start[name].half().numpy(), err_msg=name)
    assert "checkpoint: llama" in said("inspect", tmp_path / "f16.gguf")


def test_one_gguf_model_of_a_folder_of_many(tmp_path: Path) -> None:
    """abetlen/llama-cpp-python#1341: by the name of its file, or of any of its parts; a Mixtral is one, though llama.cpp calls it llama."""
    for kind in ("mixtral", "llama"):
        tiny(kind).save_pretrained(tmp_path / kind)
        write_gguf(tmp_path / f"{kind}.gguf", tmp_path / kind, kind, "F16", split=0 if kind == "llama" else 6)
    home, parts = ("--home", tmp_path / "home"), sorted(path.name for path in tmp_path.glob("mixtral-*.gguf"))
    (tmp_path / "all.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": str(tmp_path)}]}))
    assert f"2 GGUF models (llama.gguf, {parts[0]}); name the one that is meant" in refused("plan", tmp_path / "all.yaml", *home)
    (tmp_path / "one.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": parts[1]}]}))
    said("merge", tmp_path / "one.yaml", tmp_path / "out", *home)
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(made).__name__ == "MixtralForCausalLM"
    start = load_file(tmp_path / "mixtral" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor.numpy(), start[name].half().numpy(), err_msg=name)
    # What transformers does not read of the metadata is in the configuration that the merge makes of them.
    tiny("qwen3moe").save_pretrained(tmp_path / "qwen")
    write_gguf(tmp_path / "qwen.gguf", tmp_path / "qwen", "qwen3moe", "F16")
    (tmp_path / "two.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": "qwen.gguf"}]}))
    said("merge", tmp_path / "two.yaml", tmp_path / "two", *home)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "two").config
    assert (config.head_dim, config.moe_intermediate_size, config.num_experts) == (16, 32, 4)
    (tmp_path / parts[2]).unlink()
    assert f"missing: {parts[2]}; fetch all of them" in refused("merge", tmp_path / "one.yaml", tmp_path / "again", *home)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_5_vl"])
def test_an_adapter_of_any_kind_of_model_is_what_peft_loads(tmp_path: Path, kind: str) -> None:
    """unslothai/unsloth-zoo#812, vllm-project/vllm#41754: edits of experts that are named as files have them are dropped in silence by who loads them."""
    import peft

    model = MODELS[kind]().float()
    family(tmp_path, model)
    home = ("--home", tmp_path / "home")
    told = said("extract-lora", tmp_path / "e1", "--base", tmp_path / "base", "--rank", 64, tmp_path / "out", *home)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert ("edits of experts are of whole stacks" in told) == (kind != "qwen2_5_vl") == ("target_parameters" in config)
    edited = json.loads((tmp_path / "out" / "record.json").read_text())["results"]["tensors"]
    names = {one["name"] for one in edited if one["how"] == "factors"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert not [str(one.message) for one in caught if "adapter keys" in str(one.message)]
    merged, wanted = loaded.merge_and_unload().state_dict(), type(model).from_pretrained(tmp_path / "e1").state_dict()
    assert names <= wanted.keys() and len(names) > 4
    for name in names:
        np.testing.assert_allclose(merged[name].numpy(), wanted[name].numpy(), atol=1e-5, err_msg=name)
    # This tool applies it to the base's files, whichever way these lay experts out.
    (tmp_path / "again.yaml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": "base+out"}]}))
    said("merge", tmp_path / "again.yaml", tmp_path / "again", *home)
    ours = type(model).from_pretrained(tmp_path / "again").state_dict()
    for name in names:
        np.testing.assert_allclose(ours[name].numpy(), wanted[name].numpy(), atol=1e-5, err_msg=name)


def test_a_gguf_file_that_scales_its_rotary_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ggml-org/llama.cpp#8650: Llama 3.1 keeps the scaling as a tensor of factors, which transformers leaves out."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny("llama")
    model.config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **scaling}
    model.save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "expert.gguf", tmp_path / "base", "llama", "F16", factors=True)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "expert.gguf"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    said("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--home", tmp_path / "home")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["rope_type"] == "llama3"
    assert "scales its rotary embeddings" in caplog.text
