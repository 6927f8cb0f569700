"""Trials of a scene: the command is killed, what is there is looked at, the command is run again to its end and compared with one that was not killed."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.chaos.points import Death
from tests.chaos.process import Ended, run
from tests.chaos.scene import Scene

When = Literal["before", "after"]
SAID = 4000


@dataclass(frozen=True)
class Trial:
    """One kill of one command."""

    scene: str
    moment: str
    """A fraction of the command's time, or a named point: what ``--at`` takes."""
    killed: bool
    """False: it ended before its moment came."""
    problems: tuple[str, ...] = ()


@dataclass
class Stage:
    """A scene whose command was run to its end: how long it takes, which points it passes."""

    scene: Scene
    seconds: float
    points: Counter[str]

    @classmethod
    def of(cls, scene: Scene) -> "Stage":
        """Run the command twice; what these runs differ in is not compared, but must be there."""
        scene.lay()
        _whole(scene, run(scene.words, scene.folder, _log(scene), env=scene.env))
        scene.reference = scene.facts()
        if left := scene.left():
            raise AssertionError(f"{scene.name} leaves {left} behind without a kill")
        calls = scene.folder.with_name("calls")
        calls.write_text("")
        scene.lay()
        ended = _whole(scene, run(scene.words, scene.folder, _log(scene), env=scene.env, calls=calls, modules=scene.preload))
        second = scene.facts()
        scene.volatile = {name for name in second if second[name] != scene.reference.get(name, second[name])}
        scene.reference = {name: value for name, value in scene.reference.items() if name in second}
        assert not any(name.endswith(".safetensors") for name in scene.volatile), scene.volatile
        return cls(scene, ended.seconds, Counter(calls.read_text().splitlines()))

    def random(self, seed: int) -> Iterator[str]:
        """Moments anywhere in the command's time."""
        numbers = random.Random(f"{seed} {self.scene.name}")
        while True:
            yield f"{numbers.random():.4f}"

    def named(self, most: int = 3, beginning: Sequence[str] = ("",)) -> Iterator[str]:
        """Before and after at most so many calls of every point whose name begins so: the last one, and the first ones."""
        for name, count in sorted(self.points.items()):
            if not name.startswith(tuple(beginning)):
                continue
            for nth in sorted({*range(1, min(count, most - 1) + 1), count}):
                for when in ("before", "after"):
                    yield f"{when} {name} {nth}"

    def trial(self, moment: str) -> Trial:
        """Kill the command then, and see."""
        scene = self.scene
        scene.lay()
        _log(scene).unlink(missing_ok=True)
        first = self._killed(moment)
        problems = [f"its child lives on: {one}" for one in first.left]
        if not first.killed and first.code != 0:
            problems.append(f"it ended by itself with {first.code}: {_said(scene)}")
        problems += scene.half()
        _log(scene).rename(_log(scene).with_suffix(".first"))
        second = run(scene.words, scene.folder, _log(scene), env=scene.env)
        said = _said(scene)
        if not scene.is_done(second.code, said):
            problems.append(f"the second run ended with {second.code}: {said}")
        problems += scene.differs()
        problems += [f"{name} is left behind" for name in scene.left()]
        return Trial(scene.name, moment, first.killed, tuple(problems))

    def _killed(self, moment: str) -> Ended:
        scene = self.scene
        try:
            after, death = self.seconds * float(moment), None
        except ValueError:
            after, death = None, Death.parse(moment)
        return run(scene.words, scene.folder, _log(scene), env=scene.env, after=after, death=death, modules=scene.preload)


def _log(scene: Scene) -> Path:
    return scene.folder.with_name("said.log")


def _said(scene: Scene) -> str:
    return _log(scene).read_text(errors="replace")[-SAID:].strip()


def _whole(scene: Scene, ended: Ended) -> Ended:
    if ended.code != 0:
        raise AssertionError(f"{scene.name} without a kill ended with {ended.code}: {_said(scene)}")
    return ended


def keep(scene: Scene, number: int) -> Path:
    """A copy of what a trial left, to be looked at."""
    place = scene.folder.with_name(f"failed-{number}")
    shutil.copytree(scene.folder, place, symlinks=True, dirs_exist_ok=True)
    for name in ("said.log", "said.first"):
        if (scene.folder.with_name(name)).is_file():
            shutil.copy(scene.folder.with_name(name), place.with_name(f"failed-{number}.{name}"))
    return place
