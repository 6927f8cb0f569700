"""Search for a recipe's methods, densities and λ: best average over the capabilities, under a floor for each, within a budget of evaluations.

``Search`` runs trial by trial, for who runs each one somewhere else; ``tune`` is the whole of it. Points come from Optuna's TPE (Bergstra et al. 2011; Watanabe 2023) with the floors as its constraints; trials that fall behind are stopped by
asynchronous successive halving (Li et al. 2020): few documents first, more for the best of them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ota_core.artifact import canonical_json
from ota_core.frozen import Frozen
from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search.space import Range, Space, Value, place, point, starting_points
from tasks.experiments.search.trials import SearchError, ask, finished, give_up_running, open_study, study_name

__all__ = ["Budget", "Point", "Range", "Search", "SearchError", "Space", "Trial", "Tuned", "tune"]

Scores = Mapping[str, float | None]
"""Capability to score, 0..1; None where it was not measured."""
Evaluate = Callable[[MergeRecipe, int], Scores]
"""Scores of a recipe's merge on the validation split, on so many documents of each task. Called with rising numbers for one recipe."""
FloorsAt = Callable[[int], Mapping[str, float]]
"""Floors by capability, measured on so many documents of each task like the scores that they are held against; capabilities without
a floor are absent."""
Origin = Literal["recipe", "start", "search"]
"""Where a point comes from: the recipe as given, a sensible default, or the optimiser."""


class Budget(Frozen):
    """How much a search may measure. At least one of the two limits."""

    evaluations: float | None = Field(
        None, gt=0, description="Evaluations on all documents; one on half of them counts half. Never exceeded."
    )
    trials: int | None = Field(None, ge=1, description="Points that are tried.")
    rungs: tuple[int, ...] = Field(
        (25, 50, 100),
        min_length=1,
        description="Documents of each task, rising: a trial goes on to the next number while it is good.",
    )
    reduction: int = Field(2, ge=2, description="Of this many trials at a rung one goes on.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.evaluations is None and self.trials is None:
            raise ValueError("budget: give evaluations, trials, or both")
        if self.rungs[0] < 1 or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"budget: the rungs are {list(self.rungs)}; expected rising numbers of documents")
        if self.evaluations is not None and self.evaluations < self.trial_cost:
            raise ValueError(
                f"budget: {self.evaluations:g} evaluations pay for no trial; one through the rungs {list(self.rungs)} takes {self.trial_cost:g}"
            )
        return self

    def cost(self, limit: int) -> float:
        """Evaluations that a measurement on so many documents counts as."""
        return limit / self.rungs[-1]

    @property
    def trial_cost(self) -> float:
        """Evaluations that a trial takes which is never stopped."""
        return math.fsum(self.cost(limit) for limit in self.rungs)


class Point(Frozen):
    """A recipe that is to be tried."""

    number: int
    origin: Origin
    values: dict[str, Value]
    """Dimension to value; empty for a recipe that lies outside of the space."""
    recipe: MergeRecipe


class Trial(Point):
    """A recipe that was tried."""

    scores: dict[int, dict[str, float]]
    """Documents per task to the scores by capability, of every rung that it reached."""
    floors: dict[str, float]
    """At the last of these rungs."""
    complete: bool
    """False when it was stopped before the last rung."""

    @property
    def last(self) -> dict[str, float]:
        """The scores at the last rung that it reached."""
        return self.scores[max(self.scores)]

    @property
    def average(self) -> float:
        """Mean of ``last``."""
        return fmean(self.last.values())

    @property
    def shortfall(self) -> dict[str, float]:
        """Capabilities below their floors, and by how much."""
        return {name: floor - self.last[name] for name, floor in self.floors.items() if self.last[name] < floor}

    @property
    def violation(self) -> float:
        """Sum of the shortfalls; 0 where every floor holds."""
        return math.fsum(self.shortfall.values())


class Tuned(Frozen):
    """What a search found."""

    trials: tuple[Trial, ...]
    evaluations: float
    """Spent, in evaluations on all documents."""
    likelihoods: tuple[str, ...] = ()
    """Capabilities that were measured by the likelihood of a byte of held-out text: see ``ModelScores.objective``."""

    @property
    def best(self) -> Trial:
        """The best average of those trials that hold all floors on all documents; of equals the earlier.

        Where none does, the one that misses them by the least: see ``feasible``.
        """
        return self.best_until(self.trials[-1])

    def best_until(self, last: Trial) -> Trial:
        """The best when this trial had ended."""
        tried = [one for one in self.trials if one.complete and one.number <= last.number]
        return max(tried, key=lambda one: (_merit(one), -one.number))

    @property
    def feasible(self) -> bool:
        """Whether the best trial holds all floors."""
        return not self.best.shortfall

    @property
    def start(self) -> Trial:
        """The recipe as it was given."""
        return self.trials[0]


def tune(search: "Search", evaluate: Evaluate) -> Tuned:
    """All of a search that is not open yet. Raises SearchError, and what ``evaluate`` raises."""
    with search:
        while (point := search.ask()) is not None:
            search.run(point, evaluate)
        return search.result()


class Search:
    """The best point of the space for this recipe, trial by trial. The recipe itself is always tried first, on all documents.

    A method that uses nothing of the space has one point, and is evaluated once. The same arguments give the same trials. With
    ``storage``, a folder, an interrupted search goes on where it stopped, a larger budget adds to it, and with a smaller one only those
    trials count that it pays for; ``identity`` then names what is measured (suite, data, models). ``names``: the experts', where the
    recipe does not tell them. A context manager: it holds a file open, and a lock.
    """

    def __init__(
        self, recipe: MergeRecipe, space: Space, budget: Budget, *, floors: FloorsAt | None = None, seed: int = 0,
        storage: Path | None = None, identity: str = "", names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self._recipe, self._budget, self._seed = recipe, budget, seed
        self._space, self._names = space, names
        self.dimensions = space.dimensions(recipe, names)
        # Where there is nothing to choose, there is nothing to stop early.
        self.rungs = budget.rungs if self.dimensions else budget.rungs[-1:]
        self._floors = {limit: dict(floors(limit)) if floors else {} for limit in self.rungs}
        self._starts = starting_points(space, recipe, names)
        ranges = {one.name: one.within.model_dump() for one in self.dimensions}
        named = {"recipe": _described(recipe), "space": ranges, "rungs": list(self.rungs), "reduction": budget.reduction, "seed": seed,
                 "floors": {str(limit): floor for limit, floor in self._floors.items()}, "identity": identity}  # fmt: skip
        self.name = study_name(canonical_json(named))
        self._file = storage / f"{self.name}.db" if storage else None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._study = open_study(self._file, self.name, self._budget.reduction, self._stack)
        give_up_running(self._study)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All within the budget that have ended, in their order; also those of an earlier process."""
        return tuple(self._trial(number, one) for number, one in enumerate(self._paid()))

    @property
    def spent(self) -> float:
        """Evaluations so far."""
        return self._cost(self._paid())

    def ask(self) -> Point | None:
        """The next point; None when the budget may not pay for it, or there is no other. A trial that was killed is asked for again."""
        paid = self._paid()
        number = len(paid)
        if not self._pays_for_another(paid) or (number and not self.dimensions):
            return None
        origin: Origin = "recipe" if number == 0 else "start" if number <= len(self._starts) else "search"
        fixed = {"recipe": place(self._space, self._recipe, self._names), "start": self._starts[number - 1 :][:1]}.get(origin)
        at = fixed[0] if isinstance(fixed, list) else fixed
        outside = origin == "recipe" and at is None  # the optimiser learns nothing from a point that it could not choose
        self._asked, suggest = ask(self._study, number, self._seed, at)
        if not outside:
            self._space.walk(self._recipe, self._names, suggest)
        return self._point(number, origin, self._asked.params)

    def run(self, point: Point, evaluate: Evaluate) -> Trial:
        """Measure the point that ``ask`` gave, rung by rung, until it ends or falls behind."""
        from optuna.trial import TrialState

        asked, known, state = self._asked, self._measured(point), TrialState.COMPLETE
        asked.set_user_attr("point", _described(point.recipe))
        asked.set_user_attr("origin", point.origin)
        trial = None
        for limit in self.rungs:
            scores = known.get(limit) or self._checked(evaluate(point.recipe, limit))
            asked.set_user_attr(f"scores/{limit}", json.dumps(scores))
            reached = {**(trial.scores if trial else {}), limit: scores}
            trial = Trial(**dict(point), scores=reached, floors=self._floors[limit], complete=limit == self.rungs[-1])
            asked.report(_merit(trial), limit)
            if point.origin != "recipe" and not trial.complete and asked.should_prune():
                state = TrialState.PRUNED
                break
        assert trial is not None
        for name, floor in trial.floors.items():
            asked.set_constraint(name, floor - trial.last[name])
        self._study.tell(asked, trial.average if state == TrialState.COMPLETE else None, state=state)
        return trial

    def result(self) -> Tuned:
        """What was found so far. Raises SearchError before the first trial has ended."""
        trials = self.trials
        if not trials:
            raise SearchError("the search has no trial yet")
        return Tuned(trials=trials, evaluations=self.spent)

    def _paid(self) -> list[Any]:
        """The trials that this budget pays for, of those that ended. An earlier process may have had a larger one: the search then is as if
        it had had this one from the start."""
        every = finished(self._study)
        return every[: next((n for n in range(len(every)) if not self._pays_for_another(every[:n])), len(every))]

    def _pays_for_another(self, trials: Sequence[Any]) -> bool:
        """Whether the budget pays for one more trial after these, through all rungs."""
        budget, ladder = self._budget, math.fsum(self._budget.cost(limit) for limit in self.rungs)
        if budget.trials is not None and len(trials) >= budget.trials:
            return False
        return budget.evaluations is None or self._cost(trials) + ladder <= budget.evaluations + 1e-9

    def _cost(self, trials: Sequence[Any]) -> float:
        return math.fsum(self._budget.cost(limit) for one in trials for limit in one.intermediate_values)

    def _point(self, number: int, origin: Origin, params: Mapping[str, Value]) -> Point:
        values = {one.name: one.rounded(params[one.name]) for one in self.dimensions if one.name in params}
        recipe = self._recipe if origin == "recipe" else point(self._space, self._recipe, self._names, values)
        return Point(number=number, origin=origin, values=values, recipe=recipe)

    def _trial(self, number: int, one: Any) -> Trial:
        scores = {limit: json.loads(one.user_attrs[f"scores/{limit}"]) for limit in sorted(one.intermediate_values)}
        last = max(scores)
        point = self._point(number, one.user_attrs["origin"], one.params)
        return Trial(**dict(point), scores=scores, floors=self._floors[last], complete=last == self.rungs[-1])

    def _measured(self, point: Point) -> dict[int, dict[str, float]]:
        """What a killed try of this point has measured."""
        from optuna.trial import TrialState

        tries = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        attributes = [one.user_attrs for one in tries if one.user_attrs.get("point") == _described(point.recipe)]
        return {limit: json.loads(one[key]) for one in attributes for limit in self.rungs if (key := f"scores/{limit}") in one}

    def _checked(self, scores: Scores) -> dict[str, float]:
        """Measured scores only. Raises SearchError for values that are no scores, and for other capabilities than before."""
        found = {name: float(value) for name, value in scores.items() if value is not None}
        wrong = {name: value for name, value in found.items() if not 0 <= value <= 1}
        if wrong or not found:
            raise SearchError(f"scores of a trial: got {wrong or 'none'}, expected numbers in 0..1 for at least one capability")
        missing = sorted(set(self._floors[self.rungs[-1]]) - set(found))
        if missing:
            raise SearchError(
                f"no score for {', '.join(missing)}, which has a floor; take the floor away, or let the suite measure it"
            )
        before = next((set(json.loads(text)) for one in finished(self._study) for key, text in one.user_attrs.items()
                       if key.startswith("scores/")), set(found))  # fmt: skip
        if before != set(found):
            raise SearchError(
                f"this trial was scored on {sorted(found)}, others on {sorted(before)}; their averages do not compare"
            )
        return found


def _merit(trial: Trial) -> float:
    """One number that orders trials at a rung (Deb 2000): those that hold all floors by their average, above all that do not, by how
    much these miss."""
    return trial.average if not trial.shortfall else -trial.violation


def _described(recipe: MergeRecipe) -> str:
    return canonical_json(recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
