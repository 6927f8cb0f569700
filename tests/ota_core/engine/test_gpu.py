"""The same merges on a GPU: equal to the CPU's within one unit in the last place of the output type, for every method and option.

Skipped where torch sees no GPU. `make test-gpu` also runs the other tests of the engine with the GPU as their device.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ota_core.compute.gpu import Lanes, gpus_of, to_device
from ota_core.engine.engine import mask, merge
from ota_core.files.rows import Rows
from ota_core.plan.inputs import resolve_local
from ota_core.plan.views import tensor_on
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import ota_recipe, random_base, random_experts

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ota", {}),
    ("ota", {"density": 0.3}),
    ("ota", {"density": 0.3, "scope": "per_tensor", "denominator": "all", "lambda": 1.7}),
    ("ota", {"density": 0.3, "metric": "magnitude", "normalise": "global"}),
    ("ota", {"density": 0.3, "compression": "rank1", "mask_curvature": "full"}),
    ("ota", {"density": 0.3, "compression": "log8", "rescale": True}),
    ("ota", {"density": 0.3, "masked_merge": "ties", "fallback": "mean"}),
    ("ota", {"precond_threshold": 1e-16, "epsilon": 1e-12, "power": 0.25}),
    ("fisher", {"compression": "rank1"}),
    ("linear", {}),
    ("task_arithmetic", {"lambda": 0.4}),
    ("ties", {"density": 0.4}),
    ("dare_ties", {"density": 0.4, "seed": 3}),
    ("dare_linear", {"density": 0.4, "rescale": False}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1}),
    ("sce", {"density": 0.4}),
    ("della", {"density": 0.5}),
    ("ramplus_tl", {"epsilon": 0.01}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {"filter_wise": True}),
]


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of two tensors in units in the last place."""
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(whole).long()
        return torch.where(bits < 0, -(bits & (2**31 - 1 if whole == torch.int32 else 2**15 - 1)), bits)

    return int((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0


def test_steps_are_counted_across_zero() -> None:
    tiny = torch.tensor([1.0], dtype=torch.float32).nextafter(torch.tensor([2.0]))
    assert steps_apart(torch.tensor([1.0]), tiny) == 1
    assert steps_apart(torch.tensor([-0.0]), torch.tensor([0.0])) == 0
    assert steps_apart(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)) == 2 * 0x3F80


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_a_gpu_merges_as_the_cpu_does(tmp_path: Path, method: str, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), parameters, method=method, dtype=dtype))
    on_cpu = merge(recipe, tmp_path / "cpu")
    on_gpu = merge(recipe, tmp_path / "gpu", device="cuda")
    assert on_gpu.densities == on_cpu.densities and on_gpu.fingerprint == on_cpu.fingerprint
    want, got = (load_file(tmp_path / where / "model.safetensors") for where in ("cpu", "gpu"))
    assert {name: steps_apart(got[name], want[name]) for name in want} == pytest.approx(dict.fromkeys(want, 0), abs=1)


@gpu
def test_blocks_and_threads_change_no_bit_on_a_gpu(tmp_path: Path) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), {"density": 0.3}))
    merge(recipe, tmp_path / "one", device="cuda", threads=1)
    merge(recipe, tmp_path / "many", device="cuda", threads=7, block_elements=50)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "many" / "model.safetensors").read_bytes()


@gpu
def test_masks_made_on_a_gpu_are_the_cpus(tmp_path: Path) -> None:
    base = random_base()
    recipe = MergeRecipe.model_validate(ota_recipe(tmp_path, base, random_experts(base), {"density": 0.3}))
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        mask(recipe, tmp_path / device, inputs=resolve_local(recipe), device=device)
    for name in ("expert0.safetensors", "expert1.safetensors", "expert2.safetensors"):
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()


@gpu
def test_threads_take_the_gpus_in_turn_and_wait_for_their_own_stream() -> None:
    gpus = gpus_of("cuda")
    lanes = Lanes(gpus)
    with lanes.mine():
        assert torch.cuda.current_device() in gpus
        rows = torch.arange(1 << 20, dtype=torch.float32)
        doubled = to_device(rows, "cuda") * 2
    assert np.array_equal(doubled.cpu().numpy(), rows.numpy() * 2)


def test_a_device_stands_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpus_of("cuda") == [0, 1, 2]
    assert gpus_of("cuda:2") == [2]
    assert gpus_of("cpu") == []


def test_on_the_cpu_rows_are_not_copied() -> None:
    rows = Rows.float32(np.ones((3, 2), np.float32))
    assert tensor_on("cpu", rows).data_ptr() == rows.address
