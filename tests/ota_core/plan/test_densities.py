"""Realised densities and exact thresholds of FFG, on models with tied embeddings and with vectors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.checkpoints import SHAPES, ota_recipe, random_base, random_experts, run_merge
from tests.reference import Expert, Tensors

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
BASE = random_base(3, {**SHAPES, "model.embed_tokens.weight": (131, 8)})
TOTAL = sum(x.size for x in BASE.values())
DENSITIES = [0.001, 0.003, 0.01, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.99, 0.999]


def scored(expert: Expert, base: Tensors = BASE, **options: Any) -> Tensors:
    """Scores without a zero anywhere unless the expert has them, by tensor."""
    return reference.scores(base, expert, reference.curvature(expert), **options)


def flat(score: Tensors) -> np.ndarray[Any, Any]:
    return np.concatenate([x.ravel() for x in score.values()])


def distinct(seed: int) -> Expert:
    """An expert in which every element moved and carries curvature."""
    rng = np.random.default_rng(seed)
    weights = {n: (x + rng.normal(0, 0.02, x.shape)).astype(np.float32) for n, x in BASE.items()}
    return Expert(weights=weights, v={n: (10.0 ** rng.uniform(-20, -8, x.shape)).astype(np.float32) for n, x in BASE.items()})


def merged(
    tmp: Path, base: Tensors, experts: list[Expert], parameters: dict[str, Any] | None = None, **options: Any
) -> tuple[Tensors, Any]:
    return run_merge(ota_recipe(tmp, base, experts, parameters, **options), tmp / "out")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_realised_density_is_the_asked_one(tmp_path: Path, density: float, tied: bool) -> None:
    expert = replace(distinct(1), density=density)
    base, config = BASE, {"tie_word_embeddings": tied}
    if tied:
        [(alias, canonical)] = TIED.items()
        base = {**BASE, alias: BASE[canonical]}
        expert = replace(expert, weights={**expert.weights, alias: expert.weights[canonical]})
    got, report = merged(tmp_path, base, [expert], config=config)
    facts = report.densities["expert0"]
    k = reference.kept_count(density, TOTAL)
    values = flat(scored(expert))
    ties = int((values == np.sort(values)[::-1][k - 1]).sum()) - 1
    assert facts["total"] == TOTAL, "a tied tensor counts once"
    assert k <= facts["kept"] <= k + ties
    assert facts["density"] == facts["kept"] / TOTAL
    assert abs(facts["density"] - density) <= (0.5 + ties) / TOTAL + 1e-12
    changed = {n: (got[n] != BASE[n]) for n in BASE}
    assert sum(int(x.sum()) for x in changed.values()) == facts["kept"], "the weights show the mask that the report counts"
    assert set(facts["per_tensor"]) >= set(BASE)
    for name, mask in changed.items():
        assert facts["per_tensor"][name] == pytest.approx(mask.mean())


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.9])
def test_per_tensor_densities(tmp_path: Path, density: float) -> None:
    expert = replace(distinct(2), density=density)
    got, report = merged(tmp_path, BASE, [expert], {"scope": "per_tensor"})
    facts = report.densities["expert0"]
    for name, score in scored(expert).items():
        k = reference.kept_count(density, score.size)
        assert int((got[name] != BASE[name]).sum()) == k, name
        if k:
            assert np.float32(facts["threshold"][name]) == np.sort(score, axis=None)[::-1][k - 1]


def test_density_one_has_no_mask(tmp_path: Path) -> None:
    """Also an element that did not move takes part: it pulls the others towards the base."""
    a, b = (replace(e, density=1.0) for e in random_experts(BASE, 2, still=0.5))
    got, _ = merged(tmp_path, BASE, [a, b])
    still = {n: (a.weights[n] == BASE[n]) & (a.v[n] > 0) & (b.weights[n] != BASE[n]) & (b.v[n] > 0) for n in BASE}
    for name, where in still.items():
        pulled = np.abs(got[name][where] - BASE[name][where]) <= np.abs(b.weights[name][where] - BASE[name][where])
        assert pulled.all()
    assert any((got[n][w] != b.weights[n][w]).any() for n, w in still.items())


def special(kind: str) -> Expert:
    """Scores that make thresholds hard."""
    rng = np.random.default_rng(7)
    expert = distinct(9)
    v = dict(expert.v)
    if kind == "ties":
        v = {n: rng.choice([1e-10, 4e-10], x.shape).astype(np.float32) for n, x in BASE.items()}
        weights = {n: (np.round(x * 64) / 64 + rng.choice([-1, 1], x.shape) / 64).astype(np.float32) for n, x in BASE.items()}
        return Expert(weights=weights, v=v)
    if kind == "zeros":
        v = {n: np.where(rng.random(x.shape) < 0.7, 0, x).astype(np.float32) for n, x in v.items()}
    if kind == "tiny v":
        v = {n: (10.0 ** rng.uniform(-36, -34, x.shape)).astype(np.float32) for n, x in v.items()}
        assert all((x > 0).all() for x in v.values())
    if kind == "denormal v":
        v = {n: rng.integers(1, 1000, x.shape).astype(np.uint32).view(np.float32) for n, x in v.items()}
    if kind == "denormal scores":
        weights = {n: (rng.normal(0, 1e-22, x.shape)).astype(np.float32) for n, x in BASE.items()}
        return Expert(weights=weights, v={n: (10.0 ** rng.uniform(-36, -34, x.shape)).astype(np.float32) for n, x in v.items()})
    if kind == "one bit apart":
        one = np.float32(1e-10).view(np.uint32)
        v = {n: (one + rng.integers(0, 40, x.shape)).astype(np.uint32).view(np.float32) for n, x in v.items()}
        weights = {n: np.full(x.shape, 0.5, np.float32) for n, x in BASE.items()}
        return Expert(weights=weights, v=v)
    return replace(expert, v=v)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "tiny v", "denormal v", "denormal scores", "one bit apart"])
def test_tau_is_the_kth_largest_of_a_full_sort(tmp_path: Path, kind: str, density: float) -> None:
    expert = replace(special(kind), density=density)
    base = {n: np.round(x * 64) / 64 for n, x in BASE.items()} if kind == "ties" else BASE
    if kind in {"denormal scores", "one bit apart"}:
        base = {n: np.zeros_like(x) for n, x in BASE.items()}
    _, report = merged(tmp_path, base, [expert])
    facts = report.densities["expert0"]
    values = flat(scored(expert, base))
    tau = np.sort(values)[::-1][reference.kept_count(density, values.size) - 1]
    assert np.float32(facts["threshold"]) == tau, (facts["threshold"], tau)
    assert facts["kept"] == int(((values >= tau) & (values > 0)).sum())
    if kind == "denormal scores":
        assert 0 < np.median(values) < np.finfo(np.float32).tiny


def test_a_threshold_in_units_of_v_delta_squared(tmp_path: Path) -> None:
    expert = distinct(4)
    asked = float(np.median(np.concatenate([x.ravel() for x in scored(expert).values()]).astype(np.float64) ** 2))
    _, report = merged(tmp_path, BASE, [replace(expert, precond_threshold=asked)])
    facts = report.densities["expert0"]
    assert facts["kept"] == int((flat(scored(expert)) >= np.float32(np.sqrt(asked))).sum())
    assert facts["density"] == pytest.approx(0.5, abs=0.01)


def test_elements_without_curvature_are_not_counted(tmp_path: Path) -> None:
    """A tensor that the expert neither moved nor has curvature for is outside N."""
    name = "model.embed_tokens.weight"
    whole = distinct(6)
    expert = replace(
        whole, weights={**whole.weights, name: BASE[name]}, v={n: x for n, x in whole.v.items() if n != name}, density=0.5
    )
    _, report = merged(tmp_path, BASE, [expert])
    facts = report.densities["expert0"]
    assert facts["total"] == TOTAL - BASE[name].size
    assert facts["kept"] == reference.kept_count(0.5, facts["total"])


def test_a_density_that_rounds_to_nothing(tmp_path: Path) -> None:
    got, report = merged(tmp_path, BASE, [replace(distinct(1), density=0.0003)])
    facts = report.densities["expert0"]
    assert (facts["kept"], facts["density"]) == (0, 0) and float(facts["threshold"]) == float("inf")
    assert all((got[n] == BASE[n]).all() for n in BASE)


def test_an_expert_that_never_moved_keeps_nothing(tmp_path: Path) -> None:
    expert = Expert(weights=BASE, v=distinct(1).v, density=0.5)
    got, report = merged(tmp_path, BASE, [expert])
    assert report.densities["expert0"]["kept"] == 0 and report.densities["expert0"]["threshold"] == 0
    assert all((got[n] == BASE[n]).all() for n in BASE)
