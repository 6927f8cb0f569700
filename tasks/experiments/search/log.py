"""A search in MLflow: one run of role ``search``, and below it one of role ``trial`` for every trial, logged as it ends.

Everything is found again by tags: what an interrupted search has logged is not logged twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tasks.experiments.search.search import Trial, Tuned
from tasks.tracking.kept_run import KeptRun, as_bytes, texts
from tasks.tracking.run import TAG_FLOW_RUN
from tasks.tracking.write import TAG_ROLE

TAG_SEARCH = "search"
TAG_TRIAL = "trial"
_SAFE = "The search itself keeps every trial, and a repeat goes on with the next."


def search_run(name: str, search: str, params: Mapping[str, object], flow_run_id: str | None) -> KeptRun:
    """The run of the search with this name in its storage, before its first trial."""
    return KeptRun(
        name=name, identity={TAG_ROLE: "search", TAG_SEARCH: search}, params=texts(params),
        tags={TAG_FLOW_RUN: flow_run_id} if flow_run_id else {}, safe=_SAFE,
    )  # fmt: skip


def with_trials(run: KeptRun, tuned: Tuned, trials: Iterable[Trial]) -> KeptRun:
    """The search's run with these trials below it: each with its recipe and the scores of every rung, at the number of documents as step.

    The best until a trial is a point of the search's own curve, at the trial's number.
    """
    children, points = [], dict[int, dict[str, float]]()
    for trial in trials:
        best = tuned.best_until(trial)
        children.append(_trial_run(trial))
        points[trial.number] = {"best/avg": best.average, "best/violation": best.violation}
    return run.model_copy(update={"children": tuple(children), "points": points})


def whole(run: KeptRun, tuned: Tuned, files: Mapping[str, str | bytes]) -> KeptRun:
    """The run of a search that has ended: all trials, the winner's scores, and files by their paths among its artifacts."""
    best, run = tuned.best, with_trials(run, tuned, tuned.trials)
    metrics = _metrics(best.last) | {"violation": best.violation, "start/avg": tuned.start.average}
    metrics |= {"evaluations": tuned.evaluations, "trials": float(len(tuned.trials))}
    tags = run.tags | {"feasible": str(tuned.feasible).lower(), "best_trial": str(best.number)}
    points = run.points | {0: run.points.get(0, {}) | metrics}
    return run.model_copy(update={"tags": tags, "points": points, "files": as_bytes(files)})


def _trial_run(trial: Trial) -> KeptRun:
    points = {limit: _metrics(scores) for limit, scores in trial.scores.items()}
    points[max(points)]["violation"] = trial.violation
    tags = {"pruned": str(not trial.complete).lower(), "feasible": str(not trial.shortfall).lower(), "origin": trial.origin}
    return KeptRun(
        name=f"trial {trial.number}", identity={TAG_ROLE: "trial", TAG_TRIAL: str(trial.number)}, tags=tags, points=points,
        params=texts({"merge_method": trial.recipe.merge_method, **trial.values}), files=as_bytes({"recipe.yaml": trial.recipe.to_yaml()}),
        safe=_SAFE,
    )  # fmt: skip


def _metrics(scores: Mapping[str, float]) -> dict[str, float]:
    return {f"score/{name}": value for name, value in scores.items()} | {"score/avg": sum(scores.values()) / len(scores)}
