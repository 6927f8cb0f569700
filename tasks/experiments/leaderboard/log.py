"""The summary run of a leaderboard: table, picture and page in the experiment that they are of.

One question (suite, filter, baseline, newest) has one summary run, found by its tags: while an experiment grows, its files are
replaced and its metrics gain points, so that a link to it stays, and MLflow draws the best score over time. The same merges again
change nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.experiments.leaderboard.entries import AVERAGE
from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.experiments.leaderboard.text import HTML, ranking, summary, write_files
from tasks.pages.markdown import captioned
from tasks.tracking.run import TAG_LIMIT, TAG_SUITE, TAG_SUITE_KEY, LoggedRun, logged_run
from tasks.tracking.store import Store, artifact_errors, clear_errors, connect, locked
from tasks.tracking.write import NOTE, TAG_ROLE, find_or_create, in_progress, log_values

if TYPE_CHECKING:
    import pandas as pd

ROLE = "leaderboard"
FOLDER = "leaderboard"
"""Where the files lie among the run's artifacts."""
TAG_QUESTION = "leaderboard_question"
TAG_RUNS = "leaderboard_runs"
"""JSON list of the compared runs, the best first."""
TAG_BEST, TAG_BEST_RUN = "best", "best_run"


def log_leaderboard(board: Leaderboard, question: str, store: Store) -> LoggedRun:
    """Log the leaderboard to the summary run of its suite and question, made when there is none. Raises StorageError."""
    safe = "The merges' own runs are as they were."
    with clear_errors(store, "logging the leaderboard", safe), locked(store):
        client = connect(store)
        identity = {TAG_ROLE: ROLE, TAG_SUITE_KEY: board.suite_key, TAG_QUESTION: question.replace("'", "’").replace("`", "’")}
        run = find_or_create(client, board.experiment_id, identity, f"leaderboard {board.suite}")
        run_id = run.info.run_id
        best = board.best
        tags = {
            TAG_SUITE: board.suite, TAG_LIMIT: board.limit, TAG_BEST: str(best["label"]), TAG_BEST_RUN: str(best["run_id"]),
            TAG_RUNS: json.dumps(list(board.merges["run_id"])), NOTE: f"{summary(board)} The page: artifact `{FOLDER}/{HTML}`.\n\n{captioned(ranking(board))}",
        }  # fmt: skip
        with in_progress(client, run), tempfile.TemporaryDirectory() as folder:
            log_values(client, run, {}, best_metrics(board), tags)
            write_files(board, Path(folder))
            with artifact_errors("the leaderboard", run.info.artifact_uri, f"{safe} The best so far: {best['label']}."):
                client.log_artifacts(run_id, folder, FOLDER)
    return logged_run(store, board.experiment_id, run_id)


def best_metrics(board: Leaderboard) -> Mapping[str, float]:
    """The best merge's metrics under the names that merges have, so that MLflow's table of runs lines them up; and how many there are."""
    best = board.best
    names = [
        f"score/{AVERAGE}",
        *(f"score/{name}" for name in board.capabilities),
        *(f"retention/{name}" for name in board.capabilities),
    ]
    names += ["negative_transfer"]
    metrics = {name: float(best[name]) for name in names if _known(best, name)}
    if _known(best, "retention"):
        metrics["retention/avg"] = float(best["retention"])
    bases = board.table[board.table["kind"] == "base"][f"score/{AVERAGE}"].dropna()
    if len(bases) == 1:
        metrics["gain_over_base"] = metrics[f"score/{AVERAGE}"] - float(bases.iloc[0])
    return metrics | {"merges": float(len(board.merges))}


def _known(row: pd.Series[Any], name: str) -> bool:
    import pandas as pd

    return not pd.isna(row[name])
