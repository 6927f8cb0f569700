"""λ from the row spaces and row-space regression against plain float64 computations, and the limits that both must have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ota_core.errors import OtaError
from ota_core.files.rows import F32
from ota_core.plan.matrices import matrices_of
from ota_core.plan.views import TensorJob
from tests.checkpoints import ota_recipe, random_base, random_experts, run_merge
from tests.reference import Expert, Tensors

F64 = NDArray[np.float64]
UP = "model.layers.0.mlp.up_proj.weight"
SHAPES = {
    "model.embed_tokens.weight": (21, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    UP: (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.mlp.experts.down_proj": (3, 16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (21, 16),
}
MATRICES = [name for name in SHAPES if name not in {"model.embed_tokens.weight", "model.norm.weight"}]


def experts_of(base: Tensors, deltas: list[Mapping[str, Any]]) -> list[Expert]:
    """Experts whose task vectors these are; a tensor that is not named did not move."""
    return [
        Expert(weights={name: (x + delta.get(name, 0)).astype(np.float32) for name, x in base.items()}, v={}) for delta in deltas
    ]


def low_rank(base: Tensors, seed: int, rank: int = 3) -> dict[str, F64]:
    """Task vectors whose rows span few directions, as those of a training do."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, x in base.items():
        if x.ndim < 2:
            found[name] = 0.02 * rng.normal(size=x.shape)
        else:
            found[name] = 0.02 * rng.normal(size=(*x.shape[:-1], rank)) @ rng.normal(size=(*x.shape[:-2], rank, x.shape[-1]))
    return found


def moved(experts: list[Expert], base: Tensors, name: str) -> list[F64]:
    """The task vectors of one tensor as stacks of matrices, float64 (n, out, in)."""
    found = [expert.weights[name].astype(np.float64) - base[name] for expert in experts]
    return [x.reshape(-1, *x.shape[-2:]) for x in found]


def scale_of(edit: F64, deltas: list[F64]) -> float:
    """λ_n as docs/methods.md section 8 writes it."""
    numerator = sum(np.sum((edit @ d.T) * (d @ d.T)) / np.sum(d * d) for d in deltas if d.any())
    return float(numerator / sum(np.sum((edit @ d.T) ** 2) / np.sum(d * d) for d in deltas if d.any()))


def regressed(prior: F64, deltas: list[F64], ridge: float) -> F64:
    """X of section 8, by a plain solve."""
    grams = [d.T @ d / np.sum(d * d) for d in deltas]
    total = np.sum(grams, axis=0)
    shrink = ridge * np.mean(np.diag(total))
    wanted = np.sum([d @ c for d, c in zip(deltas, grams, strict=True)], axis=0) + shrink * prior
    solved: F64 = np.linalg.solve(total + shrink * np.eye(len(total)), wanted.T).T
    return solved


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"normalize": True}),
    ("ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("ota", {"density": 0.4}),
    ("ota", {"density": 0.4, "masked_merge": "ties"}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_auto_is_the_mean_of_the_matrices_scales(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    base = random_base(3, SHAPES)
    experts = random_experts(base)
    one, _ = run_merge(ota_recipe(tmp_path, base, experts, parameters, method=method), tmp_path / "one")
    wanted: dict[str, list[float]] = {}
    for name in MATRICES:
        (edit,) = moved([Expert(weights=one, v={})], base, name)
        stacks = moved(experts, base, name)
        wanted[name] = [scale_of(matrix, [stack[i] for stack in stacks]) for i, matrix in enumerate(edit)]
    mean = np.mean([value for values in wanted.values() for value in values])

    recipe = ota_recipe(tmp_path, base, experts, parameters | {"lambda": "auto"}, method=method)
    merged, report = run_merge(recipe, tmp_path / "auto")
    found = report.results["lambda"]
    assert found["value"] == pytest.approx(mean, rel=1e-4)
    assert found["per_tensor"] == pytest.approx({name: np.mean(values) for name, values in wanted.items()}, rel=1e-4)
    # What is written is what this number as the recipe's λ gives, to the bit.
    recipe["parameters"]["lambda"] = found["value"]
    given, _ = run_merge(recipe, tmp_path / "given")
    assert all(np.array_equal(merged[name], given[name]) for name in SHAPES)

    recipe["parameters"]["lambda"] = "auto_per_tensor"
    each, report = run_merge(recipe, tmp_path / "each")
    for name, x in base.items():
        factor = found["per_tensor"].get(name, found["value"])
        assert np.allclose(each[name] - x, factor * (one[name].astype(np.float64) - x), atol=3e-7)


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_refined_matrices_are_the_regressions_solution(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    base = random_base(4, SHAPES)
    experts = random_experts(base)
    prior, _ = run_merge(ota_recipe(tmp_path, base, experts, parameters | {"lambda": "auto"}, method=method), tmp_path / "prior")
    recipe = ota_recipe(tmp_path, base, experts, parameters | {"refine": "rowspace", "ridge": 0.7}, method=method)
    merged, report = run_merge(recipe, tmp_path / "out")
    for name, x in base.items():
        if name not in MATRICES:
            assert np.array_equal(merged[name], prior[name])
            continue
        (start,), stacks = moved([Expert(weights=prior, v={})], base, name), moved(experts, base, name)
        wanted = np.stack([regressed(start[i], [stack[i] for stack in stacks], 0.7) for i in range(len(start))])
        assert np.allclose((merged[name] - x).reshape(wanted.shape), wanted, atol=2e-7)
    assert report.results["rowspace"]["tensors"] == len(MATRICES)
    assert report.results["rowspace"]["largest_residual"] < 1e-5


def test_the_second_moments_of_the_inputs_join_the_grams(tmp_path: Path) -> None:
    base = random_base(5, SHAPES)
    experts = random_experts(base)
    prior, _ = run_merge(ota_recipe(tmp_path, base, experts, {"lambda": 1.3}), tmp_path / "prior")
    recipe = ota_recipe(tmp_path, base, experts, {"lambda": 1.3, "refine": "rowspace", "input_curvature": 0.3})
    merged, _ = run_merge(recipe, tmp_path / "out")
    deltas = [stack[0] for stack in moved(experts, base, UP)]
    sums = [expert.v[UP].astype(np.float64).sum(0) for expert in experts]
    grams = [d.T @ d / np.sum(d * d) + 0.3 * np.diag(v / v.sum()) for d, v in zip(deltas, sums, strict=True)]
    total = np.sum(grams, axis=0)
    shrink = 0.3 * np.mean(np.diag(total))
    wanted = np.sum([d @ c for d, c in zip(deltas, grams, strict=True)], axis=0)
    wanted += shrink * (prior[UP].astype(np.float64) - base[UP])
    solved = np.linalg.solve(total + shrink * np.eye(len(total)), wanted.T).T
    assert np.allclose(merged[UP] - base[UP], solved, atol=2e-7)


@pytest.mark.parametrize("parameters", [{"lambda": "auto"}, {"lambda": "auto_per_tensor"}, {"refine": "rowspace"}])
@pytest.mark.parametrize("count", [1, 3])
def test_one_expert_and_equal_experts_are_themselves(tmp_path: Path, parameters: dict[str, Any], count: int) -> None:
    base = random_base(6, SHAPES)
    (expert,) = random_experts(base, 1)
    recipe = ota_recipe(tmp_path, base, [expert] * count, parameters | {"normalize": True}, method="task_arithmetic")
    merged, report = run_merge(recipe, tmp_path / "out")
    assert report.results["lambda"]["value"] == pytest.approx(1, abs=1e-6)
    assert all(np.allclose(merged[name], expert.weights[name], atol=3e-7) for name in SHAPES)


@pytest.mark.parametrize("method", ["task_arithmetic", "rowspace"])
def test_edits_of_orthogonal_inputs_add_up(tmp_path: Path, method: str) -> None:
    base = random_base(7, SHAPES)
    rng = np.random.default_rng(8)
    deltas: list[dict[str, Any]] = []
    for m in range(4):
        deltas.append({name: np.zeros(SHAPES[name]) for name in MATRICES})
        for name in MATRICES:
            own = np.arange(SHAPES[name][-1]) % 4 == m
            # Edits of equal size, and as many directions in each: λ is the number of experts then.
            part = np.linalg.qr(rng.normal(size=(*SHAPES[name][:-1], own.sum())))[0]
            deltas[m][name][..., own] = 0.1 * part
    parameters = {"lambda": "auto", "normalize": True} if method == "task_arithmetic" else {}
    recipe = ota_recipe(tmp_path, base, experts_of(base, deltas), parameters, method=method)
    merged, report = run_merge(recipe, tmp_path / "out")
    assert report.results["lambda"]["value"] == pytest.approx(4, rel=1e-5)
    for name in MATRICES:
        assert np.allclose(merged[name] - base[name], sum(delta[name] for delta in deltas), atol=2e-6)


def test_probes_come_close_to_the_exact_scale(tmp_path: Path) -> None:
    """A matrix with more outputs than are computed exactly; its transpose in a Conv1D has the same probes."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (700, 48), "model.norm.weight": (5,)}
    base = random_base(9, shapes)
    experts = experts_of(base, [low_rank(base, seed, rank=8) for seed in range(3)])
    _, report = run_merge(
        ota_recipe(tmp_path, base, experts, {"lambda": "auto", "normalize": True}, method="task_arithmetic"), tmp_path / "out"
    )
    stacks = [stack[0] for stack in moved(experts, base, UP)]
    exact = scale_of(np.mean(stacks, axis=0), stacks)
    found = report.results["lambda"]["value"]
    assert found != exact and found == pytest.approx(exact, rel=0.06)

    turned = {"transformer.h.0.mlp.c_fc.weight": base[UP].T.copy(), "transformer.ln_f.weight": base["model.norm.weight"]}
    own = experts_of(turned, [{"transformer.h.0.mlp.c_fc.weight": stack.T} for stack in stacks])
    parameters = {"lambda": "auto", "normalize": True}
    recipe = ota_recipe(tmp_path / "gpt2", turned, own, parameters, method="task_arithmetic", config={"model_type": "gpt2"})
    _, report = run_merge(recipe, tmp_path / "gpt2" / "out")
    assert report.results["lambda"]["value"] == pytest.approx(exact, rel=0.06)


def test_a_conv1d_is_merged_as_the_linear_layer_that_it_is(tmp_path: Path) -> None:
    base = random_base(10, {UP: (24, 16), "model.norm.weight": (5,)})
    experts = random_experts(base)
    name, norm = "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight"

    def turned(tensors: Tensors) -> Tensors:
        return {name: np.ascontiguousarray(tensors[UP].T), norm: tensors["model.norm.weight"]}

    own = [Expert(weights=turned(expert.weights), v=turned(expert.v)) for expert in experts]
    parameters = {"density": 0.4, "refine": "rowspace", "input_curvature": 0.2}
    plain, report = run_merge(ota_recipe(tmp_path / "linear", base, experts, parameters), tmp_path / "linear" / "out")
    recipe = ota_recipe(tmp_path / "gpt2", turned(base), own, parameters, config={"model_type": "gpt2"})
    merged, other = run_merge(recipe, tmp_path / "gpt2" / "out")
    assert other.results["lambda"]["value"] == pytest.approx(report.results["lambda"]["value"], rel=1e-5)
    assert np.allclose(merged[name].T, plain[UP], atol=3e-7)


@pytest.mark.parametrize(
    ("shape", "config", "input_first"),
    [
        ((4, 64, 32), {"hidden_size": 32}, False),
        ((4, 32, 64), {"hidden_size": 32}, True),
        ((4, 32, 32), {"hidden_size": 32, "model_type": "gpt_oss"}, True),
        ((4, 32, 32), {"text_config": {"hidden_size": 32}, "model_type": "mixtral"}, False),
    ],
)
def test_the_width_of_the_model_tells_how_a_stack_lies(shape: tuple[int, ...], config: dict[str, Any], input_first: bool) -> None:
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        down = name.endswith("down_proj")
        own = (shape[0], shape[2], shape[1]) if down else shape
        found = matrices_of(TensorJob(name, name, own, F32, False), config)
        assert found is not None and found.input_first == input_first
        width = 32
        assert (found.outputs if down else found.inputs) == width


def test_nothing_depends_on_memory_threads_or_blocks(tmp_path: Path) -> None:
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (600, 40),
        "model.layers.0.mlp.down_proj.weight": (40, 600),
        "model.norm.weight": (40,),
    }
    base = random_base(11, shapes)
    recipe = ota_recipe(tmp_path, base, random_experts(base), {"density": 0.3, "refine": "rowspace"})
    usual, report = run_merge(recipe, tmp_path / "usual")
    for i, limits in enumerate(({"threads": 1}, {"threads": 5, "memory": "64MiB"}, {"block_elements": 977})):
        merged, other = run_merge(recipe, tmp_path / str(i), **limits)  # type: ignore[arg-type]
        assert other.results == report.results
        assert all(np.array_equal(merged[name], usual[name]) for name in shapes)


def test_a_merge_without_moved_matrices_needs_a_number(tmp_path: Path) -> None:
    base = random_base(12, SHAPES)
    experts = experts_of(base, [{"model.norm.weight": np.full(16, 0.1)}, {}])
    with pytest.raises(OtaError, match="give a number"):
        run_merge(ota_recipe(tmp_path, base, experts, {"lambda": "auto"}, method="ties"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_matrix_larger_than_the_budget_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.down_proj.weight": (8, 3000)}
    base = random_base(13, shapes)
    recipe = ota_recipe(tmp_path, base, random_experts(base), {}, method="rowspace")
    with pytest.raises(OtaError, match=r"down_proj.*--memory 1GiB"):
        run_merge(recipe, tmp_path / "out", memory="64MiB")
    assert not list(tmp_path.glob("*out*"))


def test_an_ill_conditioned_matrix_is_solved_in_float64() -> None:
    from ota_core.methods.row_space import regress

    rng = np.random.default_rng(14)
    deltas = [rng.normal(size=(30, 40)) * np.logspace(0, -4, 40) for _ in range(2)]
    prior = np.zeros((30, 40))
    single = [(torch.from_numpy(d).float(), 1.0, None) for d in deltas]
    found = regress(iter(single), torch.from_numpy(prior).float(), ridge=1e-4)
    wanted = regressed(prior, deltas, 1e-4)
    assert found.double and np.linalg.norm(found.edit.numpy() - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("name", "canonical", "shape", "is_matrix"),
    [
        ("lm_head.weight", "lm_head.weight", (50, 16), True),
        ("lm_head.weight", "model.embed_tokens.weight", (50, 16), False),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", (50, 16), False),
        ("embed_out.weight", "embed_out.weight", (50, 16), True),
        ("transformer.wpe.weight", "transformer.wpe.weight", (64, 16), False),
        ("model.decoder.embed_positions.weight", "model.decoder.embed_positions.weight", (64, 16), False),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight", (8, 16), True),
        ("backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.A_log", (32, 16), False),
        ("backbone.layers.0.mixer.conv1d.weight", "backbone.layers.0.mixer.conv1d.weight", (32, 1, 4), False),
        ("model.norm.weight", "model.norm.weight", (16,), False),
    ],
)
def test_what_multiplies_activations(name: str, canonical: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    assert (matrices_of(TensorJob(name, canonical, shape, F32, False), {"model_type": "llama"}) is not None) == is_matrix
