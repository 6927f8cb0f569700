"""What a flow run shows in the Prefect UI besides its log: tables, pages, links to MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

if TYPE_CHECKING:  # a flow without a benchmark does not wait for what makes them
    import pandas as pd

    from tasks.pages.tables import Table


def show_table(table: Table, key: str) -> None:
    """A table of the run, with its title and caption."""
    cells = table.cells()
    create_table_artifact(
        table=[dict(zip(cells.header, row, strict=True)) for row in cells.rows],
        key=key,
        description=" ".join([f"{table.title}.", *table.caption]),
    )


def show_scores(table: pd.DataFrame, key: str = "scores", title: str = "Scores") -> None:
    """Base, experts and merges as a table of the run."""
    from tasks.pages.scores import scores

    show_table(scores(table, title), key)


def show_mlflow(name: str, url: str | None) -> None:
    """A link to the merge's run; nothing where no server shows it."""
    if url:
        create_link_artifact(link=url, link_text=f"MLflow: {name}", key="mlflow-run", description=f"MLflow run of {name}")


def show_markdown(key: str, text: str, title: str) -> None:
    """A page of the run."""
    made: Any = create_markdown_artifact(markdown=text, key=key, description=title)
    assert made
