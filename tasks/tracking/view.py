"""The columns of MLflow's table of runs. No public interface sets them; a test watches that MLflow's pages still know these names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW = "ota"
"""Name of the experiment's view whose columns are the scores."""
VIEW_TAG = "mlflow.sharedViewState"
"""Tag of an experiment, followed by a view's name, that holds the state of the view as JSON."""
VIEW_KEY = "viewStateShareKey"
"""Parameter of a page's address that names the view."""


def show_columns(client: MlflowClient, experiment: str, metrics: Iterable[str]) -> None:
    """Add these metrics to the columns of the experiment's shared view, which ``page_url`` opens.

    MLflow's table of runs shows no metric unless asked; a shared view is a tag of the experiment that holds the UI's state.
    """
    tag = f"{VIEW_TAG}.{VIEW}"
    held = client.get_experiment(experiment).tags.get(tag)
    old = json.loads(held)["selectedColumns"] if held else []
    new = [f"metrics.`{name}`" for name in metrics if f"metrics.`{name}`" not in old]
    columns = ["params.`merge_method`", *new] if not held else [*old, *new]
    if new:
        client.set_experiment_tag(experiment, tag, json.dumps({"selectedColumns": columns}))
