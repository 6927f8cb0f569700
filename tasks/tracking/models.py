"""Model lineage in MLflow: base, experts and merge as models whose weights lie elsewhere, inputs and output of the merge's run.

A model is known by its digest: the runs of one experiment that use the same expert refer to the same model, whose page lists them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.tracking.registered import TAG_DIGEST, TAG_SOURCE
from tasks.tracking.store import NAME_LENGTH, TAG_LENGTH, artifact_errors, cut, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

INPUT, MERGE = "input", "merge"
"""MLflow's ``model_type``, by which its page of models can be searched."""


def external_model(
    client: MlflowClient, experiment: str, *, name: str, uri: str, digest: str, kind: str, run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The id of the experiment's model with this digest; made, by reference to ``uri``, when there is none.

    ``run_id``: the run that produced it. ``mlflow.create_external_model`` would use the process-wide tracking URI.
    """
    from mlflow.entities import LoggedModelStatus
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    found = _find(client, experiment, digest)
    if found is None:
        all_tags = {**(tags or {}), TAG_DIGEST: digest, TAG_SOURCE: cut(uri, TAG_LENGTH), MLFLOW_MODEL_IS_EXTERNAL: "true"}
        found = client.create_logged_model(
            experiment, name=_model_name(name), source_run_id=run_id, tags=all_tags, model_type=kind
        )  # fmt: skip
    if found.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:  # MLflow wants its description of a model also for one that lies elsewhere
            get_external_mlflow_model_spec(found).save(str(Path(folder) / "MLmodel"))
            what, safe = f"MLflow's description of the model {name!r}", f"The weights lie at {uri} as before."
            with artifact_errors(what, found.artifact_location, safe):
                client.log_model_artifacts(found.model_id, folder)
        client.finalize_logged_model(found.model_id, LoggedModelStatus.READY)
    return str(found.model_id)


def link(client: MlflowClient, run: Run, inputs: list[str], output: str | None = None) -> None:
    """Make the models inputs and output of the run, where they are not yet."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    known_inputs = {one.model_id for one in run.inputs.model_inputs} if run.inputs else set()
    known_outputs = {one.model_id for one in run.outputs.model_outputs} if run.outputs else set()
    new = [LoggedModelInput(one) for one in dict.fromkeys(inputs) if one not in known_inputs]
    if new:
        client.log_inputs(run.info.run_id, models=new)
    if output and output not in known_outputs:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(output, step=0)])


def note_version(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Let the model's page name the version of the registered model that it became.

    The tag is MLflow's own: ``mlflow.register_model`` sets it, which takes no model that lies elsewhere.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    held = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS) or "[]")
    noted = {"name": name, "version": version}
    if noted not in held:
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*held, noted])})


def _find(client: MlflowClient, experiment: str, digest: str) -> LoggedModel | None:
    found = client.search_logged_models([experiment], filter_string=quoted({TAG_DIGEST: digest}))
    return min(found, key=lambda one: (one.creation_timestamp, one.model_id), default=None)


def _model_name(name: str) -> str:
    """MLflow's names of models take no ``/ : . % \" '``."""
    return re.sub(r"[/:.%\"']", "-", name)[:NAME_LENGTH] or "model"
