"""What ``ota_core.files.place`` replaces, what it refuses to, and what crashes and several processes at once leave."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ota_core.errors import OtaError
from ota_core.files import place
from ota_core.files.place import check_file, check_free, made_of, new_file, new_folder, scratch_folder


def an_output(out: Path, content: str) -> None:
    out.mkdir()
    (out / content).write_text(content)
    (out / "record.json").write_text('{"kind": "merged", "fingerprint": "0", "files": {}}')


def write(out: Path, content: str, *, overwrite: bool) -> None:
    with new_folder(out, overwrite=overwrite) as folder:
        an_output(folder / "x", content)
        for path in (folder / "x").iterdir():
            path.rename(folder / path.name)
        (folder / "x").rmdir()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def hidden(folder: Path) -> set[str]:
    return {name for name in names(folder) if name.startswith(".")}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(KeyError), new_folder(out, overwrite=False) as folder:
        (folder / "half").write_text("half")
        raise KeyError
    assert names(out.parent) == set()
    write(out, "first", overwrite=False)
    assert names(out) == {"first", "record.json"} and hidden(out.parent) == set()


def test_only_outputs_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, "first", overwrite=False)
    with pytest.raises(OtaError, match="exists already; choose another output or pass --overwrite"):
        write(out, "second", overwrite=False)
    write(out, "second", overwrite=True)
    assert names(out) == {"second", "record.json"} and hidden(tmp_path) == set()
    (tmp_path / "linked").symlink_to(out)
    write(tmp_path / "linked", "third", overwrite=True)
    assert names(tmp_path / "linked") == {"third", "record.json"} and not (tmp_path / "linked").is_symlink()
    assert names(out) == {"second", "record.json"}, "what a link points to is not touched"


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not JSON", "[" * 100_000])
def test_other_folders_and_files_stay(tmp_path: Path, content: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    if content:
        (precious / "record.json").write_text(content)
    (tmp_path / "linked").symlink_to(precious)
    (tmp_path / "file").write_text("years")
    for out in (precious, tmp_path / "linked", tmp_path / "file"):
        with pytest.raises(OtaError, match=r"--overwrite does not replace it\. Remove it yourself"):
            write(out, "new", overwrite=True)
    assert (precious / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "years" and hidden(tmp_path) == set()


def test_outputs_without_a_record_are_known_by_their_files(tmp_path: Path) -> None:
    is_masks = made_of("densities.json", "*.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    (out / "math.safetensors").write_text("")
    assert not is_masks(out)
    (out / "densities.json").write_text("{}")
    assert is_masks(out)
    check_free(out, overwrite=True, is_output=is_masks)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OtaError, match="does not replace"):
        check_free(out, overwrite=True, is_output=is_masks)


def test_nothing_that_one_stands_on_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    an_output(out, "old")
    inside = out / "recipes"
    inside.mkdir()
    with pytest.raises(OtaError, match=r"is, or holds, .*r\.yaml; choose another output folder"):
        check_free(out, overwrite=True, keep=[inside / "r.yaml"])
    monkeypatch.chdir(inside)
    for path in (out, Path(), Path("..")):
        with pytest.raises(OtaError, match="is, or holds"):
            check_free(path, overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(inside))
    with pytest.raises(OtaError, match="is, or holds"):
        check_free(out, overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_free(out, overwrite=True)


def test_a_mounted_volume_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OtaError, match="/proc is where a volume is mounted, which cannot be replaced; choose a folder inside it"):
        check_free(Path("/proc"), overwrite=True)


def test_of_several_processes_the_first_to_finish_wins(tmp_path: Path) -> None:
    out, start, ended = tmp_path / "out", threading.Barrier(4), []

    def run(number: int) -> None:
        try:
            with new_folder(out, overwrite=False) as folder:
                (folder / str(number)).write_text(str(number))
                start.wait()
            ended.append(number)
        except OtaError as error:
            assert "was written by somebody else meanwhile" in str(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(ended) == 1 and names(out) == {str(ended[0])} and hidden(tmp_path) == set()


def test_a_running_writers_folder_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", overwrite=False) as running:
        (running / "half").write_text("half")
        os.utime(running, (0, 0))
        write(tmp_path / "out", "whole", overwrite=False)
        assert (running / "half").exists()
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "half").read_text() == "half"


KILLED = """
import os, sys
from pathlib import Path
from ota_core.files import place
from tests.ota_core.files.test_place import write
place._renameat2 = lambda *_: False
rename, at = os.rename, int(sys.argv[2])
calls = []
def dies(a, b):
    if Path(a).name.startswith(".out") or Path(a).name == "out":
        calls.append(a)
        if len(calls) == at: os._exit(9)
    rename(a, b)
    
os.rename = dies
write(Path(sys.argv[1]), "new", overwrite=True)
"""


@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path, at: int) -> None:
    """Where names cannot be exchanged: killed before the first renaming, and between the two."""
    out = tmp_path / "out"
    an_output(out, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(at)], cwd=Path(__file__).parents[3], check=False)
    assert killed.returncode == 9 and out.exists() is (at == 1)
    with pytest.raises(OtaError, match="exists already"), new_folder(out, overwrite=False):
        pass
    assert names(out) == {"old", "record.json"}
    write(out, "newer", overwrite=True)
    assert names(out) == {"newer", "record.json"} and hidden(tmp_path) == set()


def test_without_exchange_the_old_output_comes_back_when_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out", os.rename
    an_output(out, "old")

    def refuses(source: Path, target: Path) -> None:
        if Path(target) == out and Path(source).suffix == ".tmp":
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(place, "_renameat2", lambda *_: False)
    monkeypatch.setattr("ota_core.files.place.os.rename", refuses)
    with pytest.raises(PermissionError), new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(out) == {"old", "record.json"} and hidden(tmp_path) == set()


def moments_file(path: Path, format_key: str | None = "moments/1") -> None:
    save_file({"x": np.zeros(2, np.float32)}, path, {"ota_format": format_key} if format_key else None)


@pytest.mark.parametrize("exchange", [True, False])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(place, "_renameat2", lambda *_: False)
    out = tmp_path / "m.safetensors"
    make: Callable[[Path], None] = moments_file
    with new_file(out, overwrite=False) as file:
        make(file)
    with pytest.raises(OtaError, match="exists already"):
        check_file(out, overwrite=False)
    check_file(out, overwrite=True)
    with new_file(out, overwrite=True) as file:
        file.write_text("second")
    assert out.read_text() == "second" and hidden(tmp_path) == set()
    with pytest.raises(OtaError, match="no file of second moments"):
        check_file(out, overwrite=True)
    out.unlink()
    with pytest.raises(OtaError, match="written by somebody else"), new_file(out, overwrite=False) as file:
        file.write_text("late")
        out.write_text("early")
    assert out.read_text() == "early" and hidden(tmp_path) == set()
    with pytest.raises(OtaError, match="is a folder; name a file"):
        check_file(tmp_path, overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OtaError, match="no regular file"):
        check_file(tmp_path / "pipe", overwrite=True)


def test_what_a_killed_writer_of_a_file_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".m.safetensors.0123abcd.tmp"
    left.mkdir()
    (left / "m.safetensors").write_text("half")
    with new_file(tmp_path / "m.safetensors", overwrite=False) as file:
        file.write_text("whole")
    assert names(tmp_path) == {"m.safetensors"}


def test_what_a_killed_writer_left_is_removed_also_by_one_that_is_refused(tmp_path: Path) -> None:
    """It was killed between its output's appearing and its tidying up."""
    for out in (tmp_path / "out", tmp_path / "m.safetensors"):
        left = tmp_path / f".{out.name}.0123abcd.tmp"
        left.mkdir()
        (left / "half").write_text("half")
    an_output(tmp_path / "out", "whole")
    (tmp_path / "m.safetensors").write_text("whole")
    with pytest.raises(OtaError, match="exists already"):
        check_free(tmp_path / "out", overwrite=False)
    with pytest.raises(OtaError, match="exists already"):
        check_file(tmp_path / "m.safetensors", overwrite=False)
    assert names(tmp_path) == {"out", "m.safetensors"}


def test_what_a_living_process_has_put_aside_is_not_put_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.0123abcd.old"
    an_output(aside, "old")
    handle = os.open(aside, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    check_free(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {aside.name}
    os.close(handle)
    check_free(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}


def test_a_scratch_folder_goes_with_its_block_or_by_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".out.0123abcd.tmp"
    left.mkdir()
    with scratch_folder(tmp_path / "out") as one, scratch_folder(tmp_path / "out") as other:
        assert names(tmp_path) == {one.name, other.name}
    assert names(tmp_path) == set()
