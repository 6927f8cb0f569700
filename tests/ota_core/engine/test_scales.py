"""Merges with a file of scales: the engine against plain float64 numpy for every method, the limits, and files that do not fit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ota_core.artifact import read_record
from ota_core.engine.engine import merge, merge_into
from ota_core.engine.shards import MergeInParts, Survey, merge_shard, opened_bins, shard_files, survey, whole_facts
from ota_core.errors import OtaError
from ota_core.files.safetensors_io import FORMAT_KEY
from ota_core.plan.expert_scales import FORMAT, ExpertScales
from ota_core.plan.inputs import MergeInputs, resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests import reference, reference_baselines
from tests.checkpoints import SHAPES, assert_merged, ota_recipe, random_base, random_experts, read_tensors
from tests.ota_core.methods.test_methods_baselines import uniform
from tests.reference import Tensors

BASE = random_base(31)
EXPERTS = random_experts(BASE, 3)
NAMES = [f"expert{m}" for m in range(3)]
RNG = np.random.default_rng(4)
FACTORS: Tensors = {name: RNG.normal(1, 0.7, 3) for name in SHAPES}
"""Some are negative, as learned ones may be."""


def write_scales(path: Path, values: Mapping[str, Any] = FACTORS, **metadata: str) -> str:
    known = {FORMAT_KEY: FORMAT, "experts": json.dumps(NAMES), "settings": "{}"}
    save_file({name: np.asarray(row) for name, row in values.items()}, path, metadata=known | metadata)
    return str(path)


def scaled(tmp: Path, parameters: dict[str, Any], scales: Tensors, method: str = "ota") -> Tensors:
    recipe = ota_recipe(
        tmp, BASE, EXPERTS, parameters, method=method, top={"scales": write_scales(tmp / "s.safetensors", scales)}
    )
    merge(MergeRecipe.model_validate(recipe), tmp / "out", memory="64MiB", block_elements=16)
    return read_tensors(tmp / "out")


OTA: list[dict[str, Any]] = [
    {},
    {"density": 0.3, "lambda": 1.7},
    {"density": 0.3, "compression": "rank1", "denominator": "all"},
    {"density": 0.3, "scope": "per_tensor", "fallback": "mean", "lambda": 0.6},
    {"density": 0.3, "masked_merge": "ties", "rescale": True},
    {"density": 0.3, "masked_merge": "linear", "metric": "magnitude"},
    {"power": 1.0, "epsilon": 1e-9, "normalise": "global"},
]


@pytest.mark.parametrize("parameters", OTA, ids=str)
def test_ota(tmp_path: Path, parameters: dict[str, Any]) -> None:
    density = {"density": parameters["density"]} if "density" in parameters else {}
    experts = [reference.Expert(**{**vars(one), **density}) for one in EXPERTS]
    options = {{"lambda": "lambda_"}.get(key, key): value for key, value in parameters.items() if key != "density"}
    assert_merged(scaled(tmp_path, parameters, FACTORS), reference.ota(BASE, experts, scales=FACTORS, **options), BASE)


def _dare(m: int, name: str, task: Any) -> Any:
    return reference_baselines.dare(task, uniform(7, m, name, task.size).reshape(task.shape) < 0.5, 0.5)


Left = Callable[[int, str, Any], Any]
TASK_VECTORS: dict[str, tuple[dict[str, Any], Left]] = {
    "task_arithmetic": ({"lambda": 0.4}, lambda m, name, x: x),
    "ties": ({"density": 0.35, "lambda": 1.2}, lambda m, name, x: reference_baselines.trim(x, 0.35)),
    "dare_linear": ({"density": 0.5, "seed": 7}, _dare),
    "dare_ties": ({"density": 0.5, "seed": 7, "normalize": True}, _dare),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1}, lambda m, name, x: reference_baselines.breadcrumb(x, 0.6, 0.1)),
    "breadcrumbs_ties": ({"density": 0.6, "gamma": 0.1}, lambda m, name, x: reference_baselines.breadcrumb(x, 0.6, 0.1)),
}


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_task_vectors(tmp_path: Path, method: str) -> None:
    parameters, left = TASK_VECTORS[method]
    options = {"elect": method.endswith("ties"), "normalize": parameters.get("normalize", method == "ties")}
    models = [one.weights for one in EXPERTS]
    want = reference_baselines.add_up(
        BASE, models, [1.0] * 3, left, lambda_=parameters.get("lambda", 1.0), scales=FACTORS, **options
    )
    assert_merged(scaled(tmp_path, parameters, FACTORS, method), want, BASE)


@pytest.mark.parametrize("method", ["ota", *TASK_VECTORS])
def test_scales_of_one_change_nothing_and_scales_of_zero_give_the_base(tmp_path: Path, method: str) -> None:
    parameters = TASK_VECTORS[method][0] if method in TASK_VECTORS else {"density": 0.3, "lambda": 1.5}
    plain = ota_recipe(tmp_path / "plain", BASE, EXPERTS, parameters, method=method)
    merge(MergeRecipe.model_validate(plain), tmp_path / "plain" / "out")
    ones, zeros = ({name: np.full(3, value) for name in SHAPES} for value in (1.0, 0.0))
    for folder in ("ones", "zeros"):
        (tmp_path / folder).mkdir()
    assert_merged(scaled(tmp_path / "ones", parameters, ones, method), read_tensors(tmp_path / "plain" / "out"), BASE)
    nothing = scaled(tmp_path / "zeros", parameters, zeros, method)
    assert all((nothing[name] == BASE[name]).all() for name in BASE)


@pytest.mark.parametrize("parameters", [{"density": 0.5}, {"density": 0.5, "ridge": 0.1, "input_curvature": 0.3}], ids=str)
def test_row_space_regression_is_cut_into_parts_that_add_up(tmp_path: Path, parameters: dict[str, Any]) -> None:
    """Linear in the experts' task vectors and priors: the parts of (δ_k C_k + r X₀_k)(Σ C + r I)⁻¹, in plain float64."""
    raw = parameters | {"refine": "rowspace", "lambda": 1.4}
    got = scaled(tmp_path, raw, FACTORS)
    density, ridge = raw["density"], raw.get("ridge", 0.3)
    experts = [reference.Expert(**{**vars(one), "density": density}) for one in EXPERTS]
    alone = []
    for m in range(3):
        only = {name: np.eye(3)[m] for name in BASE}
        prior = reference.ota(BASE, experts, lambda_=1.4, scales=only)
        alone.append({name: prior[name] - BASE[name] for name in BASE})
    for name in BASE:
        shape = BASE[name].shape
        if name.endswith("embed_tokens.weight") or len(shape) == 1:
            want = BASE[name] + sum(FACTORS[name][m] * alone[m][name] for m in range(3))
        else:
            want = BASE[name].astype(np.float64)
            for index in np.ndindex(shape[:-2]):
                turn = name.endswith("down_proj")  # stored (in, out)
                deltas = [one.weights[name][index].astype(np.float64) - BASE[name][index] for one in EXPERTS]
                deltas = [delta.T if turn else delta for delta in deltas]
                grams: list[Any] = []
                for one, delta in zip(EXPERTS, deltas, strict=True):
                    v = one.v[name][index].astype(np.float64)
                    v = v.T if turn else v
                    column = raw.get("input_curvature", 0.0) * v.sum(0) / v.sum()
                    grams.append(delta.T @ delta / np.sum(delta**2) + np.diag(column))
                shrink = ridge * np.mean(np.diag(sum(grams)))
                inverse = np.linalg.inv(sum(grams) + shrink * np.eye(len(grams[0])))
                for m in range(3):
                    prior = alone[m][name][index]
                    part = (deltas[m] @ grams[m] + shrink * (prior.T if turn else prior)) @ inverse
                    want[index] += FACTORS[name][m] * (part.T if turn else part)
        change = np.abs(want - BASE[name]).max()
        assert np.abs(got[name] - want).max() < 1e-5 * change + 1e-7, name


@pytest.mark.parametrize("method", ["ota", "ties", "rowspace"])
def test_scales_of_one_leave_a_refined_merge_with_lambda_auto_as_it_is(tmp_path: Path, method: str) -> None:
    parameters: dict[str, Any] = {"lambda": "auto", "refine": "rowspace"} | ({"density": 0.5} if method != "rowspace" else {})
    if method == "rowspace":
        parameters.pop("refine")
    merge(MergeRecipe.model_validate(ota_recipe(tmp_path, BASE, EXPERTS, parameters, method=method)), tmp_path / "plain")
    (tmp_path / "ones").mkdir()
    ones = scaled(tmp_path / "ones", parameters, {name: np.ones(3) for name in SHAPES}, method)
    for name, want in read_tensors(tmp_path / "plain").items():
        assert np.abs(ones[name] - want).max() <= 2e-6 * np.abs(want).max(), name


def test_a_lone_expert_scaled_to_half_lies_halfway(tmp_path: Path) -> None:
    halves = write_scales(tmp_path / "s.safetensors", {name: np.full(1, 0.5) for name in SHAPES}, experts='["expert0"]')
    recipe = ota_recipe(tmp_path, BASE, EXPERTS[:1], top={"scales": halves}, method="task_arithmetic")
    merge(MergeRecipe.model_validate(recipe), tmp_path / "out")
    want = {name: (BASE[name].astype(np.float64) + EXPERTS[0].weights[name]) / 2 for name in BASE}
    assert_merged(read_tensors(tmp_path / "out"), want, BASE)


def test_coefficients_go_by_the_experts_names(tmp_path: Path) -> None:
    first = scaled(tmp_path, {"density": 0.3}, FACTORS)
    turned = {name: row[[2, 0, 1]] for name, row in FACTORS.items()}
    raw = ota_recipe(tmp_path, BASE, EXPERTS, {"density": 0.3})
    names = json.dumps([NAMES[i] for i in (2, 0, 1)])
    raw["scales"] = write_scales(tmp_path / "turned.safetensors", turned, experts=names)
    merge(MergeRecipe.model_validate(raw), tmp_path / "other")
    assert_merged(read_tensors(tmp_path / "other"), {name: x.astype(np.float64) for name, x in first.items()}, BASE)


def test_the_file_decides_the_fingerprint_and_recipes_without_keep_theirs(tmp_path: Path) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, {"density": 0.3})
    plain = merge(MergeRecipe.model_validate(raw), tmp_path / "plain").fingerprint
    found = []
    for i, rows in enumerate((FACTORS, {name: row + 1 for name, row in FACTORS.items()})):
        raw["scales"] = write_scales(tmp_path / f"{i}.safetensors", rows)
        found.append(merge(MergeRecipe.model_validate(raw), tmp_path / str(i)).fingerprint)
    raw["scales"] = str((tmp_path / "0.safetensors").rename(tmp_path / "elsewhere.safetensors"))
    again = merge(MergeRecipe.model_validate(raw), tmp_path / "again").fingerprint
    assert len({plain, *found}) == 3 and again == found[0]
    assert read_record(tmp_path / "again").inputs.keys() >= {"scales"} and "scales" not in read_record(tmp_path / "plain").inputs


def test_the_file_that_is_written_is_read_again_and_is_the_same_bytes(tmp_path: Path) -> None:
    settings = {"merge_method": "ota", "parameters": {"lambda": 1.5}}
    one = ExpertScales(experts=tuple(NAMES), values=FACTORS, settings=settings)
    one.save(tmp_path / "one.safetensors")
    read = ExpertScales.read(tmp_path / "one.safetensors")
    assert read.experts == one.experts and read.settings == settings
    assert all((read.values[name] == row).all() for name, row in FACTORS.items()) and read.values.keys() == FACTORS.keys()
    read.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_other_settings_are_said_in_the_notes(tmp_path: Path) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, {"lambda": 1.5})
    settings = json.dumps(MergeRecipe.model_validate(raw | {"parameters": {"lambda": 1.0}}).effective())
    raw["scales"] = write_scales(tmp_path / "s.safetensors", FACTORS, settings=settings)
    (note,) = merge(MergeRecipe.model_validate(raw), tmp_path / "out").notes
    assert "s.safetensors were learned for other settings: lambda" in note


WRONG: list[tuple[str, dict[str, Any], dict[str, str], str]] = [
    ("a shape", {**FACTORS, "model.norm.weight": np.ones(2)}, {}, r"'model.norm.weight' \[2\] float64; expected .*\[3\]"),
    ("a type", {**FACTORS, "model.norm.weight": np.ones(3, np.int64)}, {}, "int64; expected float32 or float64"),
    ("no number", {**FACTORS, "model.norm.weight": np.array([1, np.nan, 1])}, {}, "'model.norm.weight' are not all finite"),
    ("a lack", {k: v for k, v in FACTORS.items() if "norm" not in k}, {}, "no coefficients for tensors .*layernorm.*norm.weight"),
    ("too many", {**FACTORS, "model.more": np.ones(3)}, {}, "tensors that the merged model does not have: 'model.more'"),
    ("experts", FACTORS, {"experts": '["a", "b", "c"]'}, "learned for the experts a, b, c, the recipe's are expert0, expert1"),
    ("format", FACTORS, {FORMAT_KEY: "masks/1"}, "format 'masks/1', expected a file of the format scales/1"),
    ("metadata", FACTORS, {"experts": "no JSON"}, "metadata cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("_, values, metadata, message", WRONG, ids=[one[0] for one in WRONG])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, _: str, values: dict[str, Any], metadata: dict[str, str], message: str
) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, top={"scales": write_scales(tmp_path / "s.safetensors", values, **metadata)})
    with pytest.raises(OtaError, match=message) as caught:
        merge(MergeRecipe.model_validate(raw), tmp_path / "out")
    assert "s.safetensors" in str(caught.value) and "ota tune" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_file_that_is_missing_is_named_with_the_places_it_was_looked_for(tmp_path: Path) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, top={"scales": "none.safetensors"})
    with pytest.raises(OtaError, match=f"'none.safetensors' does not exist .*{tmp_path}/none.safetensors.*take the key 'scales'"):
        merge(MergeRecipe.model_validate(raw), tmp_path / "out", recipe_dir=tmp_path)


def test_a_merge_in_shards_has_the_same_bytes(tmp_path: Path) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, {"density": 0.3}, top={"scales": write_scales(tmp_path / "s.safetensors")})
    recipe = MergeRecipe.model_validate(raw)
    merge(recipe, tmp_path / "whole", shard_size=500)
    job = MergeInParts(recipe=recipe, inputs=resolve_local(recipe), shard_size=500)
    files = shard_files(job)
    first = Survey.sum([survey(job, one) for one in files])
    second = Survey.sum([survey(job, one, opened=opened_bins(job, first)) for one in files])
    (tmp_path / "parts").mkdir()
    for file in files:
        merge_shard(job, file, tmp_path / "parts", whole_facts(job, first, second))
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(files) > 1


def test_scales_that_nobody_resolved_are_no_silent_ones(tmp_path: Path) -> None:
    raw = ota_recipe(tmp_path, BASE, EXPERTS, top={"scales": write_scales(tmp_path / "s.safetensors")})
    recipe = MergeRecipe.model_validate(raw)
    inputs = resolve_local(recipe)
    (tmp_path / "out").mkdir()
    with pytest.raises(OtaError, match="scales"):
        merge_into(tmp_path / "out", recipe, MergeInputs(base=inputs.base, experts=inputs.experts))


@pytest.mark.parametrize("method", ["linear", "fisher", "slerp"])
def test_methods_without_an_edit_to_scale_refuse(method: str) -> None:
    raw = {"merge_method": method, "base_model": "b", "models": [{"model": "m"}], "scales": "s.safetensors"}
    raw |= {"parameters": {"t": 0.5}} if method == "slerp" else {}
    with pytest.raises(
        ValueError, match=rf"scales: {method} has no merged edit .* breadcrumbs, .* ota, .* rowspace, .* task_arithmetic, ties"
    ):
        MergeRecipe.model_validate(raw)
    with pytest.raises(ValueError, match="base_model is missing: scales act on task vectors"):
        MergeRecipe.model_validate({"merge_method": "ota", "models": [{"model": "m"}], "scales": "s.safetensors"})
