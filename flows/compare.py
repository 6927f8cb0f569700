"""The merges of an MLflow experiment as a leaderboard: read, ranked, and logged to a summary run."""

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from ota_core.frozen import Frozen
from tasks.experiments.leaderboard.leaderboard import BEST
from tasks.experiments.leaderboard.question import Question
from tasks.experiments.leaderboard.steps import log, rank
from tasks.experiments.leaderboard.text import ranking, write_files
from tasks.orchestration.run_log import for_users
from tasks.orchestration.shown import show_mlflow, show_table
from tasks.settings import Address, places
from tasks.tracking.names import EXPERIMENT
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import resolve_store


class Comparison(Frozen):
    """What a comparison found."""

    best: str
    best_run: str
    score: float
    """The best merge's average, a fraction."""
    merges: int
    logged: LoggedRun


def _run_name() -> str:
    return f"compare {flow_run.parameters['experiment']}"


@for_users
@flow(name="compare", flow_run_name=_run_name, persist_result=False)
def compare_flow(
    experiment: str = EXPERIMENT,
    suite: str | None = None,
    filter_string: str = "",
    baseline: str = BEST,
    last: int | None = None,
    since: str | None = None,
    home: Path | None = None,
    tracking_uri: Address | None = None,
    out: Path | None = None,
) -> Comparison:
    """Rank the merges of an MLflow experiment, and log table, picture and page to a summary run in it.

    Args:
        experiment: The MLflow experiment.
        suite: Name or key of the benchmark suite, where merges were scored on several; only scores of one compare.
        filter_string: MLflow's filter of runs, for example params.merge_method = 'ota'.
        baseline: The merge that others are compared with, document by document: a name, a run id, or best.
        last: Only so many newest merges.
        since: Only merges started since: a date, or an age such as 7d.
        home: Folder of the embedded MLflow; OTA_HOME or ~/.ota by default.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        out: Folder on the worker that the files are written to, too.
    """
    question = Question(
        experiment=experiment, suite=suite, filter=filter_string, baseline=baseline, last=last, since=since
    )  # fmt: skip
    store = resolve_store(tracking_uri=tracking_uri, root=places(home).tracking)
    board = rank(question, store)
    if out is not None:
        write_files(board, out)
    logged = log(board, question, store)
    show_table(ranking(board), "leaderboard")
    show_mlflow(f"leaderboard of {experiment}", logged.url)
    best = board.best
    for note in board.notes:
        get_run_logger().info(note)
    get_run_logger().info("best of %d merges: %s; MLflow run %s", len(board.merges), best["label"], logged.url or logged.run_id)
    return Comparison(
        best=best["label"], best_run=best["run_id"], score=float(best["score/avg"]), merges=len(board.merges), logged=logged
    )
