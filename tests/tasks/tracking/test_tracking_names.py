"""Names that a person chose, with quotes and all: logged, and found again by the next run."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.errors import OtaError
from tasks.tracking.merge import log_merge
from tasks.tracking.registered import check_model_name
from tasks.tracking.store import resolve_store
from tests.tasks.tracking.made_up import a_merge


def test_a_name_with_quotes_is_logged_once(tmp_path: Path) -> None:
    name = 'o\'brien "x" `y`'
    run = a_merge(name)
    first = log_merge(run, root=tmp_path)
    again = log_merge(run, root=tmp_path)
    assert (again.run_id, again.model_version) == (first.run_id, first.model_version)
    client = MlflowClient(tracking_uri=resolve_store(root=tmp_path).uri)
    children = client.search_runs([first.experiment_id], f"tags.`mlflow.parentRunId` = '{first.run_id}'")
    assert sorted(one.info.run_name for one in children) == sorted(child.name for child in run.children)


@pytest.mark.parametrize("name", ["", "o'brien", "a/b", "a:b", "a\x1b", "x" * 300, 'a"b'])
def test_names_of_registered_models(name: str) -> None:
    with pytest.raises(OtaError, match="registered_model: got"):
        check_model_name(name)
    check_model_name("ota-merged")
