"""Names, cuts and addresses: what MLflow accepts, and where its store is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from ota_core.errors import StorageError
from tasks.tracking.store import connect, cut, embedded, mlflow_name, mlflow_names, open_hint, quoted, resolve_store


@pytest.fixture(autouse=True)
def _no_store_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("score/precise_if", "score/precise_if"),
        ("gsm8k/exact_match,strict-match", "gsm8k/exact_match.strict-match"),
        ("pass@1", "pass.1"),
        ("/a//b/", "a/b"),
        ("../a", "a"),
        ("müsli", "m.sli"),
        ("", "_"),
    ],
)
def test_names(name: str, accepted: str) -> None:
    assert mlflow_name(name) == accepted


@given(st.text(max_size=400))
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(mlflow_name(name))
    _validate_param_name(mlflow_name(name))
    assert len(mlflow_name(name)) <= 250


@given(st.sets(st.text(alphabet="ab,;/.@", max_size=8)))
def test_no_two_names_become_one(names: set[str]) -> None:
    assert len(set(mlflow_names(names).values())) == len(names)


def test_long_values_are_cut_with_a_note() -> None:
    assert cut("x" * 6000, 6000) == "x" * 6000
    short = cut("x" * 6001, 6000)
    assert len(short) == 6000 and "6001 characters" in short
    assert cut("x" * 6001, 6000) != cut("x" * 6000 + "y", 6000)  # told apart, though their beginnings agree


def test_the_store_is_the_argument_then_the_environment_then_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="MLFLOW_TRACKING_URI"):
        resolve_store()
    local = resolve_store(root=tmp_path)
    assert (local.uri, local.artifacts) == (f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_store(root=tmp_path) == resolve_store(tracking_uri="", root=tmp_path) == local, "empty is not set"
    with pytest.raises(StorageError, match="MLFLOW_TRACKING_URI"):
        resolve_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_store(root=tmp_path).uri == "http://tracking:5000"
    assert resolve_store(tracking_uri="http://other", root=tmp_path).uri == "http://other"


def test_hints_say_where_to_open_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = open_hint(root=tmp_path, experiment="1", run="abc")
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in hint
    assert "http://127.0.0.1:5000/#/experiments/1/runs/abc" in hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking/")
    assert open_hint(experiment="7") == "MLflow: https://tracking/#/experiments/7/runs?viewStateShareKey=ota"


def test_filters_quote_or_refuse() -> None:
    assert quoted({"mlflow.parentRunId": "a", "b": "c d"}) == "tags.`mlflow.parentRunId` = 'a' and tags.`b` = 'c d'"
    with pytest.raises(ValueError, match="quote"):
        quoted({"a": "it's"})


def test_a_database_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match=r"database .*/file/tracking/mlflow\.db could not be made: .*OTA_HOME.*MLFLOW_TRACKING_URI"
    ):
        connect(embedded(tmp_path / "file" / "tracking"))
