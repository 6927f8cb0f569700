"""What no part of the program has foreseen ends in one message, with its traceback in a file."""

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from tests.flows.cli.typed import invoke


def breaks(*_: Any, **__: Any) -> None:
    raise LookupError("what nobody has foreseen\nand a second line")


@pytest.mark.parametrize("writable", [True, False])
def test_one_message_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    home = tmp_path / "home"
    if not writable:
        home.write_text("no folder")
    monkeypatch.setenv("OTA_HOME", str(home))
    monkeypatch.setattr("tasks.merging.stages.read_stages", breaks)
    (tmp_path / "r.yaml").write_text("merge_method: linear")
    done = invoke("plan", tmp_path / "r.yaml")
    assert done.exit_code == 2
    assert "Error: LookupError: what nobody has foreseen (this is a fault of the program" in done.stderr
    assert "Traceback" not in done.stderr and "second line" not in done.stderr
    log = Path(re.search(r"the details are in (\S+\.log)", done.stderr)[1])  # type: ignore[index]
    assert (log.parent == home / "logs") is writable
    assert "in breaks" in log.read_text() and "and a second line" in log.read_text()
    log.unlink()


def test_a_users_mistake_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    done = invoke("plan", tmp_path / "nowhere.yaml")
    assert done.exit_code == 2 and "fault of the program" not in done.stderr and not (tmp_path / "home").exists()


def test_a_reader_that_has_seen_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.merging.stages.read_stages", closed)
    (tmp_path / "r.yaml").write_text("merge_method: linear")
    done = invoke("plan", tmp_path / "r.yaml")
    assert done.exit_code == 1 and not done.stderr and not (tmp_path / "home").exists()
