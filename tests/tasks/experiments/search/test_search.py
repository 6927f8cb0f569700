"""The optimiser on functions whose best point is known: floors, budgets, successive halving, determinism, a real kill."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pydantic import ValidationError

from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search import search as searching
from tasks.experiments.search.search import Budget, Range, Search, SearchError, Space, Tuned

BEST = {"a": 0.1, "b": 0.3, "c": 0.8}
ALL = Budget(evaluations=40)


def recipe(method: str = "ota", **parameters: object) -> MergeRecipe:
    raw = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": f"experts/{name}"} for name in BEST],
        "parameters": parameters,
    }
    return MergeRecipe.model_validate(raw)


def peak(found: MergeRecipe, limit: int) -> dict[str, float]:
    """1 for every capability at the densities ``BEST`` and λ 1.6, lower with the distance; the number of documents changes nothing."""
    scale = 0.4 * abs(found.setting("lambda") - 1.6)
    return {
        name: max(0.0, 1 - 0.3 * abs(math.log((found.setting("density", i) or 1.0) / best)) - scale)
        for i, (name, best) in enumerate(BEST.items())
    }


def tune(given: MergeRecipe, space: Space, budget: Budget, evaluate: searching.Evaluate, **options: Any) -> Tuned:
    return searching.tune(Search(given, space, budget, **options), evaluate)


class Counted:
    """An evaluation that remembers what it was asked."""

    def __init__(self, function: Callable[[MergeRecipe, int], Mapping[str, float | None]] = peak) -> None:
        self.function, self.calls = function, list[tuple[str, int]]()

    def __call__(self, found: MergeRecipe, limit: int) -> Mapping[str, float | None]:
        self.calls.append((found.to_yaml(), limit))
        return self.function(found, limit)

    def cost(self, budget: Budget) -> float:
        return math.fsum(budget.cost(limit) for _, limit in self.calls)


def shortened(found: Tuned) -> list[tuple[int, str, dict[str, float], dict[int, dict[str, float]], bool]]:
    return [(one.number, one.origin, one.values, one.scores, one.complete) for one in found.trials]


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_optimum_and_far_above_the_start(seed: int) -> None:
    found = tune(recipe(density=0.4), Space(), Budget(evaluations=60), peak, seed=seed)
    assert found.start.recipe == recipe(density=0.4) and found.start.average == pytest.approx(0.523, abs=0.001)
    assert found.best.average > 0.85 and found.feasible
    assert abs(found.best.values["lambda"] - 1.6) < 0.2 and found.best.values["density/a"] < found.best.values["density/c"]
    assert found.best.average == max(one.average for one in found.trials if one.complete)
    assert found.best.average == pytest.approx(sum(peak(found.best.recipe, 100).values()) / 3)


def test_it_beats_random_points_at_the_same_cost() -> None:
    """The mean over seeds against uniform draws from the same space, as many as whole evaluations are paid for."""
    import random

    def drawn(seed: int) -> float:
        rng, dimensions = random.Random(seed), Space().dimensions(recipe())
        from tasks.experiments.search.space import apply

        points = [{one.name: one.within.at(rng.random()) for one in dimensions} for _ in range(40)]
        return max(sum(peak(apply(recipe(), dimensions, point), 100).values()) / 3 for point in points)

    searched = [tune(recipe(density=0.4), Space(), ALL, peak, seed=seed).best.average for seed in range(8)]
    assert sum(searched) / 8 > sum(drawn(seed) for seed in range(8)) / 8


def test_the_winner_holds_the_floors_even_where_the_average_does_not_want_it() -> None:
    """Capability a wants a small density, b a large one and counts more; a's floor forbids b's optimum."""

    def torn(found: MergeRecipe, limit: int) -> dict[str, float]:
        density = found.setting("density", 0)
        return {"a": 1 - 0.5 * density, "b": density}

    space = Space(density=Range(low=0.05, high=1), per_expert=False, lambda_=None)  # type: ignore[call-arg]
    free = tune(recipe(density=0.4), space, ALL, torn)
    assert free.best.values["density"] > 0.95
    held = tune(recipe(density=0.4), space, ALL, torn, floors=lambda limit: {"a": 0.7})
    assert held.feasible and held.best.last["a"] >= 0.7 and 0.5 < held.best.values["density"] <= 0.6
    assert any(one.shortfall for one in held.trials)  # the floor was felt


def test_nothing_feasible_is_said_and_the_least_violation_wins() -> None:
    """b can reach 1 at most: a floor of 0.97 for each is out of reach together with a bad λ."""
    space = Space(density=Range(low=0.4, high=1), lambda_=Range(low=0.5, high=1))  # type: ignore[call-arg]
    found = tune(recipe(density=0.4), space, ALL, peak, floors=lambda limit: dict.fromkeys(BEST, 0.97))
    complete = [one for one in found.trials if one.complete]
    assert len(complete) > 5 and not found.feasible and found.best.shortfall
    assert found.best.violation == min(one.violation for one in complete) < found.start.violation
    assert found.best.violation == pytest.approx(sum(max(0.0, 0.97 - value) for value in found.best.last.values()))


def test_floors_are_those_of_the_same_documents() -> None:
    """On few documents everything scores lower, base and trials alike: what was measured on them is held against their floor."""
    floors = {25: 0.2, 50: 0.4, 100: 0.6}

    def harder(found: MergeRecipe, limit: int) -> dict[str, float]:
        return {"a": floors[limit] + 0.01}

    found = tune(recipe(density=0.4), Space(), Budget(trials=6), harder, floors=lambda limit: {"a": floors[limit]})
    assert not any(one.shortfall for one in found.trials)


@pytest.mark.parametrize("evaluations", [1.75, 2.0, 3.5, 7.3, 40])
@pytest.mark.parametrize("method", ["ota", "ties", "task_arithmetic", "linear"])
def test_the_budget_is_never_exceeded(method: str, evaluations: float) -> None:
    budget, counted = (
        Budget(evaluations=evaluations),
        Counted(lambda found, limit: {"a": 0.3 * (found.setting("lambda") or 1)}),
    )
    found = tune(recipe(method), Space(), budget, counted)
    assert counted.cost(budget) == pytest.approx(found.evaluations) and found.evaluations <= evaluations + 1e-9
    if method == "linear":  # nothing to choose: measured once, on all documents
        assert [limit for _, limit in counted.calls] == [100] and found.best.values == {}
    else:
        assert found.evaluations > evaluations - budget.trial_cost  # nor is it left unused


def test_a_number_of_trials_is_a_budget_too() -> None:
    found = tune(recipe(), Space(), Budget(trials=7), peak)
    assert [one.number for one in found.trials] == list(range(7))
    assert len(tune(recipe(), Space(), Budget(trials=3, evaluations=100), peak).trials) == 3


def test_halving_stops_what_falls_behind_and_never_the_recipe() -> None:
    """Where more documents tell nothing new, who is stopped is known: those not in the better half of what reached the rung so far."""
    found = tune(recipe(density=0.4), Space(), Budget(trials=40), peak)
    assert found.start.complete and found.start.origin == "recipe"
    stopped = [one for one in found.trials if not one.complete]
    assert 5 < len(stopped) < 35 and {max(one.scores) for one in stopped} <= {25, 50}
    for one in stopped:
        rung = max(one.scores)
        before = [other.average for other in found.trials[: one.number] if rung in other.scores]
        better = sum(value > one.average for value in before)
        assert better >= max(1, (len(before) + 1) // 2)
    # A good one goes through all rungs, with rising numbers of documents.
    assert all(list(one.scores) == [25, 50, 100] for one in found.trials if one.complete)


def test_a_bad_recipe_is_scored_on_all_documents() -> None:
    """The winner is then never worse than the recipe on what chose it."""

    def down(found: MergeRecipe, limit: int) -> dict[str, float]:
        return {
            "a": 1.0
            if found.setting("density", 0) == 0.4 and limit == 100
            else 0.5
            if found.setting("density", 0) != 0.4
            else 0.0
        }

    found = tune(recipe(density=0.4), Space(per_expert=False), Budget(trials=10), down)
    assert found.best is not None and found.best.origin == "recipe" and found.best.average == 1.0


def test_the_first_trials_are_the_recipe_and_one_density_for_all() -> None:
    found = tune(recipe(density=0.4), Space(), Budget(trials=6), peak)
    assert [one.origin for one in found.trials] == ["recipe", "start", "start", "start", "start", "search"]
    for one in found.trials[1:5]:
        assert len({value for name, value in one.values.items() if name.startswith("density/")}) == 1
    assert found.trials[0].values == {"density/a": 0.4, "density/b": 0.4, "density/c": 0.4, "lambda": 1.0}


def test_a_recipe_outside_of_the_space_is_tried_all_the_same() -> None:
    given = recipe(precond_threshold=1e-20)
    found = tune(
        given, Space(), Budget(trials=25), lambda found, limit: {"a": 0.1 if found == given else peak(found, limit)["a"]}
    )
    assert found.start.recipe == given and found.start.values == {} and found.start.complete
    assert all(one.recipe.setting("precond_threshold", 0) is None and len(one.values) == 4 for one in found.trials[1:])


def test_the_same_arguments_give_the_same_trials(tmp_path: Path) -> None:
    first, second = (tune(recipe(density=0.4), Space(), ALL, peak, seed=7) for _ in range(2))
    kept = tune(recipe(density=0.4), Space(), ALL, peak, seed=7, storage=tmp_path)
    other = tune(recipe(density=0.4), Space(), ALL, peak, seed=8)
    assert shortened(first) == shortened(second) == shortened(kept) != shortened(other)


def test_a_larger_budget_adds_to_a_search(tmp_path: Path) -> None:
    first = Counted()
    small = tune(recipe(), Space(), Budget(evaluations=10), first, storage=tmp_path)
    again = Counted()
    assert (
        shortened(tune(recipe(), Space(), Budget(evaluations=10), again, storage=tmp_path)) == shortened(small)
        and not again.calls
    )
    large = tune(recipe(), Space(), Budget(evaluations=20), again, storage=tmp_path)
    assert shortened(large)[: len(small.trials)] == shortened(small)
    assert shortened(large) == shortened(tune(recipe(), Space(), Budget(evaluations=20), peak))
    assert len(again.calls) + len(first.calls) == sum(len(one.scores) for one in large.trials)
    # Other floors, another suite: another search.
    other = Counted()
    tune(recipe(), Space(), Budget(evaluations=10), other, storage=tmp_path, identity="another suite")
    tune(recipe(), Space(), Budget(evaluations=10), other, storage=tmp_path, floors=lambda limit: {"a": 0.1})
    assert len(other.calls) == 2 * len(first.calls)


@pytest.mark.parametrize(("large", "small"), [(Budget(trials=12), Budget(trials=6)), (Budget(evaluations=20), Budget(evaluations=10)),
                                              (Budget(trials=9), Budget(evaluations=5))])  # fmt: skip
def test_of_a_smaller_budget_only_the_trials_count_that_it_pays_for(tmp_path: Path, large: Budget, small: Budget) -> None:
    """What was tried beyond it chooses nothing, and is there again when the budget grows."""
    whole = tune(recipe(density=0.4), Space(), large, peak, storage=tmp_path)
    again = Counted()
    less = tune(recipe(density=0.4), Space(), small, again, storage=tmp_path)
    fresh = tune(recipe(density=0.4), Space(), small, peak)
    assert shortened(less) == shortened(fresh) and less.evaluations == fresh.evaluations and less.best == fresh.best
    assert len(less.trials) < len(whole.trials) and not again.calls
    assert shortened(tune(recipe(density=0.4), Space(), large, again, storage=tmp_path)) == shortened(whole) and not again.calls


SLOW = """
import sys, time
from pathlib import Path
from tasks.experiments.search.search import Budget, Space
from tests.tasks.experiments.search.test_search import peak, recipe, tune

def slow(found, limit):
    print(limit, flush=True)
    time.sleep(0.05)
    return peak(found, limit)

tune(recipe(density=0.4), Space(), Budget(evaluations=20), slow, seed=3, storage=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("calls", [1, 4, 14])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, calls: int) -> None:
    """SIGKILL in the middle of a trial, at different places of it."""
    whole = tune(recipe(density=0.4), Space(), Budget(evaluations=20), peak, seed=3)
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        for _ in range(calls):
            assert child.stdout.readline(), "the child ended by itself"
        with pytest.raises(SearchError, match="another process runs a search"):
            tune(recipe(density=0.4), Space(), Budget(evaluations=20), peak, seed=3, storage=tmp_path)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    rest = Counted()
    resumed = tune(recipe(density=0.4), Space(), Budget(evaluations=20), rest, seed=3, storage=tmp_path)
    assert shortened(resumed) == shortened(whole)
    measured = sum(len(one.scores) for one in whole.trials)
    assert len(rest.calls) == measured - (
        calls - 1
    )  # what the child had measured is not measured again; its last call never ended


def test_a_kill_before_a_starting_point_is_taken_leaves_no_trial_behind(tmp_path: Path) -> None:
    """Optuna holds starting points as trials that wait: one that was put there and never taken must not come twice."""
    import optuna

    whole = tune(recipe(density=0.4), Space(), Budget(trials=8), peak)
    with Search(recipe(density=0.4), Space(), Budget(trials=8), storage=tmp_path) as search:
        point = search.ask()
        assert point is not None
        search.run(point, peak)
        name, (file,) = search.name, tmp_path.glob("*.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{file}")
    study.enqueue_trial({"lambda": 0.5})
    assert shortened(tune(recipe(density=0.4), Space(), Budget(trials=8), peak, storage=tmp_path)) == shortened(whole)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": 1.2}, "expected numbers in 0..1"),
        ({"a": float("nan")}, "expected numbers in 0..1"),
        ({"a": None}, "at least one capability"),
        ({"b": 0.5}, "no score for a, which has a floor"),
    ],
)
def test_what_is_no_score_is_refused(scores: dict[str, float | None], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        tune(recipe(), Space(), ALL, lambda found, limit: scores, floors=lambda limit: {"a": 0.1})


def test_trials_over_different_capabilities_do_not_compare() -> None:
    answers = iter([{"a": 0.5, "b": 0.4}] * 3 + [{"a": 0.9}])
    with pytest.raises(SearchError, match=r"scored on \['a'\], others on \['a', 'b'\]"):
        tune(recipe(), Space(), ALL, lambda found, limit: next(answers))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "give evaluations, trials, or both"),
        ({"evaluations": 1}, r"1 evaluations pay for no trial; one through the rungs \[25, 50, 100\] takes 1.75"),
        ({"trials": 5, "rungs": [50, 25]}, "expected rising numbers"),
        ({"trials": 5, "rungs": [0, 25]}, "expected rising numbers"),
        ({"trials": 5, "reduction": 1}, "greater than or equal to 2"),
        ({"trials": 0}, "greater than or equal to 1"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Budget.model_validate(raw)


def test_a_trial_takes_little_time_by_itself(tmp_path: Path) -> None:
    """What the optimiser adds to each must stay far below a merge and a score of a small model, a second or two.

    Of this process's own seconds, so that a busy machine does not count; the middle one, after what is imported and made once.
    """
    seconds = []

    def timed(found: MergeRecipe, limit: int) -> dict[str, float]:
        if limit == 25:  # the first that is measured of a trial
            seconds.append(time.process_time())
        return peak(found, limit)

    found = tune(recipe(), Space(), Budget(trials=30), timed, storage=tmp_path)
    assert median(end - start for start, end in pairwise(seconds)) < 0.5 and len(found.trials) == 30
    assert all(earlier.number + 1 == later.number for earlier, later in pairwise(found.trials))


def test_searches_from_before_there_were_choices_are_known_again() -> None:
    """Their names, by which an interrupted one is found, and the points that seed 3 led to."""
    raw: list[tuple[str, dict[str, object], dict[str, object]]] = [
        ("ota", {"density": 0.4, "compression": "rank1"}, {}),
        ("ties", {"density": 0.4}, {"density": "0.1:1", "lambda": "0.5:2", "weight": "0:1"}),
        ("linear", {}, {}),
    ]
    found = []
    for method, parameters, space in raw:
        with Search(recipe(method, **parameters), Space.model_validate(space), Budget(trials=12), seed=3, identity="x") as one:
            points = []
            while (point := one.ask()) is not None:
                density = point.recipe.setting("density", 0) or 1
                one.run(point, lambda _, limit, density=density: {"a": (density * 7.3 % 1) * 0.5 + 0.25, "b": 0.5})
                points.append(next(iter(point.values.values()), None))
        found.append((one.name, points[-3:]))
    assert found == [
        ("search-d5deab0b855b526a61448676", [0.08466, 0.9498, 0.6762]),
        ("search-6b03a1ec2139a76ad4079517", [0.1499, 0.1157, 0.1369]),
        ("search-c9da0b7d518a79a5a5d844f3", [None]),
    ]


def test_a_search_over_methods_finds_the_method_and_its_density(tmp_path: Path) -> None:
    """ties at density 0.3 with row spaces is the peak; what linear has of all that is nothing. Interrupted, it goes on to the same."""

    def best(found: MergeRecipe, limit: int) -> dict[str, float]:
        density = found.setting("density", 0)
        fit = 0.0 if found.merge_method == "linear" else 0.3 if found.merge_method == "ota" else 0.5
        fit += 0.2 * found.refined + (max(0.0, 0.3 - 0.2 * abs(math.log(density / 0.3))) if density else 0.0)
        return {"a": fit}

    space = Space.model_validate(
        {"merge_method": "ota,ties,linear", "refine": "none,rowspace", "density": "0.05:1", "per_expert": False}
    )
    given, budget = recipe(density=0.9, **{"lambda": "auto"}), Budget(trials=40, rungs=(10,))
    counted = Counted(best)
    whole = tune(given, space, budget, counted, storage=tmp_path)
    assert whole.best.recipe.merge_method == "ties" and whole.best.recipe.refined
    density = whole.best.values["density"]
    assert isinstance(density, float) and 0.2 < density < 0.45
    assert {one.values.get("merge_method") for one in whole.trials} == {"ota", "ties", "linear"}
    assert all(("density" in one.values) == (one.values["merge_method"] != "linear") for one in whole.trials)
    assert tune(given, space, budget, counted, storage=tmp_path) == whole and len(counted.calls) == 40
    parts = tmp_path / "parts"
    tune(given, space, Budget(trials=17, rungs=(10,)), best, storage=parts)
    assert tune(given, space, budget, best, storage=parts) == whole
