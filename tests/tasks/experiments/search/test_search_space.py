"""Points of a search as recipes: what a method has to vary, what a value replaces, where a recipe lies."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search.config import Floor, SearchConfig, floors_of, load_search, parse_floor, recipe_of
from tasks.experiments.search.space import Options, Range, Space, Value, apply, place, point, starting_points, starts, values_of
from tests.tasks.experiments.study.study_results import scores

ALL = Space.model_validate(
    {"density": "0.1:1", "lambda": "0.5:2", "weight": "0:1", "scaling_factor": "0.5:2:log", "power": "0:1", "t": "0:1"}
)


def recipe(method: str, *, own: dict[str, Any] | None = None, base: str | None = "base", **parameters: Any) -> MergeRecipe:
    models = [{"model": "s3://e/math", "parameters": own or {}}, {"model": "s3://e/code"}]
    if method == "slerp":
        parameters.setdefault("t", 0.5)
    return MergeRecipe.model_validate({"merge_method": method, "base_model": base, "models": models, "parameters": parameters})


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("ota", ["density/math", "density/code", "lambda", "scaling_factor/math", "scaling_factor/code", "power"]),
        ("ties", ["density/math", "density/code", "lambda", "weight/math", "weight/code"]),
        ("dare_linear", ["density/math", "density/code", "lambda", "weight/math", "weight/code"]),
        ("breadcrumbs_ties", ["density/math", "density/code", "lambda", "weight/math", "weight/code"]),
        ("task_arithmetic", ["lambda", "weight/math", "weight/code"]),
        ("linear", ["weight/math", "weight/code"]),
        ("fisher", ["weight/math", "weight/code"]),
        ("slerp", ["t"]),
    ],
)
def test_a_method_has_what_it_uses_and_every_point_is_a_recipe_there(method: str, names: list[str]) -> None:
    given = recipe(method)
    dimensions = ALL.dimensions(given)
    assert [one.name for one in dimensions] == names
    for part in (0.0, 0.37, 1.0):
        values = {one.name: one.within.at(part) for one in dimensions}
        point = apply(given, dimensions, values)
        assert values_of(point, dimensions) == values and point.merge_method == method
        assert apply(point, dimensions, values) == point
    by_default = [one.name for one in Space().dimensions(given)]
    assert by_default == [name for name in names if name.startswith(("density", "lambda"))]


def test_without_a_base_nothing_is_cut_or_scaled() -> None:
    assert [one.key for one in ALL.dimensions(recipe("ota", base=None))] == ["scaling_factor", "scaling_factor", "power"]


def test_the_names_of_the_inputs_name_the_dimensions() -> None:
    dimensions = Space().dimensions(recipe("ota"), ["sums", "programs"])
    assert [one.name for one in dimensions] == ["density/sums", "density/programs", "lambda"]


def test_a_value_replaces_what_the_recipe_said_for_all_and_for_one() -> None:
    given = recipe("ota", own={"density": 0.2, "preconditioner_path": "v.pt"}, density=0.4, compression="rank1", power=0.25)
    dimensions = Space().dimensions(given)
    assert values_of(given, dimensions) == {"density/math": 0.2, "density/code": 0.4, "lambda": 1.0}
    made = apply(given, dimensions, {"density/math": 0.5, "density/code": 0.6, "lambda": 1.5})
    assert [made.setting("density", i) for i in range(2)] == [0.5, 0.6] and made.parameters.density is None
    assert made.setting("lambda") == 1.5 and made.setting("power") == 0.25 and made.setting("compression") == "rank1"
    assert made.models[0].parameters.preconditioner_path == "v.pt"
    shared = Space(per_expert=False).dimensions(given)
    assert values_of(given, shared) is None  # two densities are not one
    made = apply(given, shared, {"density": 0.3, "lambda": 1.5})
    assert [made.setting("density", i) for i in range(2)] == [0.3, 0.3] and made.models[0].parameters.density is None


@pytest.mark.parametrize("own", [{}, {"precond_threshold": 1e-20}])
def test_a_density_takes_the_place_of_a_threshold(own: dict[str, Any]) -> None:
    given = recipe("ota", own=own, precond_threshold=1e-18)
    for space in (Space(), Space(per_expert=False)):
        dimensions = space.dimensions(given)
        assert values_of(given, dimensions) is None
        made = apply(given, dimensions, {one.name: 0.5 for one in dimensions})
        assert all(made.setting("precond_threshold", i) is None and made.setting("density", i) == 0.5 for i in range(2))


def test_no_density_means_all() -> None:
    dimensions = Space(per_expert=False).dimensions(recipe("ota"))
    assert values_of(recipe("ota"), dimensions) == {"density": 1.0, "lambda": 1.0}
    assert values_of(recipe("ota", **{"lambda": 3}), dimensions) is None  # outside of the range


def test_starting_points_are_uniform_distinct_and_inside() -> None:
    given = recipe("ties", density=0.4)
    dimensions = ALL.dimensions(given)
    points = starts(given, dimensions)
    assert 2 <= len(points) <= 4 and all(points.count(one) == 1 for one in points)
    for values in points:
        assert values["density/math"] == values["density/code"] and values["weight/math"] == 1.0
        assert all(values[one.name] in one.within for one in dimensions)
    assert {values["lambda"] for values in points} > {1.505}
    assert starts(recipe("linear"), ()) == []


def test_a_search_for_a_scale_alone_begins_all_over_its_range() -> None:
    given = recipe("task_arithmetic", **{"lambda": 0.5})
    dimensions = Space.model_validate({"lambda": "0.1:10:log"}).dimensions(given)
    scales = sorted(point["lambda"] for point in starts(given, dimensions))
    assert scales == pytest.approx([10 ** (2 * part - 1) for part in (0.33, 0.5, 0.67, 0.83)], rel=1e-3)


def test_ranges_read_as_they_are_written() -> None:
    assert (
        Range.model_validate("0.05:1:log") == Range(low=0.05, high=1, log=True)
        and str(Range(low=0.05, high=1, log=True)) == "0.05:1:log"
    )
    assert Space.model_validate({"density": "0.1:1"}).density == Range(low=0.1, high=1, log=True)  # densities differ by ratios
    assert Space.model_validate({"density": "0.1:1:linear"}).density == Range(low=0.1, high=1)
    assert Space.model_validate(ALL.model_dump(mode="json", by_alias=True)) == ALL
    log, linear = Range(low=0.01, high=1, log=True), Range(low=0, high=2)
    assert [log.at(part) for part in (0, 0.5, 1)] == [0.01, 0.1, 1.0] and [linear.at(part) for part in (0, 0.5, 1)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"density": "0.5"}, "expected a range such as 0.05:1"),
        ({"density": "a:b"}, "expected a range such as 0.05:1"),
        ({"density": "0.1:1:cubic"}, "expected log or linear"),
        ({"density": "0.9:0.1"}, "is empty"),
        ({"lambda": "0:2:log"}, "must begin above 0"),
        ({"density": "0:1:linear"}, r"leaves \(0, 1\]"),
        ({"density": "0.1:1.5"}, r"leaves \(0, 1\]"),
        ({"t": "-1:1"}, "leaves 0..1"),
        ({"lamda": "0:2"}, "Extra inputs"),
    ],
)
def test_a_range_that_cannot_be_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Space.model_validate(raw)


def config(**changes: Any) -> SearchConfig:
    known = {
        "recipe": recipe("ota", density=0.4).model_dump(mode="json", by_alias=True, exclude_none=True),
        "suite": "demo-validation",
    }
    return SearchConfig.model_validate(known | changes)


def test_ranges_without_effect_are_a_mistake_of_the_search() -> None:
    with pytest.raises(OtaError, match="space: the range of t, weight has no effect with merge_method ota; remove it"):
        recipe_of(config(space={"weight": "0:1", "t": "0:1", "lambda": "0:1"}))
    recipe_of(
        config(recipe=recipe("linear").model_dump(mode="json", by_alias=True, exclude_none=True))
    )  # the defaults are no mistake


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("base", Floor("base")),
        ("none", Floor("none")),
        (0.9, Floor("expert", 0.9)),
        ("0.9", Floor("expert", 0.9)),
        ("score:0.25", Floor("score", 0.25)),
    ],
)
def test_floors_read_as_they_are_written(text: str | float, floor: Floor) -> None:
    assert parse_floor(text) == floor
    assert config(floor=text).floors() == {"default": floor}
    assert config(floor={"math": text}).floors() == {"default": Floor("base"), "math": floor}


@pytest.mark.parametrize("text", ["bass", 1.5, -0.1, "score:2", "score:", "nan", ""])
def test_a_floor_that_cannot_be_is_refused(text: str | float) -> None:
    with pytest.raises(ValidationError, match="expected base"):
        config(floor={"math": text})


SCORES = {"math": 0.1, "code": 0.3, "chat": 0.5}
EXPERTS = {"m": ("math", {"math": 0.8, "code": 0.1, "chat": 0.2}), "c": ("code", {"math": 0.0, "code": 0.6, "chat": 0.1})}


def test_floors_become_scores() -> None:
    assert floors_of({"default": Floor("base")}, SCORES, SCORES, EXPERTS) == SCORES
    mixed = {"default": Floor("base"), "math": Floor("expert", 0.5), "chat": Floor("score", 0.2)}
    assert floors_of(mixed, SCORES, SCORES, EXPERTS) == {"math": 0.4, "code": 0.3, "chat": 0.2}
    assert floors_of({"default": Floor("none"), "code": Floor("base")}, SCORES, SCORES, EXPERTS) == {"code": 0.3}
    # A capability that nothing measures, such as code without consent to run it, has no floor by default.
    unmeasured = SCORES | {"code": None}
    experts = {"m": ("math", {"math": 0.8, "code": None, "chat": 0.2})}
    assert floors_of({"default": Floor("base")}, SCORES, unmeasured, experts) == {"math": 0.1, "chat": 0.5}


def test_floors_are_of_what_the_trials_are_measured_by() -> None:
    """math has a held-out loss: floors, like trials, are of the likelihood of a byte there, of the best expert, whatever it answers."""
    base = scores({"math": 0.1, "code": 0.3}, losses={"math": 2.0})
    experts = {
        "m1": ("math", scores({"math": 0.9, "code": 0.0}, losses={"math": 1.5})),
        "m2": ("math", scores({"math": 0.6, "code": 0.0}, losses={"math": 1.0})),
        "c": ("code", scores({"math": 0.0, "code": 0.8}, losses={"math": 3.0})),
    }
    capabilities = {"math": 0, "code": 0}
    assert floors_of({"default": Floor("base")}, capabilities, base, experts) == {"math": 0.25, "code": 0.3}
    assert floors_of({"default": Floor("expert", 0.5)}, capabilities, base, experts) == {"math": 0.25, "code": 0.4}
    assert floors_of({"default": Floor("score", 0.4)}, capabilities, base, experts) == {"math": 0.4, "code": 0.4}


def test_floors_that_nothing_was_measured_for_are_all_named() -> None:
    wrong = {"default": Floor("expert", 0.9), "mth": Floor("base")}
    with pytest.raises(OtaError) as caught:
        floors_of(wrong, SCORES, SCORES, EXPERTS)
    assert len(caught.value.problems) == 2
    assert "no capability 'mth'; did you mean 'math'?" in caught.value.problems[0]
    assert "no expert of the recipe has the capability 'chat'" in caught.value.problems[1]


def test_a_floor_of_the_base_needs_one() -> None:
    without = recipe("ota", base=None).model_dump(mode="json", by_alias=True, exclude_none=True)
    with pytest.raises(OtaError, match="names no base_model"):
        recipe_of(config(recipe=without))
    recipe_of(config(recipe=without, floor="none"))


def test_a_search_file_names_its_recipe_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe("ota", density=0.4).to_yaml())
    (tmp_path / "search.yaml").write_text(
        "recipe: recipe.yaml\nsuite: demo-validation\nfloor: {default: 0.9, code: base}\nspace: {density: 0.1:1}\n"
    )
    found = load_search(str(tmp_path / "search.yaml"))
    given, folder = recipe_of(found)
    assert (
        given == recipe("ota", density=0.4) and folder == tmp_path.resolve() and found.floors()["default"] == Floor("expert", 0.9)
    )
    (tmp_path / "search.yaml").write_text("recipe: recipe.yaml\nsuit: demo\nbudget: {evaluations: 1}\n")
    with pytest.raises(OtaError) as caught:
        load_search(str(tmp_path / "search.yaml"))
    assert len(caught.value.problems) == 3 and "did you mean 'suite'" in str(caught.value)


METHODS = {
    "merge_method": "ota,ties,linear,rowspace",
    "refine": "none,rowspace",
    "metric": ["curvature", "magnitude"],
    "ridge": "0.1:1:log",
}


def chosen(space: Space, given: MergeRecipe, **words: str) -> tuple[MergeRecipe, dict[str, Value]]:
    """The point with these words, and every number in the middle of its range."""

    def middle(one: Any) -> Value:
        return words[one.name] if isinstance(one.within, Options) else one.within.at(0.5)

    _, values = space.walk(given, None, middle)
    return point(space, given, None, values), values


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({"merge_method": "ota", "refine": "none", "metric": "magnitude"}, {"density/math", "density/code"}),
        ({"merge_method": "ota", "refine": "rowspace", "metric": "curvature"}, {"density/math", "density/code", "ridge"}),
        ({"merge_method": "ties", "refine": "none"}, {"density/math", "density/code"}),
        ({"merge_method": "linear", "refine": "rowspace"}, {"ridge"}),
        ({"merge_method": "rowspace"}, {"ridge"}),
    ],
)
def test_a_value_belongs_to_the_methods_that_use_it(words: dict[str, str], names: set[str]) -> None:
    given = recipe("ota", own={"preconditioner_path": "v.pt"}, density=0.4, compression="rank1", power=0.25, **{"lambda": "auto"})
    space = Space.model_validate(METHODS)
    made, values = chosen(space, given, **words)
    assert set(values) == {*words, *names}, "λ stays auto, and is no dimension"
    assert made.merge_method == words["merge_method"] and made.refined == ("rowspace" in words.values())
    assert made.auto == (made.merge_method != "linear")
    assert place(space, made) == values and point(space, given, None, values) == made
    if made.merge_method == "ota":
        assert made.setting("compression") == "rank1" and made.setting("metric") == words["metric"]
        assert made.models[0].parameters.preconditioner_path == "v.pt"


def test_everything_that_can_be_chosen_is_a_dimension_choices_first() -> None:
    given = recipe("ota", density=0.4, **{"lambda": "auto"})
    names = [one.name for one in Space.model_validate(METHODS).dimensions(given)]
    assert names == ["merge_method", "refine", "metric", "density/math", "density/code", "ridge"]
    asked = Space.model_validate(METHODS | {"lambda": "0.5:2"}).dimensions(given)
    assert "lambda" in [one.name for one in asked]  # said by name, it takes auto's place
    assert "lambda" not in [one.name for one in Space().dimensions(given)]


def test_a_search_over_methods_begins_with_each_of_them() -> None:
    given = recipe("ota", density=0.4, **{"lambda": "auto"})
    space = Space.model_validate({"merge_method": "ota,ties,rowspace", "refine": "none,rowspace"})
    points = starting_points(space, given)
    begun = {(one["merge_method"], one.get("refine")) for one in points}
    assert begun == {("ota", "rowspace"), ("ties", "none"), ("ties", "rowspace"), ("rowspace", None)}  # ota alone is the recipe
    assert place(space, given) == {"merge_method": "ota", "refine": "none", "density/math": 0.4, "density/code": 0.4}
    assert all(one["density/math"] == 0.4 for one in points if one["merge_method"] != "rowspace")


def test_what_only_a_refined_recipe_has_goes_with_the_refinement() -> None:
    given = recipe("ota", density=0.4, refine="rowspace", ridge=1.0)
    made, _ = chosen(Space.model_validate({"refine": "none,rowspace", "density": None}), given, refine="none")
    assert not made.refined and made.parameters.ridge is None


@pytest.mark.parametrize(
    ("space", "method", "message"),
    [
        (
            {"merge_method": "ota,fisher"},
            "ties",
            "ota, fisher reads second moments, and the recipe to begin with does not say how",
        ),
        ({"merge_method": "ota,tise"}, "ota", "unknown merge_method 'tise'; did you mean 'ties'"),
        ({"merge_method": "ota,slerp"}, "ota", "slerp needs 't'"),
        ({"refine": "none,rowspaces"}, "ota", "refine rowspaces"),
        ({"merge_method": "ties,linear", "metric": "curvature,magnitude"}, "ties", "metric has no effect"),
    ],
)
def test_choices_that_no_recipe_can_have_are_found_before_the_search(space: dict[str, Any], method: str, message: str) -> None:
    given = recipe(method, density=0.4).model_dump(mode="json", by_alias=True, exclude_none=True)
    with pytest.raises(OtaError) as caught:
        recipe_of(config(recipe=given, space=space, floor="none"))
    assert message in str(caught.value)


@pytest.mark.parametrize(("raw", "message"), [("ota", "at least 2"), ("ota,ota", "a word twice")])
def test_a_choice_is_among_several(raw: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Space.model_validate({"merge_method": raw})
