"""Some of what ``make chaos`` does: commands die at the points where their output becomes visible, and the next run is as if they had not."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.facts import Facts, hidden, in_mlflow
from tests.chaos.points import Death
from tests.chaos.process import preload, run
from tests.chaos.scene import TRACKED, Scene
from tests.chaos.scenes import SCENES, world
from tests.chaos.served import code_of_child, in_child, merge_waits, next_run, search_waits
from tests.chaos.trial import Stage

FAST = ("merge over", "compress")
SYNCS = ("sync", "sync into a new database", "sync of a search")
# Where the output gets its name, and what comes just before and after it.
VISIBLE = ("take place", "exchange", "record")


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Every process that is to die has imported what any of them needs."""
    preload(TRACKED)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    root, kinds = tmp_path_factory.mktemp("chaos"), [SCENES[name] for name in FAST]
    with world(root, kinds):
        yield {kind.name: Stage.of(kind(root)) for kind in kinds}


@pytest.mark.parametrize("name", FAST)
def test_a_command_that_dies_where_its_output_becomes_visible_is_survived(stages: dict[str, Stage], name: str) -> None:
    tried = [stages[name].trial(moment) for moment in stages[name].named() if Death.parse(moment).name in VISIBLE]
    assert tried and all(trial.killed for trial in tried)
    assert [(trial.moment, trial.problems) for trial in tried if trial.problems] == []


def test_what_is_not_survived_is_seen(stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reference stands for an output with wrong bytes; what lies about, for a leftover."""
    stage = stages["compress"]
    lay = Scene.lay

    def littered(scene: Scene) -> None:
        lay(scene)
        (scene.folder / "half.tmp").touch()

    monkeypatch.setattr(Scene, "lay", littered)
    monkeypatch.setattr(stage.scene, "reference", dict.fromkeys(stage.scene.reference, "other") | {"more": "bytes"})
    trial = stage.trial("before exchange 1")
    assert trial.killed
    assert {problem.split()[0]: problem for problem in trial.problems}.keys() == {"out.safetensors", "more", "half.tmp"}


def sent(folder: Path, *moments: str) -> Facts:
    """What MLflow holds after ``ota sync`` was killed at each moment, and then was not."""
    home, log = folder / "home", folder / "said.log"
    words = ["sync", "--home", str(home)]
    for moment in moments:
        ended = run(words, folder, log, death=Death.parse(moment), modules=TRACKED)
        assert ended.killed, f"{moment} was not reached: {log.read_text()}"
        assert len(list((home / "unsent").iterdir())) == 1
    assert run(words, folder, log).code == 0, log.read_text()
    assert not list((home / "unsent").iterdir()) and not hidden(home)
    return in_mlflow(home / "tracking" / "mlflow.db")


def test_a_database_that_a_kill_left_half_made_stops_nobody(tmp_path: Path) -> None:
    in_child(merge_waits, str(tmp_path / "home"))
    found = sent(tmp_path, "before tables 3", "before exchange 1", "after exchange 1")
    assert found["version 1 of ota-merged: digest"] == "digest-one"


def test_a_search_that_is_killed_again_and_again_while_it_is_sent_is_there_once(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    in_child(search_waits, home)
    assert code_of_child(next_run, home, "after MLflow create_run 2") == -signal.SIGKILL, "of the search's second trial"
    # One after another: each gets a step further.
    moments = ("after MLflow log_batch 2", "after MLflow set_terminated 1", "after MLflow log_artifacts 1", "before unlink 1")
    found = {name: value for name, value in sent(tmp_path, *moments).items() if name.startswith(("run search", "run trial"))}
    runs = {"run search a search", "run trial trial 0", "run trial trial 1"}
    assert {name.partition(": ")[0] for name in found} == runs
    assert {name: found[f"{name}: so many"] + found[f"{name}: status"] for name in runs} == dict.fromkeys(runs, "1FINISHED")
    points = {name: number for name, number in found.items() if ": points of " in name}
    assert len(points) > 10 and set(points.values()) == {"1"}
    assert "run search a search: points of best/avg at 1" in points


def test_a_point_is_read_as_it_is_written() -> None:
    for text in ("before take place 2", "after S3 PutObject 1"):
        assert str(Death.parse(text)) == text
    for text in ("0.5", "sometimes rename 1", "before 1"):
        with pytest.raises(ValueError):
            Death.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["push", "push to a folder", "promote", "publish", "publish to a folder", "gc", *SYNCS])
def test_every_named_point_of_what_talks_to_s3_and_mlflow(name: str, tmp_path: Path) -> None:
    preload(sorted({module for kind in SCENES.values() for module in kind.preload}))
    with world(tmp_path, [SCENES[name]]):
        stage = Stage.of(SCENES[name](tmp_path))
        tried = [stage.trial(moment) for moment in stage.named()]
    assert tried and [(trial.moment, trial.problems) for trial in tried if trial.problems] == []
