"""Disks without room: said before the first byte, and where one becomes full in the middle nothing new is visible and the old stays."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ota_core.engine import engine, output
from ota_core.errors import StorageError
from ota_core.files import room
from ota_core.files.room import Need, check_room, full_disk
from ota_core.recipe.recipe import MergeRecipe
from tests.ota_core.engine.test_output import llama_experts

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB: an output of ``recipe`` and its successor beside it fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def recipe(tmp_path: Path) -> MergeRecipe:
    """Weights of 7 MiB."""
    (tmp_path / "models").mkdir()
    return MergeRecipe.model_validate(llama_experts(tmp_path / "models", hidden=256, layers=3))


def fill(folder: Path, left: int) -> None:
    """Take all but so many bytes of a disk."""
    with open(folder / "other", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, room.shutil.disk_usage(folder).free - left)


def test_what_is_needed_is_compared_with_what_is_free(tmp_path: Path) -> None:
    free = room.shutil.disk_usage(tmp_path).free
    check_room([Need(tmp_path / "not" / "there", 1, "this"), Need(tmp_path, 0, "nothing")])
    with pytest.raises(StorageError) as seen:
        check_room([Need(tmp_path / "a" / "out", free, "the merged weights"), Need(tmp_path, 10 * MIB * 1024, "log8")])
    text = str(seen.value)
    assert f"{tmp_path}/a/out: {free:,} bytes" in text and "log8" in text and "make room or choose another place" in text


def test_only_a_full_disk_is_called_full(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk(tmp_path):
        raise PermissionError(13, "denied")
    with pytest.raises(StorageError, match="became full while it was written"), full_disk(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_no_room_is_said_before_the_first_byte(small_disk: Path, recipe: MergeRecipe) -> None:
    engine.merge(recipe, small_disk / "out")
    before = {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()}
    size = sum(map(len, before.values()))
    fill(small_disk, size // 2)
    with pytest.raises(StorageError, match=r"no room on the disk of .*disk/\.?out.*the merged weights.*bytes.* are free") as seen:
        engine.merge(recipe, small_disk / "out", overwrite=True)
    assert "needed" in str(seen.value)
    assert {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()} == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "out"]


def test_a_disk_that_becomes_full_leaves_the_old_output(
    small_disk: Path, recipe: MergeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the room once it was found."""
    engine.merge(recipe, small_disk / "out")
    before = {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()}
    real = engine.write_weights

    def later(*arguments: object) -> None:
        fill(small_disk, MIB)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(output, "ASIDE", 0)
    monkeypatch.setattr(engine, "write_weights", later)
    with pytest.raises(StorageError, match=r"the disk of .*disk/out became full.*what was there before stays"):
        engine.merge(recipe, small_disk / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()} == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "out"]
    (small_disk / "other").unlink()
    with pytest.raises(StorageError, match="became full"):
        engine.merge(recipe, small_disk / "new")
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "out"]
