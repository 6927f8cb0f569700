"""What must hold of the methods that came from mergekit whatever the numbers: no cut into blocks and no way of computing changes a bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ota_core.errors import RecipeError
from ota_core.files.safetensors_io import FORMAT_KEY
from ota_core.plan.expert_scales import FORMAT
from ota_core.recipe.recipe import parse_recipe
from tests.checkpoints import SHAPES, assert_merged, ota_recipe, random_base, random_experts, run_merge
from tests.ota_core.methods.test_limits import same_bits
from tests.reference import Expert

BASE = random_base(21)
EXPERTS = random_experts(BASE, 4)
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "passthrough": ("passthrough", 1, {}),
    "passthrough scaled": ("passthrough", 1, {"scale": 0.7}),
    "nearswap": ("nearswap", 1, {"t": 0.01}),
    "arcee_fusion": ("arcee_fusion", 1, {"lambda": 0.9}),
    "ram": ("ram", 3, {"epsilon": 0.01}),
    "ramplus_tl": ("ramplus_tl", 3, {"epsilon": 0.01, "r": 0.5, "alpha": 2.0}),
    "sce": ("sce", 3, {"density": 0.3}),
    "sce whole": ("sce", 3, {"lambda": 1.3}),
    "della": ("della", 3, {"density": 0.5, "epsilon": 0.2, "seed": 4}),
    "della whole": ("della", 2, {}),
    "della_linear": ("della_linear", 3, {"density": 0.6, "epsilon": 0.3, "rescale": False, "weight": 0.5}),
    "multislerp": ("multislerp", 3, {}),
    "nuslerp": ("nuslerp", 2, {"lambda": 1.2}),
    "nuslerp rows": ("nuslerp", 2, {"nuslerp_flatten": False}),
    "nuslerp columns": ("nuslerp", 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "karcher": ("karcher", 3, {}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock rows": ("model_stock", 3, {"filter_wise": True}),
}


def recipe_of(root: Path, case: str, more: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    method, count, parameters = METHODS[case]
    return ota_recipe(root, BASE, EXPERTS[:count], parameters | (more or {}), method=method, **options)


@pytest.mark.parametrize("case", METHODS)
def test_no_cut_and_no_way_of_computing_changes_a_bit(tmp_path: Path, case: str) -> None:
    """Weights that are stored as float64 go through tensors; here they hold float32 values, so that both ways see the same numbers."""
    recipe = recipe_of(tmp_path / "narrow", case, top={"dtype": "float32"})
    whole, _ = run_merge(recipe, tmp_path / "whole")
    for block in (1, 17, 64):
        same_bits(run_merge(recipe, tmp_path / f"b{block}", block_elements=block)[0], whole)
    wide = recipe_of(tmp_path / "wide", case, top={"dtype": "float32"}, dtype=torch.float64)
    same_bits(run_merge(wide, tmp_path / "tensors")[0], whole)
    same_bits(run_merge(wide, tmp_path / "cut", block_elements=17)[0], whole)
    assert case == "passthrough" or any((whole[name] != EXPERTS[0].weights[name]).any() for name in BASE)


@pytest.mark.parametrize("case", [case for case in METHODS if not case.startswith(("passthrough", "karcher"))])
def test_lambda_and_refine_act_on_the_merged_edit(tmp_path: Path, case: str) -> None:
    """λ = 0 gives the base, auto is a number that gives the same bytes, and a row-space regression follows on any of them."""
    parameters = METHODS[case][2]
    recipe = recipe_of(tmp_path / "plain", case)
    nothing, _ = run_merge({**recipe, "parameters": parameters | {"lambda": 0.0}}, tmp_path / "nothing")
    assert all((nothing[name] == BASE[name]).all() for name in BASE)
    auto, report = run_merge({**recipe, "parameters": parameters | {"lambda": "auto"}}, tmp_path / "auto")
    found = report.results["lambda"]["value"]
    same_bits(run_merge({**recipe, "parameters": parameters | {"lambda": found}}, tmp_path / "found")[0], auto)
    refined, _ = run_merge({**recipe, "parameters": parameters | {"refine": "rowspace"}}, tmp_path / "refined")
    assert any((refined[name] != auto[name]).any() for name in BASE)


@pytest.mark.parametrize("case", [case for case in METHODS if not case.startswith(("passthrough", "karcher"))])
def test_learned_scales_act_on_each_experts_part(tmp_path: Path, case: str) -> None:
    """Scales of 0 give the base, those of 1 the plain merge; the parts of single experts add up to its edit, also where a λ scales them."""
    count = METHODS[case][1]
    names = [f"expert{m}" for m in range(count)]

    def merged(what: str, scales: list[float] | None) -> dict[str, Any]:
        top: dict[str, Any] = {"dtype": "float32"}
        if scales is not None:
            file = tmp_path / f"{what}.safetensors"
            values = {name: np.array(scales) for name in SHAPES}
            save_file(values, file, metadata={FORMAT_KEY: FORMAT, "experts": json.dumps(names), "settings": "{}"})
            top["scales"] = str(file)
        return run_merge(recipe_of(tmp_path / what, case, top=top), tmp_path / f"{what}-out")[0]

    plain = merged("plain", None)
    assert_merged(merged("ones", [1.0] * count), plain, BASE)
    nothing = merged("zeros", [0.0] * count)
    assert all((nothing[name] == BASE[name]).all() for name in BASE)
    parts = [merged(f"only{m}", [float(i == m) for i in range(count)]) for m in range(count)]
    summed = {name: BASE[name] + sum(part[name].astype(np.float64) - BASE[name] for part in parts) for name in BASE}
    for name, one in summed.items():  # each part is rounded to float32 once
        assert np.abs(one - plain[name]).max() <= 6.1e-8 * (count + 1) * max(1.0, float(np.abs(plain[name]).max())), name
    halved = merged("half", [0.5] * count)
    assert_merged(halved, {name: BASE[name] + (plain[name].astype(np.float64) - BASE[name]) / 2 for name in BASE}, BASE)


SYMMETRIC = ["ram", "ramplus_tl", "sce", "multislerp", "nuslerp", "karcher", "model_stock", "della whole"]


@pytest.mark.parametrize("case", SYMMETRIC)
def test_the_order_of_the_experts_does_not_matter(tmp_path: Path, case: str) -> None:
    method, count, parameters = METHODS[case]
    parameters = parameters | ({"max_iter": 50, "tol": 1e-12} if case == "karcher" else {})  # its steps begin at the first
    found = []
    for i, order in enumerate((EXPERTS[:count], EXPERTS[:count][::-1])):
        recipe = ota_recipe(tmp_path / str(i), BASE, order, parameters, method=method, top={"dtype": "float32"})
        found.append(run_merge(recipe, tmp_path / f"{i}-out")[0])
    for name, one in found[0].items():
        assert np.abs(one - found[1][name]).max() <= 1e-6 * max(1.0, float(np.abs(one).max())), name


def test_random_masks_of_della_go_by_seed_and_tensor(tmp_path: Path) -> None:
    found = [
        run_merge(recipe_of(tmp_path / str(i), "della", {"seed": seed}), tmp_path / f"{i}-out")[0]
        for i, seed in enumerate((4, 4, 5))
    ]
    same_bits(found[0], found[1])
    assert all((found[0][name] != found[2][name]).any() for name in found[0] if found[0][name].size > 8)


@pytest.mark.parametrize("method", ["passthrough", "karcher"])
def test_methods_without_an_edit_refuse_learned_scales(method: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"scales: {method} has no merged edit of the base .* arcee_fusion, .* model_stock, .* sce"
    ):
        parse_recipe(raw(method, 1, {}, scales="s.safetensors"))


def test_della_keeps_larger_edits_more_often_and_each_edit_on_average(tmp_path: Path) -> None:
    """The chance of the i-th of n edits of a row is density − ε + 2ε·i/(n − 1); what is kept is divided by it. A vector is one row."""
    rows, row = 4000, np.array([0.5, -1.0, 2.0, -4.0, 8.0], np.float32)
    names = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    edits = {names[0]: np.tile(row, (rows, 1)), names[1]: np.linspace(8, 0.001, rows, dtype=np.float32)}
    base = {name: np.zeros_like(edit) for name, edit in edits.items()}
    recipe = ota_recipe(
        tmp_path, base, [Expert(weights=edits)], {"density": 0.5, "epsilon": 0.3, "seed": 1}, method="della_linear"
    )
    merged, _ = run_merge(recipe, tmp_path / "out")
    chances = {names[0]: np.array([0.2, 0.35, 0.5, 0.65, 0.8]), names[1]: np.linspace(0.8, 0.2, rows)}
    for name, edit in edits.items():
        kept, chance = merged[name] != 0, np.broadcast_to(chances[name], edit.shape)
        np.testing.assert_allclose(merged[name][kept], (edit / chance)[kept], rtol=1e-6)
        shares = kept.mean(0) if edit.ndim == 2 else kept.reshape(5, -1).mean(1)
        wanted = chances[name] if edit.ndim == 2 else chance.reshape(5, -1).mean(1)
        assert np.abs(shares - wanted).max() < (0.04 if edit.ndim == 2 else 0.08)  # five standard errors


def test_della_at_density_one_is_mergekits(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from tests.ota_core.methods.test_mergekit_methods import compare, models_of

    base, experts = models_of(10, 3, torch.float32)
    for method in ("della", "della_linear"):
        for parameters in ({}, {"normalize": method != "della", "lambda": 0.7}):
            folder = tmp_path / method / str(len(parameters))
            compare(folder, method, base, experts, {"weight": [1.0, 0.5, 1.7], "density": [1.0] * 3}, parameters)


def raw(method: str, models: int, parameters: dict[str, Any], own: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    entries = [{"model": f"m{i}", "parameters": own or {}} for i in range(models)]
    return {"merge_method": method, "base_model": "b", "models": entries, "parameters": parameters, **top}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (raw("nuslerp", 3, {}), "nuslerp takes 2, the recipe names 3"),
        (raw("model_stock", 1, {}), "model_stock takes at least 2, the recipe names 1"),
        (raw("passthrough", 2, {}), "passthrough takes 1, the recipe names 2"),
        (raw("nearswap", 1, {}), "nearswap needs 't'"),
        (raw("slerp", 1, {"t": 1.5}), r"slerp needs 't', .* got 1.5"),
        (raw("della", 2, {"density": 0.9, "epsilon": 0.2}), "must lie between 0 and 1; got density 0.9 and epsilon 0.2"),
        (raw("ota", 2, {}, {"epsilon": 0.5}), "'epsilon' holds for the whole merge with merge_method ota"),
        (raw("karcher", 2, {"power": 0.5}), "'power' has no effect with merge_method karcher"),
        (raw("multislerp", 2, {"lambda": 0.5}, base_model=None), "base_model is missing: parameters.lambda"),
        (raw("multislerp", 2, {}, base_model=None, scales="s.safetensors"), "base_model is missing: scales"),
        (raw("ram", 2, {}, base_model=None), "base_model is missing: ram works on task vectors"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_what_a_method_cannot_do_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe)


def test_mergekits_spellings_and_defaults() -> None:
    assert parse_recipe(raw("sce", 2, {"select_topk": 0.3, "int8_mask": True})).setting("density") == 0.3
    assert parse_recipe(raw("sce", 2, {})).setting("density") == 1.0
    della = parse_recipe(raw("della", 2, {"density": 0.5}, {"epsilon": 0.1}))
    assert della.setting("epsilon", 1) == 0.1 and della.setting("rescale") and della.setting("normalize")
    assert della.effective()["experts"][0] == {"density": 0.5, "epsilon": 0.1, "weight": 1.0}
    # Where epsilon is of the whole merge it stands where it stood before: a fingerprint hangs on it.
    ota = parse_recipe(raw("ota", 2, {"epsilon": 1e-12})).effective()
    assert ota["parameters"]["epsilon"] == 1e-12 and "epsilon" not in ota["experts"][0]
    assert parse_recipe(raw("ram", 2, {})).setting("epsilon") == 1e-5


def test_two_models_are_the_base_and_one_other(tmp_path: Path) -> None:
    """mergekit's recipes name the base among the models, or leave it out; two others are one too many."""
    recipe = ota_recipe(tmp_path, BASE, EXPERTS[:1], {"t": 0.01}, method="nearswap")
    alone, _ = run_merge(recipe, tmp_path / "alone")
    both = {**recipe, "models": [{"model": recipe["base_model"], "name": "start"}, *recipe["models"]]}
    same_bits(run_merge(both, tmp_path / "both")[0], alone)
    two = ota_recipe(tmp_path / "two", BASE, EXPERTS[:2], {"t": 0.01}, method="nearswap")
    with pytest.raises(RecipeError, match="nearswap: base_model and 2 other models are named"):
        run_merge(two, tmp_path / "out")
