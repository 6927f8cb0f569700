"""What a flow run shows in the Prefect UI besides its log: tables of scores, links to MLflow, the gate's decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.evaluation.scores import caption, text_rows

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd


def show_scores(table: pd.DataFrame, key: str = "scores", title: str = "Scores") -> None:
    """Base, experts and merges as a table of the run."""
    header, rows = text_rows(table)
    create_table_artifact(
        table=[dict(zip(header, cells, strict=True)) for cells in rows], key=key, description=f"{title}. {caption(table)}"
    )


def show_mlflow(name: str, url: str | None) -> None:
    """A link to the merge's run; nothing where no server shows it."""
    if url:
        create_link_artifact(link=url, link_text=f"MLflow: {name}", key="mlflow-run", description=f"MLflow run of {name}")


def show_markdown(key: str, text: str, title: str) -> None:
    """A page of the run."""
    made: Any = create_markdown_artifact(markdown=text, key=key, description=title)
    assert made
