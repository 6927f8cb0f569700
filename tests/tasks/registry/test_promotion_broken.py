"""Moving the aliases of a real registry with a break injected at every call, and by two at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import tasks.registry.promotion as promotion
from ota_core.errors import StorageError
from tasks.registry.history import champions
from tasks.registry.promotion import Moved, history, promote, reject, rollback, rolled_back
from tests.tasks.registry.registry_fixture import Registry, a_decision, back, make, told
from tests.tasks.registry.registry_fixture import registry as registry
from tests.tasks.registry.registry_fixture import registry_template as registry_template


class Killed(BaseException):
    """As when the process ends: nobody catches it."""


class Breaking:
    """A client whose call number ``at`` breaks, before it reaches the store or after."""

    def __init__(self, client: MlflowClient, at: int, after: bool, kind: type[BaseException], calls: list[str]) -> None:
        self._client, self._at, self._after, self._kind, self._calls = client, at, after, kind, calls

    def __getattr__(self, name: str) -> Any:
        whole = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(name)
            if len(self._calls) == self._at:
                if self._after:
                    whole(*args, **kwargs)
                raise self._kind("the line went dead")
            return whole(*args, **kwargs)

        return call


@dataclass(frozen=True)
class Broken:
    """What one broken call left."""

    registry: Registry
    call: str
    kind: type[BaseException]
    raised: bool
    """Whether the caller saw it; an error in the trace of a move that stands is only a warning."""


Way = tuple[bool, type[BaseException]]
"""Whether a call breaks after it reached the store, and by what."""


# One pair sees what the other does, by the other cause.
@pytest.fixture(params=[
    ((False, ConnectionError), (True, Killed)), pytest.param(((False, Killed), (True, ConnectionError)), marks=pytest.mark.slow),
])  # fmt: skip
def ways(request: pytest.FixtureRequest) -> tuple[Way, Way]:
    found: tuple[Way, Way] = request.param
    return found


@pytest.fixture
def fresh(registry: Registry, tmp_path: Path) -> Callable[[], Registry]:
    """Copies of a registry in which version 1 was replaced by 2, and 3 is the challenger."""
    make(registry, "1", "2")
    content = (registry.root / "mlflow.db").read_bytes()
    made: list[Path] = []

    def copy() -> Registry:
        root = tmp_path / f"copy{len(made)}"
        root.mkdir()
        (root / "mlflow.db").write_bytes(content)
        made.append(root)
        return Registry(root)

    return copy


Interrupted = Callable[[Callable[[Registry], object]], Iterator[Broken]]
"""What is left when each of the calls that an action makes breaks, on either side of the store."""


@pytest.fixture
def interrupted(fresh: Callable[[], Registry], ways: tuple[Way, Way], monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    def everywhere(act: Callable[[Registry], object]) -> Iterator[Broken]:
        for after, kind in ways:
            for at in range(1, 100):
                one, calls, raised = fresh(), [], False
                with monkeypatch.context() as patch:
                    patch.setattr(promotion, "connect", lambda store: Breaking(one.client, at, after, kind, calls))  # noqa: B023
                    try:
                        act(one)
                    except (StorageError, Killed):
                        raised = True
                if len(calls) < at:
                    assert not raised and at > 4, "the loop has seen every call"
                    break
                yield Broken(one, calls[at - 1], kind, raised)

    return everywhere


def test_a_promotion_broken_anywhere_leaves_one_champion_and_is_finished(interrupted: Interrupted) -> None:
    def act(registry: Registry) -> Moved:
        return promote("3", by="nightly", reason="better", decision=a_decision(), root=registry.root)

    seen = set()
    for broken in interrupted(act):
        one, champion = broken.registry, broken.registry.aliases["champion"]
        seen.add((broken.call, champion, broken.raised))
        # What is told of the champion is true before anything is repaired.
        moves = history(root=one.root)
        assert champions(moves, champion) == ["1", "2", "3"][: int(champion)] and moves[-1].to == champion
        assert broken.raised or champion == "3"
        done = act(one)
        assert (done.champion.version, done.replaced) == ("3", "2")
        assert one.aliases == {"champion": "3"}
        assert told(one) == [("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "3")]
        tags = one.tags("3")
        assert (tags["replaced_champion"], tags["promoted_by"], tags["gate/decision"]) == ("2", "nightly", "champion")
        assert tags["promoted_at"] == history(root=one.root)[-1].at
    assert {("set_registered_model_alias", "2", True), ("set_registered_model_alias", "3", True)} <= seen
    assert {("set_registered_model_tag", "3", True), ("set_registered_model_tag", "3", False)} <= seen


def test_a_rollback_broken_anywhere_goes_back_once(interrupted: Interrupted) -> None:
    for broken in interrupted(back):
        one, complete = broken.registry, len(told(broken.registry)) == 3
        assert one.aliases["champion"] in {"1", "2"}
        # Only a kill after the last call of all is seen by the caller without anything left to do.
        assert not (broken.raised and complete) or (broken.kind, broken.call) == (Killed, "set_registered_model_tag")
        if broken.raised and not complete:
            assert back(one) == "1"
        if not broken.raised and not complete:
            assert history(root=one.root)[-1].action == "rollback"
            make(one, "1")  # the champion already: only the trace is completed
        assert one.aliases == {"champion": "1", "challenger": "3"}
        assert told(one) == [("promote", None, "1"), ("promote", "1", "2"), ("rollback", "2", "1")]
        assert one.tags("2")["rolled_back_by"] == "ben"


def test_a_rollback_that_was_never_noted_is_known_all_the_same(interrupted: Interrupted) -> None:
    """Else the next night would promote what was taken away."""
    for broken in interrupted(back):
        one = broken.registry
        moved = one.aliases["champion"] != "2"
        found = rolled_back("2", root=one.root)
        assert (found is not None and found.reason == "worse") == moved
        make(one, "2")  # by hand, again; or it is champion still
        assert rolled_back("2", root=one.root) is None


def test_another_move_after_a_broken_one_completes_its_trace(interrupted: Interrupted) -> None:
    """Whoever comes next, not only the one who was interrupted."""
    moved = 0
    for broken in interrupted(lambda one: make(one, "3")):
        one = broken.registry
        if one.aliases["champion"] == "3":
            moved += 1
            assert back(one) == "2"
            assert told(one)[2:] == [("promote", "2", "3"), ("rollback", "3", "2")]
            assert one.tags("3")["rolled_back_by"] == "ben"
    assert moved > 6


def test_a_rejection_broken_anywhere_is_finished(interrupted: Interrupted) -> None:
    decision = a_decision(promoted=False)
    for broken in interrupted(lambda one: reject("1", decision, root=one.root)):
        one = broken.registry
        assert one.aliases["champion"] == "2"
        reject("1", decision, root=one.root)
        assert one.aliases == {"champion": "2", "challenger": "1"}
        assert one.tags("1")["gate/decision"] == "challenger"


# ---- two at once


def test_two_that_promote_at_once_end_with_one_champion_and_both_told(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two machines nothing is locked: the second moves between the first one's look at the champion and its move."""
    make(registry, "1")
    monkeypatch.setattr(promotion, "locked", lambda store: nullcontext())
    for first, second in (("set_model_version_tag", "2"), ("set_registered_model_tag", "1")):
        client, inside = registry.client, []
        whole = getattr(client, first)

        def between(*args: Any, whole: Any = whole, second: str = second, inside: list[int] = inside) -> Any:
            if not inside:
                inside.append(1)
                with monkeypatch.context() as patch:
                    patch.setattr(promotion, "connect", lambda store: registry.client)
                    promote(second, by="second", reason="at once", root=registry.root)
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(client, first, between)
            patch.setattr(promotion, "connect", lambda store, client=client: client)
            promote("3", by="first", reason="at once", root=registry.root)
        champion = registry.aliases["champion"]
        assert champion in {"3", second} and inside
        moves = history(root=registry.root)[-2:]
        assert {(m.by, m.to) for m in moves} == {("first", "3"), ("second", second)}
        assert back(registry) != champion
        if registry.aliases["champion"] != "1":  # as the next round expects it
            rollback(by="ben", reason="clean", to="1", root=registry.root)
        assert registry.aliases["champion"] == "1"


def test_threads_take_turns(registry: Registry) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda v: make(registry, v), ["1", "2", "3"]))
    moves = told(registry)
    assert {to for _, _, to in moves} == {"1", "2", "3"}
    assert [before for _, before, _ in moves] == [None, *(to for _, _, to in moves[:-1])]
    assert registry.aliases["champion"] == moves[-1][2]
