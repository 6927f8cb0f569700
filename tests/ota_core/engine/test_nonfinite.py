"""Infinite numbers and NaN in what is read and written: an error that names tensor, model and count, in every pass; and how to allow them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.errors import OtaError
from ota_core.files.rows import Rows
from tests.checkpoints import Expert, Tensors, ota_recipe, random_base, random_experts, run_merge
from tests.ota_core.engine.test_bad_input import Q, World, assert_says

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {}),
    ("ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5}),
    ("slerp", {"t": 0.5}),
    ("fisher", {}),
    ("ota", {}),
    ("ota", {"density": 0.4}),
    ("ota", {"density": 0.4, "rescale": True}),  # through tensors
    ("task_arithmetic", {"lambda": "auto"}),  # through tensors, and before the first block
    ("passthrough", {}),  # copied
    ("passthrough", {"scale": 0.5}),
    ("sce", {"density": 0.5}),
    ("multislerp", {}),
    ("nuslerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("nearswap", {"t": 0.001}),
    ("arcee_fusion", {}),
    ("ram", {}),
    ("della", {"density": 0.5}),
]
MODELS = {"slerp": 1, "passthrough": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}


def _spoilt(count: int, bad: float, places: int = 3) -> tuple[Tensors, list[Expert]]:
    """A base and experts of which the last holds bad numbers."""
    base = random_base()
    experts = random_experts(base, count)
    values = experts[-1].weights[Q].copy()
    values.reshape(-1)[[1, 17, 40][:places]] = bad
    experts[-1].weights[Q] = values
    return base, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("bad", "what"), [(np.nan, "3 NaN"), (np.inf, "3 infinite"), (-np.inf, "3 infinite")])
@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[f"{m}-{'-'.join(p)}" for m, p in METHODS])
def test_an_input_that_is_not_finite(
    tmp_path: Path, method: str, parameters: dict[str, Any], bad: float, what: str, dtype: torch.dtype
) -> None:
    if dtype != torch.float32 and (method, bool(np.isnan(bad))) not in {("linear", True), ("ota", False), ("ties", False)}:
        pytest.skip("the other types take part where the passes differ")
    count = MODELS.get(method, 3)
    base, experts = _spoilt(count, bad)
    recipe = ota_recipe(tmp_path, base, experts, parameters, method=method, dtype=dtype)
    with pytest.raises(OtaError) as error:
        run_merge(recipe, tmp_path / "out")
    name = f"expert{count - 1}"
    assert_says(str(error.value), tmp_path / name, f"({name})", f"tensor '{Q}' holds {what} of 64 numbers", "--allow-nonfinite")
    assert not list(tmp_path.glob("*out*"))


def test_a_base_that_is_not_finite(tmp_path: Path) -> None:
    base = random_base()
    experts = random_experts(base, 2)
    base[Q] = base[Q].copy()
    base[Q][2, 3] = np.inf
    recipe = ota_recipe(tmp_path, base, experts, method="task_arithmetic")
    with pytest.raises(OtaError, match=r"base \(base\): tensor 'model.layers.0.self_attn.q_proj.weight' holds 1 infinite of 64"):
        run_merge(recipe, tmp_path / "out")


def test_allowed_numbers_are_merged_and_are_another_merge(tmp_path: Path) -> None:
    base, experts = _spoilt(2, np.inf, places=1)
    recipe = ota_recipe(tmp_path, base, experts, method="linear")
    merged, report = run_merge({**recipe, "allow_nonfinite": True}, tmp_path / "out")
    assert np.isinf(merged[Q].reshape(-1)[1]) and np.isfinite(merged[Q].reshape(-1)[2:]).all()
    experts[-1].weights[Q] = experts[0].weights[Q]
    whole = ota_recipe(tmp_path / "whole", base, experts, method="linear")
    _, other = run_merge(whole, tmp_path / "plain")
    # A cached result that was allowed to hold such numbers must never be taken for one that was not.
    assert report.fingerprint != other.fingerprint
    _, same = run_merge({**whole, "allow_nonfinite": False}, tmp_path / "again")
    assert same.fingerprint == other.fingerprint


def test_the_option_of_the_command(tmp_path: Path) -> None:
    world = World(tmp_path / "w")
    world.recipe = {**world.recipe, "merge_method": "linear", "parameters": {}}
    for model in world.recipe["models"]:
        model["parameters"] = {}
    world.edit("expert0/model.safetensors", lambda t: t[Q].__setitem__((0, 0), float("nan")))
    assert_says(world.refused(), world.root / "expert0", f"tensor '{Q}' holds 1 NaN of 64 numbers", "--allow-nonfinite")
    result = world.run("merge", "--allow-nonfinite")
    assert result.exit_code == 0, result.output


def test_a_result_beyond_float16(tmp_path: Path) -> None:
    """turboderp-org/exllamav2#622, ggml-org/llama.cpp#13722: merges whose float16 holds Inf, found out by who quantises them."""
    base = random_base()
    experts = random_experts(base, 2)
    for expert in experts:
        expert.weights[Q] = expert.weights[Q].copy()
        expert.weights[Q][0, :2] = 60000.0
    recipe = ota_recipe(tmp_path, base, experts, {"normalize": False}, method="linear", top={"dtype": "float16"})
    with pytest.raises(OtaError) as error:
        run_merge(recipe, tmp_path / "out")
    assert_says(
        str(error.value), f"tensor '{Q}' of the merged model: 2 infinite of 64 numbers", "float16 ends at 65504", "bfloat16"
    )
    merged, _ = run_merge({**recipe, "dtype": "bfloat16"}, tmp_path / "out")
    assert merged[Q][0, 0] == 119808.0  # 120,000 in bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_types_that_no_compiled_pass_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    base, experts = _spoilt(2, np.nan)
    recipe = ota_recipe(tmp_path, base, experts, method="linear", dtype=dtype, top={"dtype": "float32"})
    with pytest.raises(OtaError, match="holds 3 NaN of 64 numbers"):
        run_merge(recipe, tmp_path / "out")


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check costs no second read: a linear merge asks for each row of each model once."""
    from ota_core.files import safetensors_io

    seen: list[tuple[str, str, int, int]] = []
    read = safetensors_io.SafetensorsFile.read_rows

    def counted(self: safetensors_io.SafetensorsFile, name: str, start: int, stop: int) -> Rows:
        seen.append((str(self.path), name, start, stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(safetensors_io.SafetensorsFile, "read_rows", counted)
    base = random_base()
    run_merge(ota_recipe(tmp_path, base, random_experts(base, 2), method="linear"), tmp_path / "out")
    assert seen and len(seen) == len(set(seen))
