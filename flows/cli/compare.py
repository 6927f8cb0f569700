"""``ota compare``: the merges of an MLflow experiment as a leaderboard."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import Home, TrackingUri, show
from tasks.tracking.names import EXPERIMENT


def compare(
    experiment: Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="MLflow experiment.")] = EXPERIMENT,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for leaderboard.csv, .parquet, .md, .png and .html.", show_default="only printed"),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Suite, by name or key, where merges were scored on several; only scores of one compare.")
    ] = None,
    filter_string: Annotated[
        str,
        typer.Option(
            "--filter", help="MLflow's filter of runs, for example \"params.merge_method = 'ota'\".", show_default=False
        ),
    ] = "",
    baseline: Annotated[
        str, typer.Option(help="Merge that the others are compared with, in pairs: a name, a run id, or best.")
    ] = "best",
    last: Annotated[int | None, typer.Option(help="Only so many newest merges.", show_default="all")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only merges started since: 2026-11-20, 36h, 7d.", show_default="always")
    ] = None,
    log: Annotated[
        bool,
        typer.Option(
            help="Log table, picture and page to the question's summary run in the experiment; the same question replaces them."
        ),
    ] = True,
    home: Home = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Rank the merges of an MLflow experiment: methods × capabilities, intervals, retention, negative transfer."""
    from tasks.experiments.leaderboard.log import log_leaderboard
    from tasks.experiments.leaderboard.question import Question
    from tasks.experiments.leaderboard.text import ranking, write_files
    from tasks.pages.terminal import table
    from tasks.settings import places
    from tasks.tracking.store import open_hint, resolve_store

    root = places(home).tracking
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    question = Question(experiment=experiment, suite=suite, filter=filter_string, baseline=baseline, last=last, since=since)
    board = question.answer(store)
    show(table(ranking(board, narrow=True)))
    if out is not None:
        for path in write_files(board, out):
            typer.echo(path)
    if log:
        logged = log_leaderboard(board, question.identity(), store)
        typer.echo(open_hint(tracking_uri=tracking_uri, root=root, experiment=logged.experiment_id, run=logged.run_id))
