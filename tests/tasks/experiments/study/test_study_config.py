"""What a study's grid stands for: subsets of experts, replicates, tuned entries; cells equal in effect are one."""

from itertools import combinations
from typing import Any

import pytest
from pydantic import ValidationError

from ota_core.errors import RecipeError
from tasks.experiments.study.cells import families
from tasks.experiments.study.study import StudyConfig

EXPERTS = ("math", "code", "knowledge")
TUNE = {"suite": "demo-validation", "trials": 4}


def study(*grid: dict[str, Any], **changes: Any) -> StudyConfig:
    raw = {
        "name": "small", "base_model": "base", "suite": "demo", "models": [{"model": f"./{name}", "capability": name} for name in EXPERTS],
        "grid": list(grid) or [{"merge_method": "linear"}],
    }  # fmt: skip
    return StudyConfig.model_validate(raw | changes)


def problem(*grid: dict[str, Any], **changes: Any) -> str:
    with pytest.raises((ValidationError, RecipeError)) as caught:
        study(*grid, **changes).cells()
    return str(caught.value)


def subsets(experts: Any) -> list[tuple[str, ...]]:
    return [cell.experts for cell in study({"merge_method": "linear", "experts": experts}).cells()]


def test_words_for_subsets() -> None:
    assert subsets("all") == [EXPERTS]
    assert subsets("each") == [("math",), ("code",), ("knowledge",)]
    assert subsets("pairs") == list(combinations(EXPERTS, 2))
    assert subsets(["leave_one_out"]) == [("code", "knowledge"), ("math", "knowledge"), ("math", "code")]


def test_lists_of_names_in_the_studys_order_each_subset_once() -> None:
    assert subsets([["knowledge", "math"], "code", "all", ["code"], ["math", "code", "knowledge"]]) == [
        ("math", "knowledge"), ("code",), EXPERTS,
    ]  # fmt: skip


def test_a_capability_stands_for_all_experts_that_have_it() -> None:
    models = [{"model": f"./{i}", "name": f"m{i}", "capability": "math" if i < 2 else "code"} for i in range(3)]
    found = study({"merge_method": "linear", "experts": [["math"], ["m0", "code"]]}, models=models)
    assert [cell.experts for cell in found.cells()] == [("m0", "m1"), ("m0", "m2")]


def test_labels_name_the_subset_and_the_recipe_has_its_experts_alone() -> None:
    cells = study({"merge_method": "ota", "parameters": {"density": 0.2}, "experts": ["all", "each", "leave_one_out"]}).cells()
    assert [cell.label for cell in cells] == [
        "ota density=0.2", "ota density=0.2 on math", "ota density=0.2 on code", "ota density=0.2 on knowledge",
        "ota density=0.2 without math", "ota density=0.2 without code", "ota density=0.2 without knowledge",
    ]  # fmt: skip
    for cell in cells:
        assert tuple(entry.capability for entry in cell.recipes[0].models) == cell.experts


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        (
            "maths",
            "grid[0].experts: there is no expert 'maths'; expected all, each, pairs, leave_one_out or code, knowledge, math",
        ),
        ([["math", "each"]], "'each' stands for subsets and cannot stand inside one"),
        ([], "experts: got []"),
        (3, "experts: got 3"),
        ([[]], "experts: got [[]]"),
    ],
)
def test_subsets_that_nobody_can_mean(experts: Any, told: str) -> None:
    assert told in problem({"merge_method": "linear", "experts": experts})


def test_pairs_need_two() -> None:
    assert "'pairs' needs at least two experts" in problem(
        {"merge_method": "linear", "experts": "pairs"}, models=[{"model": "./math"}]
    )


def test_what_is_equal_in_effect_is_run_once() -> None:
    cells = study(
        {"merge_method": "ota", "parameters": {"density": [1, 0.5], "metric": ["curvature", "magnitude"]}},
        {"merge_method": "ota", "parameters": {"lambda": 1, "density": [0.5, 1.0]}},
        {"merge_method": "linear", "experts": ["leave_one_out"]},
        {"merge_method": "linear", "parameters": {"normalize": True}, "experts": ["pairs"]},
    ).cells()
    assert [(cell.label, cell.equal) for cell in cells] == [
        ("ota density=1 metric=curvature", ("ota density=1 metric=magnitude", "ota lambda=1 density=1")),
        ("ota density=0.5 metric=curvature", ("ota lambda=1 density=0.5",)),
        ("ota density=0.5 metric=magnitude", ()),
        ("linear without math", ("linear normalize=true without math",)),
        ("linear without code", ("linear normalize=true without code",)),
        ("linear without knowledge", ("linear normalize=true without knowledge",)),
    ]


def test_what_a_tuned_density_will_rank_by_keeps_cells_apart() -> None:
    tune = {"suite": "demo-validation", "trials": 4, "lambda": [0.5, 1.5], "density": [0.1, 0.9]}
    metrics = [{"merge_method": "ota", "parameters": {"metric": one}, "tune": True} for one in ("curvature", "magnitude")]
    cells = study({"merge_method": "ota", "tune": True}, *metrics, tune=tune).cells()
    assert [cell.equal for cell in cells] == [("ota tuned metric=curvature",), ()]


def test_settings_that_decide_something_keep_cells_apart() -> None:
    values = {"density": [0.5], "scope": ["global", "per_tensor"], "compression": ["none", "rank1"], "power": [0.5, 1]}
    assert len(study({"merge_method": "ota", "parameters": values}).cells()) == 8


def test_replicates_fill_the_addresses_and_nothing_else() -> None:
    found = study(
        {"merge_method": "ota", "parameters": {"density": 0.5}, "tune": True},
        base_model="s3://b/base{seed}",
        models=[{"model": "s3://b/math/{seed}", "name": "math", "parameters": {"preconditioner_path": "v{seed}.safetensors"}}],
        data_dir="data/{seed}",
        replicates={"seed": [1, 20]},
        tune=TUNE | {"data_dir": "validation/{seed}"},
    )
    assert [one.name for one in found.all_replicates()] == ["seed=1", "seed=20"]
    (cell,) = found.cells()
    assert [recipe.base_model for recipe in cell.recipes] == ["s3://b/base1", "s3://b/base20"]
    assert [recipe.models[0].model for recipe in cell.recipes] == ["s3://b/math/1", "s3://b/math/20"]
    assert [recipe.models[0].parameters.preconditioner_path for recipe in cell.recipes] == ["v1.safetensors", "v20.safetensors"]
    assert [one.data_dir for one in found.all_replicates()] == ["data/1", "data/20"]
    assert [one.tune and one.tune.data_dir for one in found.all_replicates()] == ["validation/1", "validation/20"]
    assert cell.label == "ota tuned density=0.5" and cell.tune == ("lambda",)


def test_several_placeholders_go_side_by_side() -> None:
    found = study(base_model="b{seed}{size}", replicates={"seed": [1, 2], "size": ["S", "M"]})
    assert [one.base_model for one in found.all_replicates()] == ["b1S", "b2M"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model": "b{sed}", "replicates": {}}, "{sed} has no values; write replicates: {sed: [...]}"),
        ({"replicates": {"seed": [1, 2]}}, "replicates.seed: no model's address holds {seed}"),
        ({"base_model": "b{seed}", "replicates": {"seed": [1, 1]}}, "a value twice; the same models are no second replicate"),
        ({"base_model": "b{a}{b}", "replicates": {"a": [1, 2], "b": [1]}}, "a has 2, b has 1; expected lists of one length"),
        ({"base_model": "b{a}", "replicates": {"a": []}}, "a has 0; expected lists of one length"),
        ({"name": "../up"}, "name"),
    ],
)
def test_replicates_that_are_none(changes: dict[str, Any], told: str) -> None:
    assert told in problem(**changes)


def test_tuned_entries_search_what_the_method_has_and_the_entry_leaves_open() -> None:
    cells = study(
        {"merge_method": "ties", "tune": True},
        {"merge_method": "ties", "tune": True, "parameters": {"lambda": [1, 2]}},
        {"merge_method": "task_arithmetic", "tune": True},
        {"merge_method": "ties"},
        tune=TUNE,
    ).cells()
    assert [(cell.label, cell.tune) for cell in cells] == [
        ("ties tuned", ("lambda", "density")), ("ties tuned lambda=1", ("density",)), ("ties tuned lambda=2", ("density",)),
        ("task_arithmetic tuned", ("lambda",)), ("ties", ()),
    ]  # fmt: skip


def test_ranges_are_lists_or_as_the_search_has_them() -> None:
    tune = study({"merge_method": "ties", "tune": True}, tune=TUNE | {"lambda": "0.2:2:log", "density": [0.1, 0.5]}).tune
    assert tune is not None and (str(tune.lambda_), str(tune.density)) == ("0.2:2:log", "0.1:0.5:log")
    tune = study({"merge_method": "ties", "tune": True}, tune=TUNE | {"lambda": [0.5, 2]}).tune
    assert tune is not None and (str(tune.lambda_), str(tune.density)) == ("0.5:2", "0.05:1:log")


@pytest.mark.parametrize(
    ("grid", "tune", "told"),
    [
        ({"merge_method": "ties", "tune": True}, None, "the study has no section 'tune'"),
        ({"merge_method": "ties"}, TUNE, "no entry of the grid says tune: true"),
        ({"merge_method": "linear", "tune": True}, TUNE, "there is nothing to tune; linear needs lambda or density"),
        (
            {"merge_method": "ties", "tune": True},
            TUNE | {"density": "0:1"},
            "tune.density: got 0:1, expected a range within (0, 1]",
        ),
        ({"merge_method": "ties", "tune": True}, TUNE | {"lambda": [2, 1]}, "the range 2:1 is empty"),
        ({"merge_method": "ties", "learn": "tensor"}, None, "the study has no section 'tune'"),
        ({"merge_method": "ties", "learn": "tensor", "tune": True}, TUNE, "ties has both tune and learn"),
        ({"merge_method": "linear", "learn": "layer"}, TUNE, "linear has no merged edit that could be scaled"),
        ({"merge_method": "ties", "learn": "block"}, TUNE, "learn"),
        ({"merge_method": "ties", "learn": "role"}, TUNE | {"learning": {"stepps": 3}}, "stepps"),
        ({"merge_method": "ties", "learn": "role"}, TUNE | {"learning": {"suite": "demo"}}, "the study says that elsewhere"),
    ],
)
def test_tuning_that_cannot_be(grid: dict[str, Any], tune: Any, told: str) -> None:
    assert told in problem(grid, tune=tune)


def test_families_differ_in_nothing_else() -> None:
    cells = study(
        {"merge_method": "ota", "parameters": {"density": 0.5, "masked_merge": ["precond", "linear"], "power": [0.5, 1]}},
        {"merge_method": "ota", "parameters": {"density": 0.4, "masked_merge": "ties"}},
    ).cells()
    found = [[cell.label for cell in group] for group in families(cells, ("masked_merge",))]
    assert found == [
        ["ota density=0.5 masked_merge=precond power=0.5", "ota density=0.5 masked_merge=linear power=0.5"],
        ["ota density=0.5 masked_merge=precond power=1", "ota density=0.5 masked_merge=linear power=1"],
    ]
