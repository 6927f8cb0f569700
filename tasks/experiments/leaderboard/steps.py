"""The steps of a comparison as Prefect tasks."""

from prefect import task

from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.experiments.leaderboard.log import log_leaderboard
from tasks.experiments.leaderboard.question import Question
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
