"""Every number of an analysis equals a plain float64 computation on whole models, in any blocks, threads, shards and types."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from ota_core.analysis import Analysis, AnalysisOptions, analyse
from ota_core.plan.inputs import resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests import reference
from tests.checkpoints import SHAPES, ota_recipe, random_base, random_experts, rounded
from tests.ota_core.analysis import analysis_reference as plain
from tests.reference import Expert, Tensors

ALL_SHAPES = SHAPES | {"model.layers.1.mlp.up_proj.bias": (9,)}
NAMES = ("expert0", "expert1", "expert2")


def world(seed: int = 3, **options: Any) -> tuple[Tensors, list[Expert]]:
    """A base and three experts. v has the upper 16 bits of a float32 alone, so that ranks by these bits are the ranks."""
    base = random_base(seed, ALL_SHAPES)
    experts = random_experts(base, **options)
    return base, [replace(e, v=rounded(e.v, torch.bfloat16)) for e in experts]


def run(recipe: dict[str, Any], options: dict[str, Any] | None = None, **how: Any) -> Analysis:
    parsed = MergeRecipe.model_validate(recipe)
    return analyse(parsed, resolve_local(parsed), AnalysisOptions(**(options or {})), **how)


def assert_equal(got: dict[plain.Key, float], want: dict[plain.Key, float], rel: float = 1e-12) -> None:
    assert sorted(map(str, got)) == sorted(map(str, want))
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-14, nan_ok=True), key


def masks_of(base: Tensors, experts: list[Expert], metric: str, **curvature: Any) -> list[Tensors]:
    found = []
    for expert in experts:
        v = reference.curvature(expert, curvature.get("compression", "none"))
        masks = reference.masks(base, expert, v, curvature.get("scope", "global"), metric)
        assert masks is not None
        found.append(masks)
    return found


def counterpart(base: Tensors, expert: Expert, kept: Tensors, score: Tensors, scope: str) -> Tensors:
    """The same number of elements by other scores."""
    names = list(kept)
    if scope == "per_tensor":
        return {n: plain.top(score[n].ravel(), int(kept[n].sum())).reshape(score[n].shape) for n in names}
    return plain.split(plain.top(plain.flat(score, names), int(plain.flat(kept, names).sum())), kept, names)


@pytest.mark.parametrize(
    "parameters",
    [
        {"density": 0.4},
        {"density": 0.15, "compression": "rank1"},
        {"density": 0.3, "scope": "per_tensor"},
        {"precond_threshold": 1e-15},
        {"density": 0.3, "compression": "rank1", "mask_curvature": "full"},
        {"density": 0.3, "metric": "magnitude"},
        {"density": 0.001},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_are_those_of_a_plain_computation(tmp_path: Path, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    base, experts = world()
    base, experts = rounded(base, dtype), [replace(e, weights=rounded(e.weights, dtype)) for e in experts]
    recipe = ota_recipe(tmp_path, base, experts, parameters, dtype=dtype, shards=2)
    found = run(recipe, {"compressions": ()}, block_elements=37, threads=2)

    own = {key: parameters[key] for key in ("density", "precond_threshold") if key in parameters}
    masked = [replace(e, **own) for e in experts]
    scope, metric = parameters.get("scope", "global"), parameters.get("metric", "curvature")
    compression = "none" if parameters.get("mask_curvature") == "full" else parameters.get("compression", "none")
    kept = masks_of(base, masked, metric, scope=scope, compression=compression)
    other = "magnitude" if metric == "curvature" else "curvature"
    want: dict[plain.Key, float] = {}
    for name, expert, masks in zip(NAMES, masked, kept, strict=True):
        score = reference.scores(base, expert, reference.curvature(expert, compression), other)
        want |= plain.localisation(name, metric, masks)
        want |= plain.localisation(name, other, counterpart(base, expert, masks, score, scope))
    named = dict(zip(NAMES, experts, strict=True))
    want |= plain.task_vectors(base, named)
    realised = [plain.flat(masks, list(base)).mean() for masks in kept]
    density = parameters["density"] if "density" in parameters else fmean(realised)
    want |= plain.overlap({name: e.v for name, e in named.items()}, density)
    assert_equal(plain.by_key(found.rows), want)
    assert found.settings["density"] == density and found.left_out == []
    assert len(found.notes) == ("precond_threshold" in parameters)
    assert {
        r.elements for r in found.rows if (r.analysis, r.role, r.layer, r.measure) == ("localisation", "all", None, "density")
    } == {sum(math.prod(s) for s in ALL_SHAPES.values())}


def test_no_cut_into_blocks_and_no_number_of_threads_changes_a_bit(tmp_path: Path) -> None:
    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts, {"density": 0.4, "compression": "rank1"})
    found = [
        run(recipe, {"compressions": ("none", "rank1", "log8")}, block_elements=block, threads=threads)
        for block, threads in ((1, 1), (8, 3), (37, 2), (10**6, 1), (10**6, 4))
    ]
    for other in found[1:]:
        assert [repr(row) for row in other.rows] == [repr(row) for row in found[0].rows]
    sharded = ota_recipe(tmp_path / "sharded", base, experts, {"density": 0.4, "compression": "rank1"}, shards=3)
    assert [repr(r) for r in run(sharded, {"compressions": ("none", "rank1", "log8")}).rows] == [repr(r) for r in found[0].rows]


def test_a_small_budget_of_memory_changes_nothing(tmp_path: Path) -> None:
    """64 MiB hold the counts of few cells: they are worked on in groups."""
    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts, {"density": 0.4})
    few = run(recipe, {"compressions": ()}, memory=2**20)
    assert [repr(r) for r in few.rows] == [repr(r) for r in run(recipe, {"compressions": ()}).rows]


def test_spearman_of_any_v_is_that_of_exact_ranks_but_for_ties_within_a_bin(tmp_path: Path) -> None:
    base = random_base(3, {"model.layers.0.self_attn.q_proj.weight": (70, 60)})
    experts = random_experts(base, 2)
    found = plain.by_key(run(ota_recipe(tmp_path, base, experts, {"density": 0.4}), {"compressions": ()}).rows)
    exact = spearmanr(*(plain.flat(e.v, list(base)) for e in experts)).statistic
    assert found["curvature_overlap", "expert0", "expert1", None, "all", "", "spearman", None] == pytest.approx(exact, abs=1e-4)


def test_bias_correction_enters_masks_and_curvature(tmp_path: Path) -> None:
    base, experts = world(step=100, beta2=0.999)
    experts = [replace(e, step=100 * m, precond_threshold=1e-15) for m, e in enumerate(experts, 1)]
    found = run(ota_recipe(tmp_path, base, experts, {"bias_correction": True}), {"compressions": ()})
    want: dict[plain.Key, float] = {}
    corrected = [reference.curvature(e, bias_correction=True) for e in experts]
    for name, expert, v in zip(NAMES, experts, corrected, strict=True):
        masks = reference.masks(base, expert, v)
        assert masks is not None
        want |= plain.localisation(name, "curvature", masks)
        score = reference.scores(base, expert, v, "magnitude")
        want |= plain.localisation(name, "magnitude", counterpart(base, expert, masks, score, "global"))
    want |= plain.overlap(dict(zip(NAMES, corrected, strict=True)), found.settings["density"])

    def unlike_ranks(key: plain.Key) -> bool:
        return key[0] != "task_vector" and key[6] != "spearman"  # what is corrected has more bits than ranks are told apart by

    assert_equal(
        {key: value for key, value in plain.by_key(found.rows).items() if unlike_ranks(key)},
        {key: value for key, value in want.items() if unlike_ranks(key)},
    )


def test_a_tied_tensor_counts_once(tmp_path: Path) -> None:
    base, experts = world()
    twin = "lm_head.weight"

    def tied(tensors: Tensors) -> Tensors:
        return {**tensors, twin: tensors["model.embed_tokens.weight"]}

    alone = ota_recipe(tmp_path / "alone", base, experts, {"density": 0.4})
    both = ota_recipe(
        tmp_path / "both",
        tied(base),
        [replace(e, weights=tied(e.weights)) for e in experts],
        {"density": 0.4},
        config={"tie_word_embeddings": True},
    )
    assert [repr(r) for r in run(both, {"compressions": ()}).rows] == [repr(r) for r in run(alone, {"compressions": ()}).rows]


@pytest.mark.parametrize("method", ["rank1", "log8", "rank_k"])
def test_compressions_against_the_full_second_moments(tmp_path: Path, method: str) -> None:
    from ota_core.compute.stream import Stream
    from ota_core.moments import open_moments
    from ota_core.moments.compression import compress

    base, experts = world()
    recipe = ota_recipe(tmp_path, base, experts, {"density": 0.4, "compression": "rank_k", "rank": 2})
    found = plain.by_key(run(recipe, {"compressions": ("none", method)}).rows, lambda r: r.analysis == "compression")
    at = {"mask_jaccard": 0.4}
    for name, expert in zip(NAMES, experts, strict=True):
        path = tmp_path / name / "exp_avg_sq.safetensors"
        small, report = compress(open_moments(path), method=method, rank=2 if method == "rank_k" else None, stream=Stream())
        approximate = {n: small.read(n, 0, math.prod(s[:-1]) if len(s) > 1 else s[0]) for n, s in ALL_SHAPES.items()}
        v, close = plain.flat(expert.v, list(base)), plain.flat(approximate, list(base))
        delta = np.abs(plain.flat(expert.weights, list(base)) - plain.flat(base, list(base))).astype(np.float32)
        scores = [np.sqrt(x.astype(np.float32)) * delta for x in (v, close)]
        k = math.floor(0.4 * v.size + 0.5)
        masks = [plain.top(x, k) for x in scores]
        # Ranks of agreements are by the upper 16 bits.
        ranked = [x.view(np.uint32) >> 16 for x in scores]
        want = {
            "sqrt_error": np.linalg.norm(np.sqrt(v) - np.sqrt(close)) / np.linalg.norm(np.sqrt(v)),
            "bytes_per_param": report.bytes_per_param,
            "mask_jaccard": (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum(),
            "saliency_spearman": spearmanr(*ranked).statistic,
        }
        for measure, value in want.items():
            got = found["compression", name, None, None, "all", method, measure, at.get(measure)]
            assert got == pytest.approx(value, rel=1e-5 if measure == "sqrt_error" else 1e-12, abs=1e-12), (name, measure)
        for measure, value in {"sqrt_error": 0, "bytes_per_param": 4, "mask_jaccard": 1, "saliency_spearman": 1}.items():
            assert found["compression", name, None, None, "all", "none", measure, at.get(measure)] == value


def test_densities_of_their_own_decide_what_is_compared(tmp_path: Path) -> None:
    """A compression is judged at its expert's density, pairs at the mean of all: masks of one size, or the overlap would tell sizes."""
    base, experts = world()
    own: list[dict[str, Any]] = [{"density": 0.1}, {"density": 0.3}, {"precond_threshold": 1e-15}]
    experts = [replace(e, **one) for e, one in zip(experts, own, strict=True)]
    recipe = ota_recipe(tmp_path, base, experts)
    found = run(recipe, {"compressions": ("none", "rank1")})
    (realised,) = (
        r.value
        for r in found.rows
        if (r.analysis, r.expert, r.layer, r.role, r.variant, r.measure)
        == ("localisation", "expert2", None, "all", "curvature", "density")
    )
    assert 0 < realised < 1 and realised not in {0.1, 0.3, 0.4}
    densities = {"expert0": 0.1, "expert1": 0.3, "expert2": realised}
    assert {(r.expert, r.at) for r in found.rows if r.measure == "mask_jaccard"} == set(densities.items())
    mean = fmean(densities.values())
    overlap = plain.by_key(found.rows, lambda r: r.analysis == "curvature_overlap")
    assert_equal(overlap, plain.overlap({name: e.v for name, e in zip(NAMES, experts, strict=True)}, mean))
    assert found.settings["density"] == mean
    (note,) = found.notes
    assert f"at density {mean:.4g}, the mean of the experts' (expert0 0.1, expert1 0.3, expert2 {realised:.4g})" in note

    # Each as it would be in a recipe of one density, and all at a density that is asked for.
    for name, density in (("expert0", 0.1), ("expert1", 0.3)):
        alike = run(recipe_at(recipe, density), {"compressions": ("rank1",)})
        assert lost(found, name) == lost(alike, name)
    asked = run(recipe, {"compressions": ("rank1",), "density": 0.2})
    assert {r.at for r in asked.rows if r.measure in {"mask_jaccard", "jaccard"}} == {0.2} and asked.notes == []

    # Masks by magnitude alone, too; what a threshold on the curvature would keep nobody knows then.
    off = run(recipe, {"curvature": "off"})
    kept = {
        r.expert: r.value
        for r in off.rows
        if (r.analysis, r.layer, r.role, r.measure) == ("localisation", None, "all", "density")
    }
    assert kept == pytest.approx({"expert0": 0.1, "expert1": 0.3, "expert2": 0.4}, abs=2e-3)


def recipe_at(recipe: dict[str, Any], density: float) -> dict[str, Any]:
    models = [{"model": entry["model"], "name": entry.get("name")} for entry in recipe["models"]]
    return recipe | {"models": models, "parameters": {"density": density}}


def lost(found: Analysis, expert: str) -> list[str]:
    return [repr(r) for r in found.rows if r.analysis == "compression" and r.expert == expert and r.variant == "rank1"]
