"""A preflight's numbers against plain float64 computation on whole matrices, its limits, and λ as the merge finds it."""

from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ota_core.analysis.preflight import preflight, prior_of
from ota_core.compute.blocks import matrix_shape
from ota_core.engine import engine
from ota_core.errors import RecipeError
from ota_core.plan.inputs import resolve_local
from ota_core.plan.masks import MaskFile
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tests.ota_core.engine.test_output import llama_experts

AUTO = {"density": 0.4, "lambda": "auto"}
Weights = dict[str, np.ndarray]


def rows_of(recipe: dict[str, Any], **limits: Any) -> dict[tuple[str, str | None, str, str], float]:
    parsed = parse_recipe(recipe)
    return {(r.expert, r.other, r.measure, r.variant): r.value for r in preflight(parsed, resolve_local(parsed), **limits).rows}


def weights(folder: str | Path) -> Weights:
    return {name: x.double().numpy() for name, x in load_file(Path(folder) / "model.safetensors").items()}


def matrices(names: Weights) -> list[str]:
    return [name for name in names if "proj" in name or name == "lm_head.weight"]


def edits(recipe: dict[str, Any]) -> tuple[list[str], dict[str, Weights]]:
    """(matrices, expert → its edit of every tensor)."""
    base = weights(recipe["base_model"])
    found = {}
    for entry in recipe["models"]:
        expert = weights(entry["model"])
        found[Path(entry["model"]).name] = {name: expert[name] - base[name] for name in base}
    return matrices(base), found


def merged(recipe: dict[str, Any], out: Path) -> Weights:
    """What a merge adds to the base."""
    engine.merge(MergeRecipe.model_validate(recipe | {"dtype": "float32"}), out)
    base, made = weights(recipe["base_model"]), weights(out)
    return {name: made[name] - base[name] for name in base}


def fit(x: np.ndarray, own: np.ndarray) -> float:
    return max(-1.0, 1 - float(np.linalg.norm((x - own) @ own.T) ** 2 / np.linalg.norm(own @ own.T) ** 2))


def parts(x: np.ndarray, own: np.ndarray) -> tuple[float, float]:
    """(reach, disturbance)."""
    strength = float(np.linalg.norm(own @ own.T))
    reach = float(((x @ own.T) * (own @ own.T)).sum()) / strength**2
    return reach, float(np.linalg.norm((x - reach * own) @ own.T)) / strength


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Any]:
    return llama_experts(tmp_path, count=3) | {"parameters": AUTO}


def test_pairs_equal_plain_computation(three: dict[str, Any]) -> None:
    rows, (names, own) = rows_of(three), edits(three)
    flat = {name: np.concatenate([x.ravel() for x in found.values()]) for name, found in own.items()}
    v = {
        name: np.concatenate([np.sqrt(x.double().numpy()).ravel() for _, x in sorted(load_file(Path(three["base_model"]).with_name(name) / "exp_avg_sq.safetensors").items())])
        for name in own
    }  # fmt: skip
    for a, b in permutations(own, 2):
        strengths = [np.linalg.norm(own[b][n] @ own[a][n].T) / np.linalg.norm(own[a][n] @ own[a][n].T) for n in names]
        assert rows[a, b, "interference", ""] == pytest.approx(fmean(strengths), rel=1e-9)
        if (a, b, "row_space", "") not in rows:
            continue
        grams = {who: [own[who][n].T @ own[who][n] for n in names] for who in (a, b)}
        cosines = [float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in zip(grams[a], grams[b], strict=True)]
        assert rows[a, b, "row_space", ""] == pytest.approx(fmean(cosines), rel=1e-9)
        x, y = flat[a], flat[b]
        assert rows[a, b, "cosine", ""] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
        assert rows[a, b, "sign_conflict", ""] == pytest.approx(np.mean((x * y < 0)[(x != 0) & (y != 0)]), rel=1e-12)
        x, y = v[a], v[b]
        assert rows[a, b, "cosine_sqrt_v", ""] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
    assert rows["expert0", None, "norm", ""] == pytest.approx(np.linalg.norm(flat["expert0"]), rel=1e-9)


def test_mask_overlap_is_that_of_the_merge(three: dict[str, Any], tmp_path: Path) -> None:
    rows, parsed = rows_of(three), parse_recipe(three)
    (tmp_path / "masks").mkdir()
    engine.mask(parsed, tmp_path / "masks", inputs=resolve_local(parsed))
    kept = {}
    for path in sorted((tmp_path / "masks").glob("*.safetensors")):
        file = MaskFile(path)
        shapes = {name: matrix_shape(shape)[0] for name, shape in sorted(file.shapes.items())}
        kept[path.stem] = np.concatenate([np.asarray(file.read(name, 0, count)).ravel() for name, count in shapes.items()])
    both, either = (kept["expert0"] & kept["expert1"]).sum(), (kept["expert0"] | kept["expert1"]).sum()
    assert rows["expert0", "expert1", "mask_jaccard", ""] == pytest.approx(both / either, rel=1e-12)


def test_fit_is_what_the_merge_does_to_each_experts_inputs(three: dict[str, Any], tmp_path: Path) -> None:
    rows, (names, own), made = rows_of(three), edits(three), merged(three, tmp_path / "merged")
    for name, found in own.items():
        assert rows[name, None, "fit", ""] == pytest.approx(fmean(fit(made[n], found[n]) for n in names), abs=1e-5)
        reach, disturbance = zip(*(parts(made[n], found[n]) for n in names), strict=True)
        assert rows[name, None, "reach", ""] == pytest.approx(fmean(reach), abs=1e-5)
        assert rows[name, None, "disturbance", ""] == pytest.approx(fmean(disturbance), abs=1e-5)
    alone = merged(three | {"models": three["models"][1:]}, tmp_path / "without")
    for name, found in own.items():
        expected = fmean(fit(alone[n], found[n]) for n in names)
        assert rows[name, None, "fit", "without expert0"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("task_arithmetic", {"lambda": 0.7}), ("ties", {"density": 0.5, "lambda": "auto"}), ("fisher", {}),
     ("dare_ties", {"density": 0.5, "lambda": "auto_per_tensor", "normalize": True})],
)  # fmt: skip
def test_every_method_and_what_leaving_one_out_changes(
    method: str, parameters: dict[str, Any], three: dict[str, Any], tmp_path: Path
) -> None:
    recipe = three | {"merge_method": method, "parameters": parameters}
    rows, (names, own), made = rows_of(recipe), edits(recipe), merged(recipe, tmp_path / "merged")
    for name, found in own.items():
        assert rows[name, None, "fit", ""] == pytest.approx(fmean(fit(made[n], found[n]) for n in names), abs=1e-5)
    alone = merged(recipe | {"models": recipe["models"][:2]}, tmp_path / "without")
    assert rows["expert0", None, "fit", "without expert2"] == pytest.approx(
        fmean(fit(alone[n], own["expert0"][n]) for n in names), abs=1e-5
    )


def test_lambda_is_the_merges(three: dict[str, Any], tmp_path: Path) -> None:
    report = engine.merge(MergeRecipe.model_validate(three), tmp_path / "merged")
    rows = rows_of(three)
    assert rows["", None, "lambda", "auto"] == pytest.approx(report.results["lambda"]["value"], rel=1e-5)
    assert rows["", None, "lambda", "recipe"] == rows["", None, "lambda", "auto"]
    fixed = rows_of(three | {"parameters": AUTO | {"lambda": 1.25}})
    assert fixed["", None, "lambda", "recipe"] == 1.25 and fixed["", None, "lambda", "auto"] == rows["", None, "lambda", "auto"]


def test_probes_of_wide_matrices_come_close_to_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llama_experts(tmp_path, count=2, hidden=96, layers=1) | {"parameters": AUTO}
    exact = rows_of(recipe)
    monkeypatch.setattr("ota_core.analysis.preflight.EXACT", 8)
    monkeypatch.setattr("ota_core.rules.lambdas.EXACT", 8)
    probed = rows_of(recipe)
    assert probed["", None, "lambda", "auto"] == pytest.approx(exact["", None, "lambda", "auto"], rel=0.05)
    for key in (
        ("expert0", None, "fit", ""),
        ("expert0", "expert1", "row_space", ""),
        ("expert0", "expert1", "interference", ""),
    ):
        assert probed[key] == pytest.approx(exact[key], rel=0.1) and probed[key] != exact[key]


def test_limits(tmp_path: Path) -> None:
    recipe = llama_experts(tmp_path, count=3)
    twins = recipe | {"merge_method": "linear", "models": [recipe["models"][0], {"model": recipe["models"][0]["model"], "name": "twin"}], "parameters": {}}  # fmt: skip
    same = rows_of(twins)
    for measure, value in (("row_space", 1), ("cosine", 1), ("sign_conflict", 0), ("interference", 1)):
        assert same["expert0", "twin", measure, ""] == pytest.approx(value, abs=1e-12), measure
    assert same["expert0", None, "fit", ""] == pytest.approx(1, abs=1e-6) and same["", None, "lambda", "auto"] == pytest.approx(
        1, abs=1e-6
    )
    one = rows_of(twins | {"models": twins["models"][:1]})
    assert one["expert0", None, "fit", ""] == pytest.approx(1, abs=1e-6) and not any(other for _, other, *_ in one)


def test_bits_do_not_depend_on_threads_and_blocks(three: dict[str, Any]) -> None:
    whole = rows_of(three, threads=1)
    cut = rows_of(three, threads=2, block_elements=64)
    assert cut.keys() == whole.keys()
    for key, value in whole.items():
        assert cut[key] == pytest.approx(value, rel=1e-12), key


def test_a_recipe_without_a_base_is_refused(three: dict[str, Any]) -> None:
    recipe = parse_recipe({"merge_method": "linear", "models": three["models"]})
    with pytest.raises(RecipeError, match="base_model is missing"):
        preflight(recipe, resolve_local(recipe))


def test_the_prior_of_a_regression_is_the_plain_mean() -> None:
    recipe = parse_recipe(
        {"merge_method": "rowspace", "base_model": "b", "models": [{"model": "a"}], "parameters": {"ridge": 1.0}}
    )
    prior = prior_of(recipe)
    assert prior.merge_method == "task_arithmetic" and prior.setting("normalize") is True and not prior.refined
    assert prior.setting("lambda") == 1.0
