"""Mixtures whose experts one checkpoint stacks and another holds one by one: merged in the base's layout, whichever that is."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from flows.cli.app import app
from ota_core.compute.blocks import matrix_shape
from ota_core.files.layouts.relayout import relayout
from ota_core.files.layouts.stored import Loaded, Stored, View, whole
from tests.tasks.merging.merging import State, average, check, loads, merged, ota, refused, rewrite, weights
from tests.tasks.merging.test_conversion import train
from tests.tasks.merging.tiny_architectures import MODELS


def stacked(model: Any, folder: Path) -> None:
    """As ``from_pretrained`` has the model, not as ``save_pretrained`` writes it by default."""
    model.save_pretrained(folder, save_original_format=False)


def usual(kind: str, tmp_path: Path, state: State) -> State:
    """The same numbers as ``save_pretrained`` lays them out: transformers loads them, and a new model with its numbers saves them."""
    model = MODELS[kind]()
    model.config.save_pretrained(tmp_path / "again")
    save_file(state, tmp_path / "again" / "model.safetensors", {"format": "pt"})
    model.load_state_dict(type(model).from_pretrained(tmp_path / "again").state_dict())
    model.save_pretrained(tmp_path / "usual")
    return weights(tmp_path / "usual")


def family(root: Path, kind: str, stacks: str) -> Any:
    """A base and two trained experts with their optimizers' states; ``stacks``: whose files hold stacks."""
    model = MODELS[kind]()
    model.save_pretrained(root / "base")
    for name, lr in (("e1", 1e-2), ("e2", 2e-2)):
        train(MODELS[kind](), root / name, lr=lr)
    for name in {"base": ["base"], "experts": ["e1", "e2"], "nobody": []}[stacks]:
        stacked(type(model).from_pretrained(root / name), root / name)
    return model


@pytest.mark.parametrize("stacks", ["base", "experts"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_of_the_other_layout(tmp_path: Path, kind: str, stacks: str) -> None:
    """vllm-project/vllm#36997, unslothai/unsloth-zoo#812: checkpoints of before and after experts became stacks do not have the same tensors."""
    family(tmp_path, kind, "nobody")
    wanted = average(tmp_path)
    model = family(tmp_path, kind, stacks)
    held = {name: x.shape for name, x in weights(tmp_path / "base").items()}
    assert held.keys() != weights(tmp_path / "e1").keys()
    plan = ota("plan", tmp_path)
    assert plan.exit_code == 0 and "in the layout of base" in " ".join(plan.output.split())
    got, said = merged(tmp_path)
    assert {name: x.shape for name, x in got.items()} == held and "in the layout of base" in said
    check(usual(kind, tmp_path, got), wanted)
    loads(tmp_path / "out", type(model))


@pytest.mark.parametrize("compression", ["none", "rank1", "log8"])
def test_second_moments_go_the_way_of_the_weights(tmp_path: Path, compression: str) -> None:
    """Without masks nothing but v decides: the merge of stacks is that of experts one by one. What was compressed
    beforehand, in the experts' own layout, gives the same bytes."""
    settings = {"density": 1.0, "compression": compression}
    family(tmp_path / "a", "mixtral", "nobody")
    apart, _ = merged(tmp_path / "a", "ota", parameters=settings)
    family(tmp_path / "b", "mixtral", "base")
    got, _ = merged(tmp_path / "b", "ota", parameters=settings)
    check(usual("mixtral", tmp_path, got), {name: x.double() for name, x in apart.items()})
    masked = settings | {"density": 0.3}
    shutil.rmtree(tmp_path / "b" / "out")
    got, said = merged(tmp_path / "b", "ota", parameters=masked)
    assert "kept" in said
    if compression == "none":
        return
    models = []
    for name in ("e1", "e2"):
        one, options = tmp_path / "b" / name, ["--method", compression, "--home", str(tmp_path / "home")]
        made = CliRunner().invoke(app, ["compress", str(one), str(tmp_path / f"{name}.safetensors"), *options])
        assert made.exit_code == 0, made.output
        models.append({"model": name, "parameters": {"preconditioner_path": str(tmp_path / f"{name}.safetensors")}})
    shutil.rmtree(tmp_path / "b" / "out")
    again, _ = merged(tmp_path / "b", "ota", models=models, parameters=masked)
    assert all(torch.equal(x, again[name]) for name, x in got.items())


def as_a_list(state: State) -> State:
    """gpt-oss as unsloth saves it: every expert a linear layer of its own."""
    found: State = {}
    for name, x in state.items():
        stack = re.fullmatch(r"(.+\.experts\.(?:gate_up|down)_proj)(_bias)?", name)
        if stack is None:
            found[re.sub(r"\.router\.(weight|bias)$", r".router.linear.\1", name)] = x
            continue
        for number, one in enumerate(x):
            found[f"{stack[1]}s.{number}.{'bias' if stack[2] else 'weight'}"] = one if stack[2] else one.T.contiguous()
    return found


def test_experts_as_a_list_of_layers(tmp_path: Path) -> None:
    """unslothai/unsloth#6936: gpt-oss with ``gate_up_projs.<i>`` and ``router.linear``, which transformers' class does not know."""
    model = family(tmp_path, "gpt_oss", "nobody")
    wanted = average(tmp_path)
    for name in ("e1", "e2"):
        rewrite(tmp_path / name, as_a_list)
    assert "model.layers.0.mlp.experts.gate_up_projs.3.weight" in weights(tmp_path / "e1")
    got, said = merged(tmp_path)
    assert "are read in the layout of base" in said and set(got) == set(weights(tmp_path / "base"))
    check(got, wanted)
    loads(tmp_path / "out", type(model))
    one = "model.layers.1.mlp.experts.down_projs.0.bias"
    rewrite(tmp_path / "e1", lambda state: {name: x for name, x in state.items() if name != one})
    shutil.rmtree(tmp_path / "out")
    assert "'model.layers.1.mlp.experts.down_proj_bias' is missing" in refused(tmp_path)


def test_parts_in_any_order_and_direction() -> None:
    """Parameters whose parts lie turned, in halves and across rows: every range of rows of every tensor, against the whole."""
    parameter = np.arange(2 * 6 * 4, dtype=np.float32).reshape(2, 6, 4)
    held: dict[str, Any] = {}
    made: dict[str, Stored] = {}
    for e in range(2):
        for half in range(2):
            held[f"{e}.{half}"] = parameter[e, 3 * half : 3 * half + 3].T.copy()
            made[f"{e}.{half}"] = Stored((4, 3), (View("p", 24 * e + 12 * half, (4, 3), (1, 4)),))
    both = {"stack": whole("p", (2, 6, 4)), "1": Stored((6, 4), (View("p", 24, (6, 4), (4, 1)),)),
            "turned": Stored((4, 6), (View("p", 0, (4, 6), (1, 4)),)), "odd": Stored((2, 2, 4), (View("p", 4, (2, 2, 4), (24, 8, 1)),)),
            "flat": Stored((8,), (View("p", 24, (4,), (6,)), View("p", 3, (4,), (1,))))}  # fmt: skip
    wanted = {"stack": parameter, "1": parameter[1], "turned": parameter[0].T, "odd": parameter[:, 1:4:2],
              "flat": np.concatenate([parameter.reshape(-1)[24:48:6], parameter.reshape(-1)[3:7]])}  # fmt: skip
    asked: list[tuple[str, int, int]] = []

    def read(name: str, start: int, stop: int) -> Any:
        asked.append((name, start, stop))
        return held[name][start:stop]

    layout = relayout(both, Loaded({}, made, {"p": (2, 6, 4)}), {name: x.shape for name, x in held.items()})
    assert layout is not None and set(layout.made) == set(both)
    for name, whole_one in wanted.items():
        matrix = whole_one.reshape(matrix_shape(whole_one.shape))
        for start in range(len(matrix) + 1):
            for stop in range(start, len(matrix) + 1):
                asked.clear()
                np.testing.assert_array_equal(layout.read(name, read, start, stop), matrix[start:stop])
                assert start == stop or set(asked) <= set(layout.rows_read(name, start, stop))
    del held["0.1"]
    assert relayout(both, Loaded({}, made, {"p": (2, 6, 4)}), {name: x.shape for name, x in held.items()}) is None


def test_an_adapter_on_a_base_of_the_other_layout(tmp_path: Path) -> None:
    """The edit is made in its own base's layout, and read in that of the recipe's."""
    model = family(tmp_path, "mixtral", "nobody")
    model.save_pretrained(tmp_path / "own")
    stacked(type(model).from_pretrained(tmp_path / "base"), tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    factors, edits = {}, {}
    for module in ("block_sparse_moe.experts.1.w3", "self_attn.q_proj"):
        name = f"model.layers.0.{module}"
        shape = weights(tmp_path / "own")[f"{name}.weight"].shape
        a, b = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        edits[f"{name}.weight"] = b.double() @ a.double()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w3", "q_proj"], "base_model_name_or_path": "own"}
        )
    )
    got, _ = merged(tmp_path, experts=(f"{tmp_path}/own+{tmp_path}/adapter",))
    own = weights(tmp_path / "own")
    check(usual("mixtral", tmp_path, got), {name: x.double() + edits.get(name, 0) for name, x in own.items()})
