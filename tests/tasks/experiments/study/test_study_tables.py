"""Tables of a study against numbers worked out by hand; which cells go into which table."""

import math
from typing import Any

import pytest

from tasks.experiments.study.rows import DIFFERENCE, ERROR, RECOVERED, StudyTable, methods_of, words
from tasks.experiments.study.scores import AVERAGE, BELOW, RETENTION
from tasks.experiments.study.tables import all_tables
from tasks.pages.tables import BITS, BITS_MORE, PERCENT, POINTS
from tests.tasks.experiments.study.study_results import study

TWO_CODERS = [
    {"model": f"{name}{{seed}}", "name": name, "capability": own} for name, own in (("m", "math"), ("c1", "code"), ("c2", "code"))
]
OTA = {"merge_method": "ota", "parameters": {"density": [0.2, 0.6], "metric": ["curvature", "magnitude"]}}


def tables(*grid: dict[str, Any], **options: Any) -> dict[str, StudyTable]:
    return {one.key: one for one in all_tables(study(*grid, **options))}


def in_bits(table: StudyTable) -> list[str]:
    return [column.name for column in table.columns if column.unit in {BITS, BITS_MORE}]


def flat(label: str, number: int) -> dict[str, float]:
    return {"math": 0.4, "code": 0.2}


def test_mean_and_standard_error_over_replicates() -> None:
    """Three seeds: math 0.2, 0.4, 0.6: mean 0.4, sample deviation 0.2, error 0.2 / √3. code is 0.2 everywhere."""
    found = tables({"merge_method": "linear"}, of=lambda label, i: {"math": 0.2 * (i + 1), "code": 0.2}, replicates=3)["methods"]
    row = found.frame.set_index("model").loc["linear"]
    assert row["math"] == pytest.approx(0.4) and row[f"math{ERROR}"] == pytest.approx(0.2 / math.sqrt(3))
    assert row["code"] == pytest.approx(0.2) and row[f"code{ERROR}"] == pytest.approx(0)
    # Averages 0.2, 0.3, 0.4: their deviation is 0.1.
    assert row[AVERAGE] == pytest.approx(0.3) and row[f"{AVERAGE}{ERROR}"] == pytest.approx(0.1 / math.sqrt(3))
    # Retentions (0.25 + 0.25) / 2, (0.5 + 0.25) / 2, (0.75 + 0.25) / 2.
    assert row[RETENTION] == pytest.approx(0.375) and row[f"{RETENTION}{ERROR}"] == pytest.approx(0.125 / math.sqrt(3))
    assert row[BELOW] == pytest.approx(1), "code 0.2 is below the base's 0.3, math 0.2 is not below 0.1"
    assert "over 3 replicates" in found.caption[0]


def test_one_replicate_has_errors_over_documents() -> None:
    found = tables({"merge_method": "linear"}, of=flat, replicates=1, stderr=0.03)["methods"]
    row = found.frame.set_index("model").loc["linear"]
    assert row[f"math{ERROR}"] == 0.03
    assert row[f"{AVERAGE}{ERROR}"] == pytest.approx(math.sqrt(2 * 0.03**2) / 2)
    own = [0.5, 0.25]  # merged / expert, each with the error of both: d(m/e) = √(dm² + (m/e)² de²) / e
    errors = [math.sqrt(0.03**2 + ratio**2 * 0.03**2) / 0.8 for ratio in own]
    assert row[f"{RETENTION}{ERROR}"] == pytest.approx(math.hypot(*errors) / 2)
    assert "over documents (one replicate)" in found.caption[0]


def test_no_error_where_the_harness_gives_none() -> None:
    row = tables({"merge_method": "linear"}, of=flat, replicates=1, stderr=None)["methods"].frame.set_index("model").loc["linear"]
    assert row["math"] == 0.4 and math.isnan(row[f"math{ERROR}"]) and math.isnan(row[f"{AVERAGE}{ERROR}"])


def test_what_is_not_measured_for_every_model_is_left_out_of_averages_and_said() -> None:
    found = tables({"merge_method": "linear"}, of=lambda label, i: {"math": 0.4, "code": None})["methods"]
    row = found.frame.set_index("model").loc["linear"]
    assert row[AVERAGE] == pytest.approx(0.4) and math.isnan(row["code"])
    assert "not measured for every model: code." in found.caption[0]


def test_methods_are_the_first_of_each_kind_on_all_experts() -> None:
    found = tables(
        {"merge_method": "ties", "parameters": {"density": [0.7, 0.2]}},
        {"merge_method": "linear", "experts": ["each", "all"]},
        OTA, {"merge_method": "ota"},
        of=flat,
    )["methods"]  # fmt: skip
    assert list(found.frame["model"]) == ["base", "math", "code", "ties density=0.7", "linear", "ota density=0.2", "ota"]
    assert list(found.frame["kind"]) == ["base", "expert", "expert", "merge", "merge", "merge", "merge"]


def test_every_tuned_cell_is_a_method_with_a_name_of_its_own() -> None:
    grid: list[dict[str, Any]] = [
        {"merge_method": "ota", "parameters": {"density": [0.2, 0.4]}},
        {"merge_method": "ota", "parameters": {"density": 1}, "tune": True},
        {"merge_method": "ota", "tune": True},
        {"merge_method": "ota", "parameters": {"compression": "rank1"}, "tune": True},
        {"merge_method": "ota", "parameters": {"metric": "magnitude"}, "tune": True},
    ]
    found = tables(*grid, of=flat, tune={"suite": "other", "trials": 2})["methods"]
    assert list(found.frame["model"])[3:] == [
        "ota density=0.2", "ota tuned density=1", "ota tuned", "ota tuned compression=rank1", "ota tuned metric=magnitude",
    ]  # fmt: skip


LOSSES = {"base": (2.0, 3.0), "math": (1.0, 3.2), "code": (2.2, 2.0)}


def losses(label: str, i: int) -> dict[str, float]:
    """Of a merge on two seeds: math 1.5 and 1.25, code 2.75."""
    math_loss, code_loss = LOSSES.get(label, (1.5 - i / 4, 2.75))
    return {"math": math_loss, "code": code_loss}


def test_losses_stand_in_bits_per_byte_with_what_is_recovered() -> None:
    found = tables({"merge_method": "linear"}, of=flat, loss=losses)["losses"]
    frame = found.frame.set_index("model")
    assert list(frame.index) == ["base", "math", "code", "linear"] and in_bits(found) == ["math", "code", AVERAGE]
    row = frame.loc["linear"]
    assert row["math"] == pytest.approx(1.375) and row[f"math{ERROR}"] == pytest.approx(0.125)
    assert row[AVERAGE] == pytest.approx((1.375 + 2.75) / 2) and row[f"{AVERAGE}{ERROR}"] == pytest.approx(0.0625)
    # math (2 - 1.5) / (2 - 1) and (2 - 1.25) / 1, code (3 - 2.75) / (3 - 2): means 0.375 and 0.5.
    assert row[RECOVERED] == pytest.approx(0.4375) and row[f"{RECOVERED}{ERROR}"] == pytest.approx(0.0625)
    assert math.isnan(frame.loc["base", RECOVERED])


def test_losses_are_compared_with_the_best_merge_replicate_by_replicate() -> None:
    """ties is 0.1 and 0.3 above linear on math, on two seeds; code is the same. The average differs by 0.05 and 0.15."""
    known = {"ties": (1.6, 1.55)}

    def loss(label: str, i: int) -> dict[str, float]:
        return losses(label, i) | ({"math": known[label][i]} if label in known else {})

    found = tables({"merge_method": "ties"}, {"merge_method": "linear"}, of=flat, loss=loss)["losses"]
    frame = found.frame.set_index("model")
    assert list(frame.index) == ["base", "math", "code", "ties", "linear"] and in_bits(found)[-1] == DIFFERENCE
    assert frame.loc["ties", DIFFERENCE] == pytest.approx(0.1) and frame.loc["ties", f"{DIFFERENCE}{ERROR}"] == pytest.approx(
        0.05
    )
    assert frame.loc[["base", "math", "code", "linear"], DIFFERENCE].isna().all()
    assert "to linear," in found.caption[0] and "replicate by replicate" in found.caption[0]


def test_losses_of_one_replicate_whose_documents_were_not_kept() -> None:
    found = tables({"merge_method": "linear"}, {"merge_method": "ties"}, of=flat, loss=losses, replicates=1)["losses"].frame
    row = found.set_index("model").loc["ties"]
    assert row[DIFFERENCE] == 0 and math.isnan(row[f"{DIFFERENCE}{ERROR}"])
    row = found.set_index("model").loc["linear"]
    assert row["math"] == 1.5 and row[f"math{ERROR}"] == 0.02 and row[f"{AVERAGE}{ERROR}"] == pytest.approx(math.sqrt(2) * 0.01)
    assert row[RECOVERED] == pytest.approx(0.375) and math.isnan(row[f"{RECOVERED}{ERROR}"])


def test_what_no_expert_learned_is_left_out_of_recovery_and_said() -> None:
    """The math expert of the second seed is as good as the base: on both seeds code alone counts, (3 - 2.75) / (3 - 2)."""

    def of(label: str, i: int) -> dict[str, float]:
        return {"math": 2.0, "code": 3.0} if label == "math" and i else losses(label, i)

    found = tables({"merge_method": "linear"}, of=flat, loss=of)["losses"]
    row = found.frame.set_index("model").loc["linear"]
    assert row[RECOVERED] == pytest.approx(0.25) and row["math"] == pytest.approx(1.375)
    assert "leaves out math:" in found.caption[0]
    nothing = tables({"merge_method": "linear"}, of=flat, loss=lambda label, i: losses("base", i))["losses"]
    assert (
        math.isnan(nothing.frame.set_index("model").loc["linear", RECOVERED]) and "leaves out math, code:" in nothing.caption[0]
    )
    assert "leaves out" not in tables({"merge_method": "linear"}, of=flat, loss=losses)["losses"].caption[0]


def test_recovery_is_of_the_best_expert_of_a_capability_as_retention_is() -> None:
    """Two experts of code, at 2.0 and at 2.6: code counts once, (3 - 2.75) / (3 - 2), beside math with (2 - 1.5) / (2 - 1)."""
    known = {"base": (2.0, 3.0), "m": (1.0, 3.2), "c1": (2.2, 2.0), "c2": (2.2, 2.6)}
    found = tables(
        {"merge_method": "linear"}, of=flat, models=TWO_CODERS, alone=lambda name, i: {"math": 0.5, "code": 0.5},
        loss=lambda label, i: dict(zip(("math", "code"), known.get(label, (1.5, 2.75)), strict=True)),
    )["losses"]  # fmt: skip
    assert found.frame.set_index("model").loc["linear", RECOVERED] == pytest.approx((0.5 + 0.25) / 2)
    assert "the best expert where several share one" in found.caption[0]


def test_the_caption_says_what_an_error_of_retention_over_documents_takes_for_granted() -> None:
    said = "its error as if merge and expert were independent"
    assert said in tables({"merge_method": "linear"}, of=flat, replicates=1)["methods"].caption[0]
    assert said not in tables({"merge_method": "linear"}, of=flat)["methods"].caption[0], (
        "over replicates it takes nothing for granted"
    )


def test_a_capability_without_a_loss_for_every_model_is_in_no_loss_table() -> None:
    def of(label: str, i: int) -> dict[str, float]:
        found = losses(label, i)
        return found if label != "code" else {"math": found["math"]}

    assert in_bits(tables({"merge_method": "linear"}, of=flat, loss=of)["losses"]) == ["math", AVERAGE]
    assert "losses" not in tables({"merge_method": "linear"}, of=flat)


def test_ffg_on_and_off_is_the_same_recipe_with_differences_seed_by_seed() -> None:
    """FFG gains 0.1 and 0.3 in the average on the two seeds: mean 0.2, error 0.1414 / √2 = 0.1, whatever the seeds share."""

    def of(label: str, i: int) -> dict[str, float]:
        gain = (0.1, 0.3)[i] if "density=0.2 " in label else 0.0
        return {"math": 0.3 * i + gain, "code": 0.3 * i + gain}

    found = tables(OTA, {"merge_method": "ota"}, {"merge_method": "ota", "parameters": {"density": 0.2, "power": 1}}, of=of)[
        "ffg"
    ]
    assert list(found.frame["FFG"]) == ["off", "density 0.2", "density 0.6"]
    on = found.frame.iloc[1]
    assert on[DIFFERENCE] == pytest.approx(0.2) and on[f"{DIFFERENCE}{ERROR}"] == pytest.approx(0.1)
    assert found.frame.iloc[2][DIFFERENCE] == pytest.approx(0)
    assert found.caption[0].startswith("Recipe: ota. ")


def test_row_spaces_on_and_off_are_the_same_recipe_at_the_default_ridge() -> None:
    grid = {"merge_method": "ota", "parameters": {"density": 0.4, "lambda": "auto", "compression": ["none", "rank1"]}}
    refined = {"merge_method": "ota", "parameters": {"density": 0.4, "refine": "rowspace", "ridge": [0.3, 1]}}
    results = study(
        grid, refined, of=lambda label, number: {"math": 0.6 if "refine" in label else 0.4, "code": 0.4 + 0.1 * number}
    )
    (table,) = (one for one in all_tables(results) if one.key == "refine")
    assert table.frame["row spaces"].tolist() == ["off", "on"], "rank1 has no refined twin, and a ridge of 1 is another table's"
    assert table.frame["difference"].tolist()[1] == pytest.approx(0.1)
    assert next(row for row in methods_of(results) if "refine" in row.settings).settings["ridge"] == 0.3


def test_density_sweep_puts_ffg_beside_magnitude_and_ends_without_a_mask() -> None:
    def of(label: str, i: int) -> dict[str, float]:
        value = {"ota": 0.5}.get(label, 0.1 if "magnitude" in label else 0.4)
        return {"math": value, "code": value}

    frame = tables(OTA, {"merge_method": "ota"}, of=of)["density"].frame
    assert list(frame["density"]) == [0.2, 0.6, 1.0]
    assert list(frame["FFG"]) == pytest.approx([0.4, 0.4, 0.5]) and list(frame["magnitude"]) == pytest.approx([0.1, 0.1, 0.5])
    assert list(frame[DIFFERENCE])[:2] == pytest.approx([0.3, 0.3]) and math.isnan(frame[DIFFERENCE][2])
    assert list(frame["FFG retention"]) == pytest.approx([0.5, 0.5, 0.625])


def test_a_density_that_only_one_metric_has_leaves_the_other_empty() -> None:
    grid = [
        {"merge_method": "ota", "parameters": {"density": [0.1, 0.6]}},
        {"merge_method": "ota", "parameters": {"density": 0.1, "metric": "magnitude"}},
    ]
    frame = tables(*grid, of=flat)["density"].frame
    assert math.isnan(frame["magnitude"][1]) and not math.isnan(frame["magnitude"][0])


def test_grafted_experts_show_their_own_capability_between_base_and_expert() -> None:
    def of(label: str, i: int) -> dict[str, float]:
        return {"math": 0.6, "code": 0.1} if label.endswith("on math") else {"math": 0.2, "code": 0.7}

    found = tables(OTA | {"experts": "each"}, of=of)
    assert set(found) == {"grafting"}
    frame = found["grafting"].frame
    assert list(zip(frame["grafted by"], frame["density"], strict=True)) == [
        ("base", 0.0), ("FFG", 0.2), ("FFG", 0.6), ("magnitude", 0.2), ("magnitude", 0.6), ("expert", 1.0),
    ]  # fmt: skip
    assert list(frame["math"]) == pytest.approx([0.1, 0.6, 0.6, 0.6, 0.6, 0.8])
    assert list(frame["code"]) == pytest.approx([0.3, 0.7, 0.7, 0.7, 0.7, 0.8])


def test_compressions_of_one_recipe() -> None:
    grid = [
        {"merge_method": "ota", "parameters": {"density": 0.4, "compression": ["none", "rank1", "log8"]}},
        {"merge_method": "ota", "parameters": {"density": 0.4, "compression": "rank_k", "rank": [2, 8]}},
        {"merge_method": "ota", "parameters": {"density": 0.5, "compression": "rank1"}},
    ]
    frame = tables(*grid, of=flat, cost=lambda label: {"bytes_per_param": float(len(label)), "sqrt_error": 0.1})[
        "compression"
    ].frame
    assert list(frame["second moments"]) == ["full", "rank 1", "log8", "rank 2", "rank 8"]
    assert frame["bytes/parameter"][0] == len("ota density=0.4 compression=none") and set(frame["√v error"]) == {0.1}


def test_combinations_after_ffg() -> None:
    grid = {"merge_method": "ota", "parameters": {"density": 0.4, "masked_merge": ["precond", "linear", "ties"]}}
    found = tables(grid, of=flat)
    assert list(found["combination"].frame["combined by"]) == ["precond", "linear", "ties"]
    assert set(found) == {"methods", "combination"}


def test_sweeps_are_sorted_and_of_one_parameter() -> None:
    grid = [
        {"merge_method": "ota", "parameters": {"lambda": [2, 1, 1.5]}},
        {"merge_method": "ties", "parameters": {"density": [0.9, 0.5], "lambda": [1.5, 1]}},
        {"merge_method": "ota", "parameters": {"power": [1, 0]}},
    ]
    found = tables(*grid, of=flat)
    assert set(found) == {"methods", "lambda", "power", "sweep-density"}
    rows = [(row["recipe"], row["lambda"]) for _, row in found["lambda"].frame.iterrows()]
    assert rows == [("ota", 1.0), ("ota", 1.5), ("ota", 2.0), ("ties density=0.5", 1.0), ("ties density=0.5", 1.5),
                    ("ties density=0.9", 1.0), ("ties density=0.9", 1.5)]  # fmt: skip
    assert list(found["power"].frame["power"]) == [0.0, 0.5, 1.0], "the power by default is a cell of the grid, too"
    assert [row["recipe"] for _, row in found["sweep-density"].frame.iterrows()] == [
        "ties",
        "ties",
        "ties lambda=1.5",
        "ties lambda=1.5",
    ]


def test_subsets_of_experts_and_the_best_expert_of_a_capability() -> None:
    """Two experts of code, 0.8 and 0.4: where only the weaker is merged, retention is taken against it."""
    own = {"m": {"math": 0.5, "code": 0.0}, "c1": {"math": 0.0, "code": 0.8}, "c2": {"math": 0.0, "code": 0.4}}
    grid = {"merge_method": "linear", "experts": ["all", "pairs", "each"]}
    frame = tables(grid, of=flat, alone=lambda name, i: own[name], models=TWO_CODERS)["experts"].frame
    assert list(frame["experts"]) == ["all", "without c2", "without c1", "without m"]
    assert list(frame[RETENTION]) == pytest.approx([(0.8 + 0.25) / 2, (0.8 + 0.25) / 2, (0.8 + 0.5) / 2, 0.25])


def by_seed(gain: str) -> Any:
    """Scores that a seed moves by 0.3, and one cell's by 0.1 and 0.3 besides."""

    def of(label: str, i: int) -> dict[str, float]:
        value = 0.3 * i + ((0.1, 0.3)[i] if gain in label else 0.0)
        return {"math": value, "code": value}

    return of


@pytest.mark.parametrize(
    ("key", "parameters", "changed", "reference"),
    [
        ("compression", {"density": 0.4, "compression": ["none", "rank1"]}, "rank1", "full second moments"),
        ("combination", {"density": 0.4, "masked_merge": ["precond", "ties"]}, "ties", "precond"),
        ("lambda", {"lambda": [1, 1.5]}, "lambda=1.5", "the default lambda"),
        ("power", {"power": [0.5, 1]}, "power=1", "the default power"),
    ],
)
def test_rows_are_compared_seed_by_seed_with_the_one_that_they_vary(
    key: str, parameters: dict[str, Any], changed: str, reference: str
) -> None:
    """Gains 0.1 and 0.3: mean 0.2, error 0.1414 / √2 = 0.1, though the averages themselves differ by more from seed to seed."""
    grid = {"merge_method": "ota", "parameters": parameters}
    found = tables(grid, of=by_seed(changed))[key]
    first, second = (row for _, row in found.frame.iterrows())
    assert math.isnan(first[DIFFERENCE]) and second[f"{AVERAGE}{ERROR}"] > 0.2
    assert second[DIFFERENCE] == pytest.approx(0.2) and second[f"{DIFFERENCE}{ERROR}"] == pytest.approx(0.1)
    assert DIFFERENCE in found.caption[0] and f"the same recipe with {reference}," in found.caption[0]
    assert {DIFFERENCE: POINTS, AVERAGE: PERCENT}.items() <= {column.name: column.unit for column in found.columns}.items()
    alone = tables(grid, of=by_seed(changed), replicates=1)[key]
    assert DIFFERENCE not in alone.frame and "difference" not in alone.caption[0]


def test_a_sweep_without_the_default_has_nothing_to_compare_with() -> None:
    found = tables({"merge_method": "ota", "parameters": {"lambda": [1.5, 2]}}, of=flat)["lambda"]
    assert DIFFERENCE not in found.frame and "difference" not in found.caption[0]


OWN_DENSITY = [
    {"model": "math{seed}", "capability": "math", "parameters": {"density": 0.3}},
    {"model": "code{seed}", "capability": "code"},
]


def test_densities_that_differ_between_experts_are_spelled_and_on_no_axis() -> None:
    found = tables(
        {"merge_method": "ota", "parameters": {"density": [0.3, 0.6], "metric": ["curvature", "magnitude"]}}, {"merge_method": "ota", "parameters": {"density": 1}},
        {"merge_method": "ties", "parameters": {"density": [0.3, 0.9, 0.1]}}, of=flat, models=OWN_DENSITY,
    )  # fmt: skip
    assert "density" not in found, "one number alone is no sweep"
    assert list(found["sweep-density"].frame["density"]) == ["0.3", "0.3/0.1", "0.3/0.9"]
    assert list(found["methods"].frame["model"])[3:] == ["ota density=0.3", "ties density=0.3"]


def test_densities_are_in_the_order_of_numbers() -> None:
    grid = {"merge_method": "ota", "parameters": {"density": [0.2, 1e-05, 0.1], "metric": ["curvature", "magnitude"]}}
    assert list(tables(grid, of=flat)["density"].frame["density"]) == [1e-05, 0.1, 0.2]


def test_a_tuned_cell_is_spelled_alike_in_every_table() -> None:
    grid = [
        {"merge_method": "ota", "parameters": {"density": 1}, "tune": True},
        {"merge_method": "ties", "tune": True, "experts": ["all", "each"]},
    ]
    results = study(*grid, of=flat, tune={"suite": "other", "trials": 2})
    found = {one.key: one for one in all_tables(results)}
    assert list(found["methods"].frame["model"])[3:] == ["ota tuned density=1", "ties tuned"]
    named = ["ota tuned density=1", "ties tuned", "ties tuned on math", "ties tuned on code"]
    assert list(found["tuning"].frame["model"].unique()) == named == [cell.label for cell in results.cells]


def test_nothing_but_single_cells_gives_no_table_of_comparisons() -> None:
    assert set(tables({"merge_method": "linear"}, {"merge_method": "ties"}, of=flat)) == {"methods"}


def test_words_name_what_is_not_the_default() -> None:
    grid = {
        "merge_method": "ota",
        "parameters": {"density": 0.5, "metric": "curvature", "power": 0.5, "lambda": 1.5, "compression": "rank1"},
    }
    (cell,) = study(grid, of=flat).cells
    assert words(cell) == "ota compression=rank1 lambda=1.5 density=0.5"
    assert words(cell, skip=("compression", "density")) == "ota lambda=1.5"


def test_estimated_second_moments_stand_beside_those_from_training() -> None:
    how = {"missing_curvature": "estimate", "estimate": {"data": "train.jsonl", "replace": True}}
    grid = [{"merge_method": "ota", "parameters": {"density": 0.4} | more} for more in ({}, how)]
    made = study(*grid, of=lambda label, i: {"math": 0.3 if "estimate" in label else 0.5, "code": 0.2 + 0.1 * i})
    found = {one.key: one for one in all_tables(made)}["estimate"].frame
    assert list(found["second moments"]) == ["from training", "estimated, 256/train"]
    assert found[DIFFERENCE][1] == pytest.approx(-0.1) and found[f"{DIFFERENCE}{ERROR}"][1] == pytest.approx(0)
    assert [words(cell) for cell in methods_of(made)] == ["ota density=0.4", "ota density=0.4 estimate=256/train"]
