"""The parameter layout, held against real Trainer runs: what optimizer.pt numbers must get the names of the live optimizer."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.compute.blocks import row_blocks
from ota_core.errors import CheckpointError, MomentsError
from ota_core.moments import ParameterLayout, find_moments, open_moments
from tasks.merging.architecture import parameter_layout
from tests.tiny_models import edit_config

STEPS = 3
BETA2 = 0.98
# As many key-value heads as heads: q, k, v and o are square, so that shapes alone cannot tell them apart.
SIZES = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1))


def train(model: Any, folder: Path, own_optimizer: Callable[[Any], Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """Train for real. Returns the Trainer's checkpoint folder and, by name, what the live optimizer held at its end."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (12, 8))]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        weight_decay=0.1, adam_beta2=BETA2, learning_rate=1e-3, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = own_optimizer(model) if own_optimizer else None
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    state = trainer.optimizer.state
    live = {name: state[parameter]["exp_avg_sq"] for name, parameter in model.named_parameters() if parameter in state}
    return folder / f"checkpoint-{STEPS}", live


def read_all(moments: Any, block: int = 16) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.concatenate([moments.read(name, a, b) for a, b in row_blocks(shape, block)]).reshape(shape))
        for name, shape in moments.shapes().items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    makers = {"untied": llama, "tied": lambda: llama(tie_word_embeddings=True), "qwen2": qwen2, "gpt2": gpt2}
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in done:
            done[kind] = train(makers[kind](), tmp_path_factory.mktemp(kind))
        return done[kind]

    return get


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen2", "gpt2"])
def test_every_v_equals_the_live_optimizers_bit_for_bit(trained, kind):
    folder, live = trained(kind)
    found = find_moments(folder)
    assert found == folder / "optimizer.pt"
    moments = open_moments(found, layout=lambda: parameter_layout(folder))
    read = read_all(moments)
    assert read.keys() == live.keys()
    assert all(torch.equal(read[name], live[name]) and live[name].any() for name in live)
    assert moments.beta2 == BETA2
    assert {moments.step(name) for name in live} == {STEPS}


@pytest.mark.parametrize("kind", ["untied", "qwen2", "gpt2"])
def test_the_models_plain_order_would_give_wrong_values_under_fitting_shapes(trained, kind):
    """A mistake seen elsewhere: numbers taken as the places in named_parameters()."""
    folder, live = trained(kind)
    by_number = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    naive = {name: by_number[i]["exp_avg_sq"] for i, name in enumerate(parameter_layout(folder).shapes)}
    fits_but_wrong = [name for name in live if naive[name].shape == live[name].shape and not torch.equal(naive[name], live[name])]
    assert fits_but_wrong


def test_an_optimizer_with_a_single_group_follows_the_models_order(tmp_path):
    folder, live = train(llama(), tmp_path, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    read = read_all(open_moments(folder / "optimizer.pt", layout=parameter_layout(folder)))
    assert read.keys() == live.keys()
    assert all(torch.equal(read[name], live[name]) for name in live)


def test_frozen_parameters_are_left_out_where_shapes_leave_one_way(tmp_path):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    folder, live = train(model, tmp_path)
    read = read_all(open_moments(folder / "optimizer.pt", layout=parameter_layout(folder)))
    assert read.keys() == live.keys() == parameter_layout(folder).shapes.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(read[name], live[name]) for name in live)


def test_frozen_parameters_that_could_be_others_are_refused(tmp_path):
    model = llama()
    model.model.layers[0].mlp.gate_proj.requires_grad_(False)  # up_proj beside it has the same shape
    folder, _ = train(model, tmp_path)
    message = r"may be model\.layers\.0\.mlp\.gate_proj\.weight or model\.layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(MomentsError, match=message):
        open_moments(folder / "optimizer.pt", layout=parameter_layout(folder))


def test_another_models_configuration_is_refused(trained, tmp_path):
    folder, _ = trained("untied")
    tied, _ = trained("tied")
    with pytest.raises(MomentsError, match=r"group 0 holds 16 parameters, the model has 15.*Check that config\.json"):
        open_moments(folder / "optimizer.pt", layout=parameter_layout(tied))
    layout = parameter_layout(folder)
    wide = {name: (33, 8) if shape == (32, 8) else shape for name, shape in layout.shapes.items()}
    with pytest.raises(MomentsError, match=r"parameter 0 .* shape \[32, 8\], model\.embed_tokens\.weight has \[33, 8\]"):
        open_moments(folder / "optimizer.pt", layout=ParameterLayout(shapes=wide, decayed=layout.decayed))


def test_the_layout_holds_order_decay_and_ties(trained):
    layout = parameter_layout(trained("tied")[0])
    assert list(layout.shapes)[:2] == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert layout.shapes["model.norm.weight"] == (8,)
    assert layout.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not [name for name in layout.decayed if "norm" in name or name.endswith("bias")]
    assert layout.decayed < layout.shapes.keys()


def test_a_checkpoint_that_names_the_tied_alias_is_accepted(trained, tmp_path):
    folder = shutil.copytree(trained("tied")[0], tmp_path / "expert")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert parameter_layout(folder).tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_parameters_that_no_tensor_becomes_are_named(trained, tmp_path):
    folder = shutil.copytree(trained("untied")[0], tmp_path / "expert")
    tensors = load_file(folder / "model.safetensors")
    tensors["other.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    message = r"has 1 parameters that no tensor .*\(model\.layers\.1\.mlp\.up_proj\.weight\); the checkpoint holds 1 others \(other\.weight\)"
    with pytest.raises(CheckpointError, match=message):
        parameter_layout(folder)


def test_a_class_that_transformers_does_not_have_is_named(trained, tmp_path):
    folder = shutil.copytree(trained("untied")[0], tmp_path / "expert")
    edit_config(folder, architectures=["NoSuchModel"])
    with pytest.raises(CheckpointError, match=r"architectures names NoSuchModel, which is no model of transformers"):
        parameter_layout(folder)


def test_bad_configurations_are_named(trained, tmp_path):
    folder = shutil.copytree(trained("untied")[0], tmp_path / "expert")
    edit_config(folder, vocab_size=31)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has \[32, 8\] in the checkpoint, \[31, 8\] by config"):
        parameter_layout(folder)
    edit_config(folder, model_type="no_such_model")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be built.*no_such_model"):
        parameter_layout(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        parameter_layout(folder)


def test_code_that_a_folder_brings_along_does_not_run(trained, tmp_path):
    folder = shutil.copytree(trained("untied")[0], tmp_path / "expert")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be built.*custom code"):
        parameter_layout(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_several_threads_may_ask_first(trained, tmp_path):
    """transformers loads its parts on first use; experts are compressed in parallel, and each may be the first to ask."""
    folder, _ = trained("untied")
    script = (
        "from concurrent.futures import ThreadPoolExecutor\nfrom pathlib import Path\nfrom tasks.merging.architecture import parameter_layout\n"
        f"with ThreadPoolExecutor(8) as pool:\n    layouts = list(pool.map(parameter_layout, [Path({str(folder)!r})] * 8))\n"
        "assert all(layout == layouts[0] for layout in layouts)\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert done.returncode == 0, done.stderr
