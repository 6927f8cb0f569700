"""Temporaries of living processes stay, those of dead ones go at once, and who was taken for dead too early makes a new one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ota_core.artifact import write_text_atomic
from ota_core.held import held_folder, hold, is_abandoned, remove_abandoned

REPOSITORY = Path(__file__).parents[2]
HELD = """
import sys
from pathlib import Path
from ota_core.held import held_folder
with held_folder(lambda: Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_a_living_process_holds_stays_and_what_a_dead_one_held_goes(tmp_path: Path) -> None:
    folder = tmp_path / "x.tmp"
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(folder)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert not is_abandoned(folder) and not remove_abandoned(folder) and (folder / "half").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert is_abandoned(folder) and remove_abandoned(folder) and not folder.exists()
    assert not is_abandoned(folder) and not remove_abandoned(folder), "one that is gone is nobody's"


def test_one_that_was_taken_for_abandoned_before_it_was_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, opened, swept = iter([tmp_path / "first", tmp_path / "second"]), os.open, []

    def open_late(path: Path, *arguments: int) -> int:
        if not swept:
            swept.append(path)
            handle = opened(path, *arguments)
            path.rmdir()
            return handle
        return opened(path, *arguments)

    monkeypatch.setattr("ota_core.held.os.open", open_late)
    with held_folder(lambda: next(names)) as folder:
        assert folder == tmp_path / "second" and folder.is_dir() and not (tmp_path / "first").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "x.tmp").symlink_to(tmp_path / "precious")
    assert not remove_abandoned(tmp_path / "x.tmp") and (tmp_path / "precious").is_dir()


def test_what_killed_writers_of_texts_left_goes_and_what_others_left_stays(tmp_path: Path) -> None:
    left, held = tmp_path / ".note.json.12.0123abcd.tmp", tmp_path / ".other.json.13.0123abcd.tmp"
    for path in (left, held, tmp_path / ".mine.tmp", tmp_path / "note.json.12.0123abcd.tmp"):
        path.write_text("half")
    with open(held) as stream:
        assert hold(stream.fileno(), held)
        write_text_atomic(tmp_path / "note.json", "whole")
        assert (tmp_path / "note.json").read_text() == "whole"
        assert {path.name for path in tmp_path.iterdir()} == {"note.json", held.name, ".mine.tmp", "note.json.12.0123abcd.tmp"}


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ota_core.artifact.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(tmp_path / "note.json", "text")
    assert list(tmp_path.iterdir()) == []
