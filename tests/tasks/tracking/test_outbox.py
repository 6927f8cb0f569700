"""MLflow away, stalled, or the process killed in between: what was to be logged waits in the home folder and is sent once, by whoever comes next."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.errors import StorageError
from tasks.tracking import outbox, patience
from tasks.tracking.outbox import FOLDER, kept, sync, tell
from tests.servers import free_port, wait_until
from tests.tasks.tracking.made_up import a_merge

REPOSITORY = Path(__file__).parents[3]


def runs(tracking: Path) -> list[tuple[str, str]]:
    """Name and status of every run of a merge."""
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    experiment = client.get_experiment_by_name("ota-merging")
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], filter_string="tags.`recipe_fingerprint` LIKE '%'")
    return sorted((run.info.run_name, run.info.status) for run in found)


def waiting(home: Path) -> list[str]:
    return [one.what.name for one in kept(home).values()]


def test_what_is_logged_leaves_nothing(tracking: Path) -> None:
    home = tracking.parent
    logged = tell(a_merge("one"), home=home, root=tracking)
    assert logged.model_version == "1" and waiting(home) == [] and runs(tracking) == [("one", "FINISHED")]


def test_a_server_that_is_away_gets_it_later(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tracking.parent
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"merged model lies at s3://models/merged/one.*kept in .*unsent.*ota sync") as seen:
        tell(a_merge("one"), home=home, root=tracking)
    assert time.monotonic() - began < 60
    (path,) = (home / FOLDER).iterdir()
    assert "secret" not in path.read_text() and "secret" not in str(seen.value)
    assert waiting(home) == ["one"]
    (found,) = sync(home, tracking, f"sqlite:///{tracking}/mlflow.db")
    assert not isinstance(found[1], Exception)
    assert waiting(home) == [] and runs(tracking) == [("one", "FINISHED")]
    assert list(sync(home, tracking)) == []


def test_the_next_run_sends_what_waits_and_again_changes_nothing(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tracking.parent
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "log_merge", _away)
        for name in ("one", "two"):
            with pytest.raises(StorageError):
                tell(a_merge(name), home=home, root=tracking)
    assert waiting(home) == ["one", "two"]
    texts = [path.read_text() for path in kept(home)]
    tell(a_merge("three"), home=home, root=tracking)
    assert waiting(home) == []
    there = runs(tracking)
    assert there == [("one", "FINISHED"), ("three", "FINISHED"), ("two", "FINISHED")]
    for i, text in enumerate(texts):
        (home / FOLDER / f"again-{i}.json").write_text(text)
    assert all(not isinstance(found, Exception) for _, found in sync(home, tracking))
    assert runs(tracking) == there, "sent twice, logged once"


def _away(*_: object, **__: object) -> None:
    raise StorageError("MLflow is away")


def test_one_that_waits_of_the_same_merge_is_sent_first(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer state of a merge must not be overwritten by the older."""
    home = tracking.parent
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "log_merge", _away)
        with pytest.raises(StorageError):
            tell(a_merge("one", model_card="# Old\n"), home=home, root=tracking)
    logged = tell(a_merge("one", model_card="# New\n"), home=home, root=tracking)
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    card = Path(client.download_artifacts(logged.run_id, "README.md", str(tracking))).read_text()
    assert card == "# New\n" and waiting(home) == []


def test_what_cannot_be_read_stays_and_stops_nobody(tracking: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tracking.parent
    (home / FOLDER).mkdir()
    (home / FOLDER / "other.json").write_text('{"store": null, "what": {"kind": "rocket"}}')
    tell(a_merge("one"), home=home, root=tracking)
    assert (home / FOLDER / "other.json").is_file() and "other.json" in caplog.text


def test_a_server_that_stalls_is_given_up_in_a_stated_time(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers."""
    monkeypatch.setattr(outbox, "LOGGING_SECONDS", 2.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"did not end within 2 s; the server stalls.*kept in"):
            tell(
                a_merge("one"), home=tracking.parent, root=tracking, tracking_uri=f"http://127.0.0.1:{listener.getsockname()[1]}"
            )
        assert time.monotonic() - began < 20
    assert waiting(tracking.parent) == ["one"]
    assert patience.LOGGING_SECONDS <= 300


KILLED = """
import os, sys, time
from pathlib import Path
import tasks.tracking.merge as merge
from tasks.tracking.outbox import tell
from tests.tasks.tracking.made_up import a_merge

def stop(*_, **__):
    Path(sys.argv[2]).touch()
    time.sleep(600)

setattr(merge, sys.argv[3], stop)
home = Path(sys.argv[1])
tell(a_merge("one"), home=home, root=home / "tracking")
"""


@pytest.mark.parametrize("place", ["log_values", "_log_artifacts", "_log_child", "register_version"])
def test_killed_in_the_middle_the_next_run_completes_it(tracking: Path, tmp_path: Path, place: str) -> None:
    home, reached = tracking.parent, tmp_path / "reached"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(home), str(reached), place], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."}
    )
    wait_until(lambda: reached.exists() or process.poll() is not None, seconds=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert waiting(home) == ["one"] and runs(tracking) == [("one", "RUNNING")]
    tell(a_merge("two"), home=home, root=tracking)
    assert waiting(home) == [] and runs(tracking) == [("one", "FINISHED"), ("two", "FINISHED")]
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    versions = client.search_model_versions("name='ota-merged'")
    assert len(versions) == 2 and len({one.tags["model_digest"] for one in versions}) == 2
    (one,) = client.search_runs(["1"], filter_string="tags.`recipe_fingerprint` = 'fp-one'")
    children = client.search_runs(["1"], filter_string=f"tags.`mlflow.parentRunId` = '{one.info.run_id}'")
    assert len(children) == 4 and {child.info.status for child in children} == {"FINISHED"}
