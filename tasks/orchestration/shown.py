"""What a flow run shows in the Prefect UI besides its log: tables, pages, links to MLflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

if TYPE_CHECKING:  # a flow without a benchmark does not wait for what makes them
    import pandas as pd

    from tasks.pages.tables import Table


def _shown(key: str, create: Callable[..., Any], **what: Any) -> None:
    """Make an artifact of the run. A server that is away gets a line in the log: what is shown lies elsewhere, too, and must not end a run."""
    try:
        create(key=key, **what)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("'%s' cannot be shown on the run's page: %s", key, error or type(error).__name__)


def show_table(table: Table, key: str) -> None:
    """A table of the run, with its title and caption."""
    cells = table.cells()
    rows = [dict(zip(cells.header, row, strict=True)) for row in cells.rows]
    _shown(key, create_table_artifact, table=rows, description=" ".join([f"{table.title}.", *table.caption]))


def show_scores(table: pd.DataFrame, key: str = "scores", title: str = "Scores") -> None:
    """Base, experts and merges as a table of the run."""
    from tasks.pages.scores import scores

    show_table(scores(table, title), key)


def show_mlflow(name: str, url: str | None) -> None:
    """A link to the merge's run; nothing where no server shows it."""
    if url:
        _shown("mlflow-run", create_link_artifact, link=url, link_text=f"MLflow: {name}", description=f"MLflow run of {name}")


def show_markdown(key: str, text: str, title: str) -> None:
    """A page of the run."""
    _shown(key, create_markdown_artifact, markdown=text, description=title)
