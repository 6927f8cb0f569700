"""A ``record.json`` that nobody wrote in earnest, beside an output that is whole: it is read, replaced and published as far as it says so, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from ota_core.errors import OtaError
from tasks.artifacts.store import ArtifactStore, record_at
from tasks.registry.publish import publish
from tasks.registry.retention.listing import list_root
from tests.flows.cli.test_fuzzed_inputs import Change, changed, changes, models
from tests.flows.cli.typed import invoke

__all__ = ["models"]


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a merge ``out`` and what it is made of, and an artifact of the same in a store."""
    root = tmp_path_factory.mktemp("records") / "models"
    shutil.copytree(models, root)
    done = invoke("merge", root / "ota.yaml", root / "out")
    assert done.exit_code == 0, done.output
    fingerprint = json.loads((root / "out" / "record.json").read_text())["fingerprint"]
    shutil.copytree(root / "out", root / "store" / "merged" / fingerprint)
    return root


def asked(*arguments: Any) -> tuple[int, str]:
    """A command's exit code and what it says, which is short and nothing that a terminal obeys."""
    done = invoke(*arguments)
    told = done.stdout + done.stderr
    assert done.exit_code in (0, 2) and isinstance(done.exception, SystemExit | None), (told, done.exception)
    assert "fault of the program" not in told and "Traceback" not in told and "hunter2" not in told, told
    assert not {char for char in told if (ord(char) < 32 and char != "\n") or ord(char) == 127}, ascii(told)
    assert done.exit_code == 0 or 0 < len(done.stderr) < 4096, done.stderr
    return done.exit_code, told


def check(world: Path, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(world.parent / "home"))
    (held_at,) = (world / "store" / "merged").iterdir()
    held = (held_at / "record.json").read_bytes()
    content = changed(held, change, is_card=False)
    (world / "out" / "record.json").write_bytes(content)
    weights = (world / "out" / "model.safetensors").read_bytes()
    code, told = asked("merge", world / "ota.yaml", world / "out")
    assert (code == 2 and "--overwrite" in told) or "record.json" in told, told
    asked("inspect", world / "out")
    code, _ = asked("merge", world / "ota.yaml", world / "out", "--overwrite")
    if code == 2:  # it is no output by its record, and so somebody's folder
        assert (world / "out" / "record.json").read_bytes() == content
    assert (world / "out" / "model.safetensors").read_bytes() == weights
    store, target = ArtifactStore(str(world / "store"), world / "cache"), world / "published"
    try:
        (held_at / "record.json").write_bytes(content)
        found, record = store.find("merged", held_at.name), record_at(str(held_at))
        assert found is None or record is not None
        (listed,) = list_root(str(world / "store"))
        assert (listed.record is not None) != listed.unreadable
        if record is not None:
            assert publish(str(held_at), root=str(target), name="m", version="1", cache=world / "cache") >= 1
            names = {
                path.relative_to(target / "m" / "1").as_posix() for path in (target / "m" / "1").rglob("*") if path.is_file()
            }
            assert names == {*record.files, "record.json"}
    except OtaError as error:
        assert 0 < len(str(error)) < 4096
    finally:
        (held_at / "record.json").write_bytes(held)
        shutil.rmtree(target, ignore_errors=True)


relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=relaxed)
@given(changes)
@example(("key", ("files", {})))
@example(("key", ("files", {"record.json": 5})))
@example(("key", ("files", {"README.md": 10**400})))
@example(("key", ("files", {"../x": 1})))
@example(("key", ("results", {"densities": 5})))
@example(("key", ("results", {"densities": {"a": {"density": "x", "kept": None, "total": []}}})))
@example(("key", ("config", {"\x1b[2J": "\x1b[31m"})))
@example(("key", ("inputs", {"\x1b[2J": "a\nb"})))
def test_records(world: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    check(world, change, monkeypatch)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=relaxed)
@given(changes)
def test_many_records(world: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    check(world, change, monkeypatch)
