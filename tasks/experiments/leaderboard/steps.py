"""The steps of a comparison as Prefect tasks."""

from prefect import task
from prefect.artifacts import create_table_artifact

from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.experiments.leaderboard.log import log_leaderboard
from tasks.experiments.leaderboard.question import Question
from tasks.experiments.leaderboard.text import caption, text_rows
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import Store


@task(name="rank", task_run_name="rank {question.experiment}")
def rank(question: Question, store: Store) -> Leaderboard:
    """Read the merges from MLflow and rank them."""
    return question.answer(store)


@task(name="log leaderboard", retries=2, retry_delay_seconds=10)
def log(board: Leaderboard, question: Question, store: Store) -> LoggedRun:
    """Log the leaderboard; finds the summary run of an earlier time."""
    return log_leaderboard(board, question.identity(), store)


def show_leaderboard(board: Leaderboard) -> None:
    """An experiment's merges as a table of the run."""
    header, rows = text_rows(board)
    names = [name if header.index(name) == i else f"{name} ({header[i - 1]})" for i, name in enumerate(header)]
    create_table_artifact(
        table=[dict(zip(names, cells, strict=True)) for cells in rows],
        key="leaderboard",
        description=" ".join(caption(board)),
    )
