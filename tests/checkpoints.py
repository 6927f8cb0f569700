"""Small checkpoints from dictionaries of arrays, and merges of them: what the tests of the engine are made of."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from tests.reference import Expert, Tensors

if TYPE_CHECKING:
    from ota_core.plan.inputs import MergeInputs

# Two-layer names, with a tensor of experts (three axes), vectors, and sizes that no power of two divides.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.experts.down_proj": (3, 5, 8),
    "model.layers.1.mlp.up_proj.weight": (9, 8),
    "model.layers.1.input_layernorm.weight": (8,),
    "model.norm.weight": (7,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "vocab_size": 13,
    "tie_word_embeddings": False,
}


def random_base(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensors:
    """Weights of the size that real ones have, float32."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def random_expert(base: Tensors, seed: int, *, still: float = 0.1, **options: Any) -> Expert:
    """An expert near the base: a fraction ``still`` of its elements did not move. v spans 1e-20 … 1e-8 and holds exact zeros."""
    rng = np.random.default_rng([seed, 1])
    weights, v = {}, {}
    for name, start in base.items():
        moved = rng.random(start.shape) >= still
        weights[name] = np.where(moved, start + rng.normal(0, 0.02, start.shape), start).astype(np.float32)
        v[name] = (10.0 ** rng.uniform(-20, -8, start.shape) * (rng.random(start.shape) >= 0.05)).astype(np.float32)
    return replace(Expert(weights=weights, v=v), **options)


def random_experts(base: Tensors, count: int = 3, **options: Any) -> list[Expert]:
    return [random_expert(base, seed, **options) for seed in range(1, count + 1)]


def exact_v(experts: Sequence[Expert]) -> list[Expert]:
    """The same experts with v cut to 4 bits of mantissa over 16 binades, so that every sum of v is exact in any order."""
    rng = np.random.default_rng(5)

    def draw(shape: tuple[int, ...]) -> NDArray[np.float32]:
        return (rng.integers(0, 16, shape) * 2.0 ** rng.integers(-60, -44, shape)).astype(np.float32)

    return [replace(e, v={name: draw(x.shape) for name, x in e.v.items()}) for e in experts]


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The values that remain after storage in a data type, as float32."""
    return {name: torch.tensor(x).to(dtype).float().numpy() for name, x in tensors.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A Hugging Face folder: config.json and model.safetensors, or ``shards`` files dealt round-robin with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=2))
    stored = {name: torch.tensor(x) for name, x in tensors.items()}
    stored = {name: (x.to(dtype) if x.is_floating_point() else x).contiguous() for name, x in stored.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(stored)}
    for file in sorted(set(weight_map.values())):
        save_file({n: x for n, x in stored.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    size = sum(x.nbytes for x in stored.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def write_moments(
    folder: Path, v: Mapping[str, Any], *, step: int | None = None, beta2: float | None = None, suffix: str = ""
) -> Path:
    """exp_avg_sq.safetensors beside the weights; ``step`` and ``beta2`` go into its metadata, ``suffix`` behind every name."""
    metadata = {key: str(value) for key, value in {"step": step, "beta2": beta2}.items() if value is not None}
    path = folder / "exp_avg_sq.safetensors"
    save_file({name + suffix: torch.as_tensor(x).contiguous() for name, x in v.items()}, path, metadata=metadata or None)
    return path


def write_expert(folder: Path, expert: Expert, **options: Any) -> Path:
    """Weights and second moments of one expert; options as ``write_checkpoint``."""
    write_checkpoint(folder, expert.weights, **options)
    if expert.v:
        write_moments(folder, expert.v, step=expert.step, beta2=expert.beta2)
    return folder


def expert_parameters(expert: Expert) -> dict[str, Any]:
    """What the recipe says about one expert."""
    given = {"density": expert.density, "precond_threshold": expert.precond_threshold}
    factor = {} if expert.scaling_factor == 1.0 else {"scaling_factor": expert.scaling_factor}
    return {key: value for key, value in given.items() if value is not None} | factor


def ota_recipe(root: Path, base: Tensors | None, experts: Sequence[Expert], parameters: Mapping[str, Any] | None = None, *,
               method: str = "ota", top: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Write base and experts below ``root`` and return a recipe for them; ``options`` as ``write_checkpoint``."""
    models = [
        {"model": str(write_expert(root / f"expert{m}", e, **options)), "name": f"expert{m}", "parameters": expert_parameters(e)}
        for m, e in enumerate(experts)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": dict(parameters or {}), **(top or {})}
    if base is not None:
        recipe["base_model"] = str(write_checkpoint(root / "base", base, **options))
    return recipe


def run_merge(recipe: Mapping[str, Any], out: Path, **options: Any) -> tuple[Tensors, Any]:
    """Merge with the engine, on the device of ``OTA_TEST_DEVICE``; the merged tensors as float32 arrays, and the report."""
    from ota_core.engine.engine import merge
    from ota_core.recipe.recipe import MergeRecipe

    device = os.environ.get("OTA_TEST_DEVICE", "cpu")
    report = merge(MergeRecipe.model_validate(dict(recipe)), out, **{"device": device, **options})
    return read_tensors(out), report


def with_compressed(inputs: "MergeInputs", folder: Path, method: str, rank: int | None = None) -> "MergeInputs":
    """The inputs with their second moments compressed into files of ``folder``, as a stage leaves them, and the full ones beside them."""
    from ota_core.engine.engine import compress_moments

    experts = []
    for expert in inputs.experts:
        assert expert.moments is not None
        path = folder / f"{expert.name}.moments"
        compress_moments(expert.moments, path, method=method, rank=rank)
        experts.append(replace(expert, moments=path, full_moments=expert.moments))
    return replace(inputs, experts=tuple(experts))


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a written checkpoint as float32, found through the index where there is one."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors: Tensors = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as source:
            for name in sorted(source.keys()):
                assert name not in tensors, f"{name} is in two shards"
                tensors[name] = source.get_tensor(name).float().numpy()
    return tensors


def assert_merged(got: Tensors, expected: Tensors, base: Tensors | None = None, rtol: float = 1e-6) -> None:
    """Equal to rounding: half a float32 step of the value, and ``rtol`` of the largest change in the tensor."""
    assert sorted(got) == sorted(expected)
    for name, want in expected.items():
        change = np.abs(want - base[name]).max(initial=0.0) if base is not None else np.abs(want).max(initial=0.0)
        error = np.abs(got[name].astype(np.float64) - want)
        allowed = 6.1e-8 * np.abs(want) + rtol * change
        worst = np.unravel_index(np.argmax(error - allowed), want.shape) if want.size else ()
        assert (error <= allowed).all(), (
            f"{name}{list(worst)}: got {got[name][worst]!r}, expected {want[worst]!r} ± {allowed[worst]:.3g}"
        )
