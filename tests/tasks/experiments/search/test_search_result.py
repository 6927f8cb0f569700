"""What people are shown of a search: rows in the right order, a recipe that reads back, pictures of what happened."""

from pathlib import Path
from typing import Any

import pytest

from ota_core.recipe.recipe import MergeRecipe, load_recipe
from tasks.experiments.search.config import SearchConfig
from tasks.experiments.search.front import BEATEN, FRONT, WINNER, front, rows_of, trade_offs
from tasks.experiments.search.front import GIVEN as GIVEN_RECIPE
from tasks.experiments.search.pictures import HOLDS, MISSES, STOPPED, table_of, values_against_average
from tasks.experiments.search.result import files, markdown, ranked, recipe_text, trials, verdict
from tasks.experiments.search.search import Origin, Trial, Tuned
from tasks.experiments.search.space import Space, apply, point
from tasks.pages.pictures.picture import png, spec

GIVEN = MergeRecipe.model_validate(
    {"merge_method": "ota", "base_model": "./base", "parameters": {"density": 0.4},
     "models": [{"model": "./m", "name": "math", "parameters": {"preconditioner_path": "v.pt"}}, {"model": "s3://b/code/1", "name": "code"}]}
)  # fmt: skip
DIMENSIONS = Space().dimensions(GIVEN)


def trial(number: int, density: float, scores: dict[int, tuple[float, float]], origin: Origin = "search") -> Trial:
    values = {"density/math": density, "density/code": density / 2, "lambda": 1.5}
    return Trial(
        number=number, origin=origin, values=values, recipe=apply(GIVEN, DIMENSIONS, values) if number else GIVEN,
        scores={limit: {"math": math, "code": code} for limit, (math, code) in scores.items()}, floors={"math": 0.3}, complete=100 in scores,
    )  # fmt: skip


TUNED = Tuned(
    trials=(
        trial(0, 0.4, {50: (0.2, 0.6), 100: (0.29, 0.6)}, "recipe"),
        trial(1, 0.2, {50: (0.9, 0.9)}, "start"),
        trial(2, 0.8, {50: (0.5, 0.5), 100: (0.4, 0.5)}),
        trial(3, 0.9, {50: (0.5, 0.5), 100: (0.1, 1.0)}),
        trial(4, 0.7, {50: (0.5, 0.5), 100: (0.5, 0.4)}),
    ),
    evaluations=6.5,
)
CONFIG = SearchConfig(recipe="given.yaml", suite="demo-validation")


def test_the_best_holds_the_floors_and_of_equals_is_the_earlier() -> None:
    assert TUNED.best.number == 2 and TUNED.feasible and TUNED.start.number == 0
    assert TUNED.start.shortfall == {"math": pytest.approx(0.01)}
    assert [one.number for one in ranked(TUNED)] == [2, 4, 0, 3, 1]


def test_tables_show_the_best_and_always_the_recipe() -> None:
    cells = trials(TUNED, 2).cells()
    assert cells.header == ["trial", "average", "math", "code", "density/math", "density/code", "lambda"]
    assert cells.rows == [
        ["2", "45.0", "40.0", "50.0", "0.8", "0.4", "1.5"],
        ["4", "45.0", "50.0", "40.0", "0.7", "0.35", "1.5"],
        ["recipe", "44.5", "29.0*", "60.0", "0.4", "0.2", "1.5"],
    ]
    assert len(cells.turned().rows) == 6 and "| **2** | 45.0 |" in markdown(TUNED)
    for told in ("Trial 2", "45.0 %", "44.5 %", "math 29.0 instead of 30.0", "5 trials, 6.5 evaluations"):
        assert told in verdict(TUNED)


def test_what_was_measured_by_likelihood_is_said_wherever_its_numbers_stand() -> None:
    told = TUNED.model_copy(update={"likelihoods": ("math",)})
    for text in (markdown, lambda tuned: " ".join(trials(tuned, 2).caption), lambda tuned: recipe_text(tuned, CONFIG, None, "")):
        assert "Of math: the likelihood of a byte" in text(told) and "likelihood" not in text(TUNED)


def test_where_nothing_holds_the_least_violation_is_named() -> None:
    lost = Tuned(trials=(TUNED.trials[0], TUNED.trials[3]), evaluations=3)
    assert lost.best.number == 0 and not lost.feasible
    assert "Trial 0" in verdict(lost) and "math 29.0 instead of 30.0" in verdict(lost)
    assert "NO TRIAL HELD ALL FLOORS" in recipe_text(lost, CONFIG, None, "")


def test_the_recipe_means_the_same_from_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "base", home / "m", away):
        folder.mkdir(parents=True)
    (home / "v.pt").write_bytes(b"")
    found: dict[str, Any] = {}
    for place in (home, away):
        (place / "best.yaml").write_text(recipe_text(TUNED, CONFIG, home, str(place / "best.yaml")))
        found[place.name] = load_recipe(place / "best.yaml")
    assert found["home"] == TUNED.best.recipe
    moved = found["away"]
    assert (moved.base_model, moved.models[0].model, moved.models[1].model) == (
        str(home / "base"),
        str(home / "m"),
        "s3://b/code/1",
    )
    assert moved.models[0].parameters.preconditioner_path == str(home / "v.pt")
    assert moved.effective() == TUNED.best.recipe.effective()


def test_pictures_draw_what_happened() -> None:
    table = table_of(TUNED)
    assert list(table["state"]) == [MISSES, STOPPED, HOLDS, MISSES, HOLDS]
    assert list(table["spent"]) == [1.5, 2.0, 3.5, 5.0, 6.5] and list(table["documents"]) == [100, 50, 100, 100, 100]
    assert list(table["average"]) == pytest.approx([44.5, 90, 45, 55, 45]) and list(table["best"].dropna()) == pytest.approx(
        [45, 45, 45]
    )
    made = files(TUNED, DIMENSIONS, "merge_method: ota\n", "search <b>")
    assert set(made) == {
        "recipe.yaml",
        "tables/trials.csv",
        "plots/best.png",
        "plots/values.png",
        "plots/front.png",
        "search.html",
    }
    assert all(bytes(made[name])[:4] == b"\x89PNG" for name in made if name.endswith(".png"))  # type: ignore[arg-type]
    page = str(made["search.html"])
    assert "search &lt;b&gt;" in page and "density of math" in page and "https://cdn" not in page
    # A method with nothing to choose has no panels of values.
    assert "plots/values.png" not in files(TUNED, (), "", "t")


def test_the_front_is_what_no_trial_beats_in_everything() -> None:
    """Trials on fewer documents neither beat nor count."""
    assert [one.number for one in front(TUNED.trials)] == [0, 2, 3, 4]
    beaten = TUNED.model_copy(update={"trials": (*TUNED.trials, trial(5, 0.6, {50: (0.5, 0.5), 100: (0.45, 0.55)}))})
    assert [one.number for one in front(beaten.trials)] == [0, 3, 4, 5]
    rows = rows_of(beaten)
    assert dict(zip(rows["trial"], rows["kind"], strict=True)) == {0: GIVEN_RECIPE, 2: BEATEN, 3: FRONT, 4: FRONT, 5: WINNER}
    equal = TUNED.trials[2].model_copy(update={"number": 6})
    assert [one.number for one in front((TUNED.trials[2], equal))] == [2, 6]  # neither exceeds the other


@pytest.mark.parametrize("capabilities", [2, 3, 6])
def test_trade_offs_are_drawn_for_two_capabilities_and_for_more(capabilities: int) -> None:
    names = [f"c{i}" for i in range(capabilities)]
    scores = [[((i * 7 + k * 5) % 10) / 10 for k in range(capabilities)] for i in range(5)]
    made = [
        trial(i, 0.5, {100: (0, 0)}, "search" if i else "recipe").model_copy(
            update={"scores": {100: dict(zip(names, row, strict=True))}, "floors": {"c0": 0.2}}
        )
        for i, row in enumerate(scores)
    ]
    tuned = Tuned(trials=tuple(made), evaluations=5)
    drawn = spec(trade_offs(tuned))
    data = [row for rows in drawn["datasets"].values() for row in rows]
    if capabilities == 2:
        held = {row["trial"]: (row["x"], row["y"]) for row in data if "kind" in row}
        assert held == {i: pytest.approx([100 * value for value in row]) for i, row in enumerate(scores)}
    else:
        held = {(row["trial"], row["capability"]): row["score"] for row in data if "kind" in row}
        assert held == {(i, name): pytest.approx(100 * row[k]) for i, row in enumerate(scores) for k, name in enumerate(names)}
    assert png(trade_offs(tuned))[:4] == b"\x89PNG"


def test_words_that_were_chosen_stand_in_table_and_pictures() -> None:
    space = Space.model_validate({"merge_method": "ota,ties", "density": "0.1:1", "lambda": None, "per_expert": False})
    values: list[dict[str, float | str]] = [{"merge_method": "ota", "density": 0.4}, {"merge_method": "ties", "density": 0.2}]
    made = [
        one.model_copy(update={"values": own, "recipe": point(space, GIVEN, None, own)})
        for one, own in zip((TUNED.trials[0], TUNED.trials[2]), values, strict=True)
    ]
    tuned = Tuned(trials=tuple(made), evaluations=2)
    cells = trials(tuned, 5).cells()
    assert cells.header[-2:] == ["merge_method", "density"] and [row[-2:] for row in cells.rows] == [
        ["ties", "0.2"],
        ["ota", "0.4"],
    ]
    drawn = spec(values_against_average(tuned, space.dimensions(GIVEN)))
    kinds = [panel["layer"][0]["encoding"]["x"]["type"] for panel in drawn["concat"]]
    assert kinds == ["nominal", "quantitative"]
