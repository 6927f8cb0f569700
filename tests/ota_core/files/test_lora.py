"""Adapters as models: what PEFT merges is what is read, in any blocks; what cannot be read is refused by name."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.lora.patterns import Patterns, pattern_problem
from ota_core.plan.inputs import ModelInput
from tests.ota_core.files.tiny_adapters import tiny_base, write_adapter

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 5}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2, "layers.0.mlp.up_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora on the embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}),
    "trained tokens": ("llama", {"trainable_token_indices": [3, 100]}),
    "trained tokens by module": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}),
    "trained tokens of a tied model": ("tied", {"trainable_token_indices": [3, 5]}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora with fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "layers of both kinds": ("gpt2", {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True}),
    "a bias of B": ("qwen2", {"lora_bias": True}),
    "all biases": ("qwen2", {"bias": "all"}),
    "stacks on experts stored one by one": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "rank_pattern": {"experts.down_proj": 2}},
    ),
    "square stacks, turned": ("gpt_oss", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}  # fmt: skip


def opened(base: Path, *adapters: Path) -> Checkpoint:
    model = ModelInput(name="base", path=base)
    for adapter in adapters:
        model = ModelInput(name="adapted", path=adapter, under=model)
    return model.opened()


def written(folder: Path, kind: str) -> Path:
    return tiny_base(folder, "llama", tie=True) if kind == "tied" else tiny_base(folder, kind)


def whole(model: Checkpoint, name: str, step: int | None = None) -> Any:
    """A tensor's rows as float64, read so many at a time."""
    rows = matrix_shape(model.info(name).shape)[0]
    parts = [
        model.read_rows(name, a, min(a + (step or rows), rows)).tensor().double().numpy() for a in range(0, rows, step or rows)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    kind, config = CASES[case]
    base = written(tmp_path / "base", kind)
    adapter = write_adapter(tmp_path / "adapter", base, merged=tmp_path / "merged", **config)
    with (
        closing(opened(base, adapter)) as read,
        closing(Checkpoint(tmp_path / "merged")) as merged,
        closing(Checkpoint(base)) as start,
    ):
        assert set(merged.names()) == set(read.names())
        changed = 0
        for name in merged.names():
            expected, seen = whole(merged, name), whole(read, name)
            np.testing.assert_allclose(seen, expected, atol=2e-6, err_msg=name)
            assert np.array_equal(seen, whole(read, name, step=3)), f"{name} depends on the blocks"
            changed += not np.array_equal(expected, whole(start, name))
            assert read.kept_dtype(name) == start.info(name).dtype
        assert changed >= 1


def test_a_pickled_adapter_and_names_with_the_adapters_own_name(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    plain = write_adapter(tmp_path / "plain", base)
    pickled = write_adapter(tmp_path / "pickled", base, safe=False)
    named = shutil.copytree(plain, tmp_path / "named")
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file(
        {name.replace(".weight", ".default.weight"): one for name, one in tensors.items()}, named / "adapter_model.safetensors"
    )
    assert (pickled / "adapter_model.bin").is_file() and not (pickled / "adapter_model.safetensors").exists()
    name = "model.layers.0.self_attn.q_proj.weight"
    with closing(opened(base, plain)) as one, closing(opened(base, pickled)) as two, closing(opened(base, named)) as three:
        assert np.array_equal(whole(one, name), whole(two, name)) and np.array_equal(whole(one, name), whole(three, name))


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    first, second = (write_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in (1, 2))
    name = "model.layers.1.self_attn.q_proj.weight"
    with (
        closing(opened(base, first, second)) as both,
        closing(opened(base, first)) as one,
        closing(opened(base, second)) as two,
        closing(Checkpoint(base)) as start,
    ):
        np.testing.assert_allclose(whole(both, name), whole(one, name) + whole(two, name) - whole(start, name), atol=1e-6)


def test_a_base_in_bfloat16_keeps_an_edit_smaller_than_its_rounding(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, lora_alpha=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (
        load_file(adapter / "adapter_model.safetensors")[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"]
        for x in "AB"
    )
    with closing(opened(base, adapter)) as read, closing(Checkpoint(base)) as start:
        edit = whole(read, name) - whole(start, name)
        np.testing.assert_allclose(edit, (b.double() @ a.double()).numpy() * 1e-4 / 4, atol=1e-7)
        assert str(read.info(name).dtype) == "float32" and str(read.kept_dtype(name)) == "bfloat16"


def config_of(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"peft_type": "LOHA"}, "of the type LOHA, and only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4, which changes the base's weights"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 1]]}, "passthrough"),
        ({"r": 8}, "the rank 8, its factors have 4"),
        ({"lora_alpha": None}, "of a LoRA adapter: lora_alpha is None, expected a number; .*merge_and_unload"),
        ({"use_dora": True}, "there is no magnitude"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 3}}, "no regular expression"),
        ({"rank_pattern": {"(" * 3000 + "a" + ")" * 3000: 3}}, "rank_pattern: .* is no regular expression"),
        ({"alpha_pattern": {"q_proj" * 2000: 3}}, "has 12000 characters, expected at most 10000"),
        ({"alpha_pattern": {"q_pro{j}": 3}}, r"alpha_pattern: 'q_pro\{j\}' has '\{'"),
        ({"rank_pattern": {"v_proj": 4, "(.*?.){12}[!?]": 3}}, r"adapter_config.json: rank_pattern: the pattern '\(\.\*\?\.\)\{12\}\[!\?\]' takes too long .* in its place"),
        ({"alpha_pattern": {"(.*?.){12}[!?]": 3}}, r"adapter_config.json: alpha_pattern: the pattern .* takes too long"),
    ],
)  # fmt: skip
def test_what_is_no_edit_of_the_base_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    config_of(write_adapter(tmp_path / "adapter", base), **changes)
    with pytest.raises(CheckpointError, match=said):
        opened(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "layers.1.mlp.up_proj", r"model\.layers\.\d+\..*proj", ".*attn.*", r"layers\.(0|1|2[0-9])\.mlp\.(up|down)_proj", "up_proj|down_proj", "",
        r"experts\.[0-9]{1,2}\.\w+", "(?P<a>q)_proj", "(?i:Q_PROJ)", "[^.]*", r"(?!.*layers\.1\.).*q_proj",
    ],
)  # fmt: skip
def test_patterns_name_the_modules_that_they_name_in_peft(tmp_path: Path, pattern: str) -> None:
    names = [
        f"model.layers.{i}.{part}" for i in range(30) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.3.down_proj")
    ]
    assert pattern_problem(pattern) is None
    patterns = Patterns(tmp_path, "rank_pattern", {pattern: 1})
    assert [patterns.of(name, 0) for name in names] == [bool(re.match(rf"(.*\.)?({pattern})$", name)) for name in names]


def test_a_base_of_another_shape_is_refused_with_what_the_adapter_says_of_its_own(tmp_path: Path) -> None:
    base, other = tiny_base(tmp_path / "base", "llama"), tiny_base(tmp_path / "other", "llama", hidden=32)
    with pytest.raises(CheckpointError, match=r"does not fit its base .*other: the product .* trained on .*base"):
        opened(other, write_adapter(tmp_path / "adapter", base))


def test_factors_that_were_never_gathered_are_named(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.zeros(0) for name in tensors}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"a LoRA adapter, does not fit .* shapes \[0\] and \[0\].* ZeRO-3"):
        opened(base, adapter)


def test_a_base_of_another_name_is_a_note(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base)
    with closing(opened(base, adapter)) as read:
        assert read.notes == []
    config_of(adapter, base_model_name_or_path="org/another")
    with closing(opened(base, adapter)) as read:
        assert "says that it was trained on org/another" in read.notes[0]


def test_a_head_apart_from_the_embedding_of_a_tied_base_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", tie=True)
    adapter = write_adapter(tmp_path / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {"base_model.model.lm_head.weight": head.clone()}, adapter / "adapter_model.safetensors")
    with closing(opened(base, adapter)) as read:
        assert "lm_head.weight" not in read
    save_file(tensors | {"base_model.model.lm_head.weight": head + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="apart from the embedding"):
        opened(base, adapter)


def test_a_folder_of_adapters_and_files_of_other_programs_are_named(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "several" / "maths", base)
    with pytest.raises(CheckpointError, match="adapters in folders of their own: maths"):
        Checkpoint(tmp_path / "several")
    with pytest.raises(CheckpointError, match=r"LoRA adapter, not a whole model; .* base\+adapter"):
        Checkpoint(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    one = next(iter(tensors.values()))
    both = {f"base_model.model.m.lora_A.{name}.weight": one.clone() for name in ("maths", "code")}
    save_file(both, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"several adapters \(code, maths\)"):
        opened(base, adapter)
    save_file({"lora_unet_down.lora_down.weight": one}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="none of a LoRA as PEFT writes it"):
        opened(base, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        opened(base, adapter)
