"""An output whose files are gone or damaged is computed again, alone."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ota_core.artifact import RECORD, read_record
from ota_core.recipe.recipe import MergeRecipe
from tests.flows.merge_fixture import RUN, World

NAME = "ota math+knowledge rho=0.40 rank1"


@pytest.fixture(scope="module")
def done(world: World) -> World:
    """A home where one run is complete. Every test leaves it complete."""
    assert world.run(recipe(world)).state.is_completed()
    return world


def recipe(world: World) -> MergeRecipe:
    return world.recipe(density=0.4, compression="rank1")


def whole(folder: Path) -> None:
    shutil.rmtree(folder)


def record(folder: Path) -> None:
    (folder / RECORD).unlink()


def torn_record(folder: Path) -> None:
    path = folder / RECORD
    path.write_bytes(path.read_bytes()[:-20])


def one_file(folder: Path) -> None:
    largest(folder).unlink()


def truncated(folder: Path) -> None:
    path = largest(folder)
    os.truncate(path, path.stat().st_size - 1)


def largest(folder: Path) -> Path:
    return max((path for path in folder.iterdir() if path.name != RECORD), key=lambda path: path.stat().st_size)


def digests(folder: Path) -> dict[str, str]:
    """Content of every file but the record, which also holds the time."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != RECORD}


TASKS = {
    "moments": ("compress math", "compress"),
    "masks": ("mask math", "mask"),
    "merged": (f"merge {NAME.replace('math+knowledge ', '')}", "merge"),
    "scores": ("benchmark math", "score"),
}


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("moments", whole), ("masks", whole), ("merged", whole), ("scores", whole), ("moments", truncated), ("masks", record),
        ("merged", one_file), ("merged", truncated), ("scores", torn_record),
    ],
)  # fmt: skip
def test_a_damaged_artifact_is_computed_again_alone(
    done: World, counts: Counter[str], kind: str, damage: Callable[[Path], None]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done.home / "artifacts").rglob("*") if path.is_file()}
    folder = next(path for path in (done.home / "artifacts" / kind).iterdir() if kind == "merged" or of_math(path))
    files = digests(folder)
    damage(folder)
    task, call = TASKS[kind]
    run = done.run(recipe(done))
    assert run.computed() == [task] and counts == {call: 1}
    assert {state for name, states in run.states.items() if name not in {task, f"log {NAME}"} for state in states} == {"Cached"}
    read_record(folder)  # raises unless complete
    if kind != "scores":  # those hold the seconds that they took
        assert digests(folder) == files
    touched = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched == {path for path in before if path.is_relative_to(folder)}
    assert not [path.name for path in (done.home / "artifacts").rglob("*") if path.name.endswith((".tmp", ".trash"))]


def of_math(folder: Path) -> bool:
    """Whether an artifact was made from the expert for math."""
    provenance = read_record(folder).provenance
    return "math" in {provenance.get("expert"), provenance.get("model")}


def fetched_folder(world: World) -> Path:
    """The cache's copy of the expert for math."""
    want = hashlib.sha256((world.models / "math" / "model.safetensors").read_bytes()).hexdigest()
    folders = (world.home / "cache" / "checkpoints").iterdir()
    return next(f for f in folders if hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() == want)


@pytest.mark.parametrize("damage", ["folder", "weights", "truncated", "expert.json"])
def test_a_damaged_copy_of_an_expert_is_fetched_again_alone(done: World, counts: Counter[str], damage: str) -> None:
    folder = fetched_folder(done)
    files = digests(folder)
    if damage == "folder":
        shutil.rmtree(folder)
    elif damage == "truncated":
        os.truncate(folder / "model.safetensors", 100)  # of the blob as well: they are links of one file
    else:
        (folder / ("model.safetensors" if damage == "weights" else "expert.json")).unlink()
    run = done.run(recipe(done))
    task = f"fetch {done.uri}/experts/math/{RUN}"
    assert run.states.pop(task) == ["Cached", "Completed"]  # Prefect remembers the folder; the flow sees that it is damaged
    assert run.computed() == [] and counts == {"fetch": 1}
    assert digests(folder) == files


def test_everything_gone_but_the_sources(done: World, counts: Counter[str]) -> None:
    shutil.rmtree(done.home / "artifacts")
    shutil.rmtree(done.home / "cache")
    done.run(recipe(done)).outcome  # noqa: B018 - raises where the flow failed
    assert counts == {"fetch": 3, "compress": 2, "mask": 2, "merge": 1, "score": 4}


def test_without_prefects_memory_the_artifacts_are_found(done: World, counts: Counter[str]) -> None:
    """Prefect's cache only saves looking: the artifacts alone decide what is computed."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

    shutil.rmtree(PREFECT_LOCAL_STORAGE_PATH.value())
    run = done.run(recipe(done))
    assert all(states == ["Completed"] for states in run.states.values())
    assert set(counts) == {"fetch"}  # which looks, and finds everything in its cache
