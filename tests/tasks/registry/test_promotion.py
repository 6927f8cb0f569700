"""Moving the aliases of a real registry; and the line of champions as pure logic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from ota_core.errors import StorageError
from tasks.evaluation.gate import GateDecision, GateError
from tasks.pages.gate import to_markdown
from tasks.registry.history import Move, champions, history_tag, next_time
from tasks.registry.promotion import PromotionError, current, history, log_decision, logged_decision, promote, reject, rollback
from tests.servers import mlflow_server
from tests.tasks.registry.registry_fixture import NAME, Registry, a_decision, back, make, register, told, write_model
from tests.tasks.registry.registry_fixture import registry as registry
from tests.tasks.registry.registry_fixture import registry_template as registry_template

ROOT = Path(__file__).parents[3]


# ---- promotion


def test_a_promotion_moves_the_alias_and_leaves_a_trace(registry: Registry) -> None:
    assert registry.aliases == {"challenger": "3"}
    assert current("champion", root=registry.root) is None
    make(registry, "1")
    done = promote("3", by="nightly", reason="beats 1", decision=a_decision(), root=registry.root)
    assert (done.champion.version, done.replaced, done.moved) == ("3", "1", True)
    assert registry.aliases == {"champion": "3"}, "the champion is not its own challenger"
    tags = registry.tags("3")
    assert (tags["replaced_champion"], tags["promoted_by"], tags["promoted_reason"]) == ("1", "nightly", "beats 1")
    assert (tags["gate/decision"], tags["gate/reason"]) == ("champion", "The average is higher. Nothing falls.")
    assert json.loads(tags["gate/numbers"]) == a_decision().metrics()
    moves = history(root=registry.root)
    assert [(m.action, m.from_version, m.to, m.by, m.reason) for m in moves] == [
        ("promote", None, "1", "anna", "promote 1"),
        ("promote", "1", "3", "nightly", "beats 1"),
    ]
    assert moves[1].at == tags["promoted_at"] and moves[0].at < moves[1].at
    version = current("champion", root=registry.root)
    assert version == done.champion and version is not None, "what is returned is what is there"
    assert (version.digest, version.source_uri, version.name) == ("digest3", tags["source_uri"], NAME)
    assert version.run_id == registry.client.get_model_version(NAME, "3").run_id


def test_the_champion_again_changes_nothing(registry: Registry) -> None:
    make(registry, "1", "2")
    before = registry.tags("2"), told(registry)
    again = promote("2", by="other", reason="again", root=registry.root)
    assert (again.moved, again.replaced) == (False, "1")
    assert (registry.tags("2"), told(registry)) == before
    assert registry.aliases == {"champion": "2", "challenger": "3"}, "another challenger stays"


def test_what_cannot_become_champion(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(PromotionError, match="has no version 9; it has 1, 2, 3"):
        make(registry, "9")
    with pytest.raises(PromotionError, match="version 'v3' is no number"):
        make(registry, "v3")
    with pytest.raises(PromotionError, match=r"no registered model 'other'.*--name"):
        promote("1", by="anna", reason="", root=registry.root, name="other")
    with pytest.raises(GateError, match=r"kept 'ota' as challenger \(The average is higher"):
        promote("1", by="anna", reason="", decision=a_decision(promoted=False), root=registry.root)
    folder = write_model(tmp_path / "gone", "fp4")
    assert register(registry.root, str(folder), "digest4") == "4"
    (folder / "model.safetensors").unlink()
    with pytest.raises(PromotionError, match=r"weights are not complete at .*gone any more.*merge its recipe again"):
        make(registry, "4")
    assert registry.aliases == {"challenger": "4"} and told(registry) == []
    assert "promoted_at" not in registry.tags("4")


def test_a_store_that_is_away_is_one_clear_error() -> None:
    with pytest.raises(StorageError, match=r"failed while promoting version 1.*run the same again"):
        promote("1", by="anna", reason="", tracking_uri="http://127.0.0.1:9")


# ---- rejection


def test_a_rejected_version_is_the_challenger_with_its_reasons(registry: Registry) -> None:
    make(registry, "1")
    decision = a_decision(promoted=False, reasons=("code falls below the base.",))
    assert reject("2", decision, root=registry.root).version == "2"
    assert registry.aliases == {"champion": "1", "challenger": "2"}
    tags = registry.tags("2")
    assert (tags["gate/decision"], tags["gate/reason"]) == ("challenger", "code falls below the base.")
    assert reject("1", decision, root=registry.root).version == "1"
    assert registry.aliases == {"champion": "1", "challenger": "2"}, "a champion is no challenger"
    with pytest.raises(GateError, match="decided to promote"):
        reject("2", a_decision(), root=registry.root)
    # By hand, all the same; what the gate said stays to be read.
    make(registry, "2")
    assert registry.aliases == {"champion": "2"}
    assert (registry.tags("2")["gate/decision"], registry.tags("2")["promoted_by"]) == ("challenger", "anna")


def test_logging_a_merge_again_does_not_undo_a_decision(registry: Registry) -> None:
    """Registration was interrupted before it dealt with the alias; the version was promoted; the merge is logged again."""
    registry.client.delete_model_version_tag(NAME, "3", "announced")
    make(registry, "3")
    assert register(registry.root, registry.tags("3")["source_uri"], "digest3") == "3"
    assert registry.aliases == {"champion": "3"}


# ---- rollback


def test_rollback_walks_back_and_never_forth(registry: Registry) -> None:
    make(registry, "1", "2", "3")
    assert [back(registry), back(registry)] == ["2", "1"]
    with pytest.raises(PromotionError, match="version 1 of 'ota-merged' replaced no champion"):
        back(registry)
    assert registry.aliases["champion"] == "1"
    tags = registry.tags("3")
    assert (tags["rolled_back_by"], tags["rolled_back_reason"]) == ("ben", "worse")
    assert told(registry)[3:] == [("rollback", "3", "2"), ("rollback", "2", "1")]
    make(registry, "3")
    assert back(registry) == "1"


def test_a_version_promoted_twice_is_gone_back_through_twice(registry: Registry) -> None:
    make(registry, "1", "2", "1")
    assert [back(registry), back(registry)] == ["2", "1"]
    with pytest.raises(PromotionError, match="replaced no champion"):
        back(registry)


def test_rollback_to_an_earlier_champion(registry: Registry) -> None:
    make(registry, "1", "2", "3")
    with pytest.raises(PromotionError, match=r"version 7 was not champion before version 3 \(earlier champions: 2, 1\)"):
        back(registry, "7")
    assert back(registry, "1") == "1"
    assert rollback(by="ben", reason="again", to="1", root=registry.root).moved is False
    with pytest.raises(PromotionError, match="ota promote 2"):
        back(registry, "2")


def test_rollback_without_a_champion_or_to_lost_weights(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(PromotionError, match="no champion to roll back from"):
        back(registry)
    folder = write_model(tmp_path / "gone", "fp4")
    register(registry.root, str(folder), "digest4")
    make(registry, "4", "1")
    (folder / "record.json").unlink()
    with pytest.raises(PromotionError, match="version 4 of 'ota-merged' cannot become champion"):
        back(registry)
    assert registry.aliases["champion"] == "1"


def test_an_alias_moved_in_mlflow_itself_is_the_champion(registry: Registry) -> None:
    make(registry, "1")
    registry.client.set_registered_model_alias(NAME, "champion", "2")
    make(registry, "3")
    assert told(registry)[-1] == ("promote", "2", "3")
    assert [back(registry), back(registry)] == ["2", "1"]


# ---- the run of the candidate


def test_the_decision_is_logged_with_its_run_once(registry: Registry, tmp_path: Path) -> None:
    decision = a_decision()
    run_id = registry.client.get_model_version(NAME, "2").run_id
    for _ in range(2):
        log_decision(run_id, decision, root=registry.root)
    assert registry.client.get_run(run_id).data.metrics == decision.metrics()
    assert len(registry.client.get_metric_history(run_id, "gate/promoted")) == 1
    for name in ("gate.json", "gate.md"):
        registry.client.download_artifacts(run_id, name, str(tmp_path))
    assert GateDecision.model_validate_json((tmp_path / "gate.json").read_text()) == decision
    assert (tmp_path / "gate.md").read_text() == to_markdown(decision)


def test_the_decision_is_found_again_by_the_merge(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged_decision("fp1", "digest1", root=registry.root) is None
    run_id = registry.client.get_model_version(NAME, "1").run_id
    for key, value in {"recipe_fingerprint": "fp1", "model_digest": "digest1"}.items():
        registry.client.set_tag(run_id, key, value)
    assert logged_decision("fp1", "digest1", root=registry.root) is None

    def refused(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:  # a night that ends between the numbers and the file
        patch.setattr(MlflowClient, "log_text", refused)
        with pytest.raises(StorageError):
            log_decision(run_id, a_decision(), root=registry.root)
    assert logged_decision("fp1", "digest1", root=registry.root) is None
    log_decision(run_id, a_decision(), root=registry.root)
    assert logged_decision("fp1", "digest1", root=registry.root) == a_decision()
    assert logged_decision("fp1", "other", root=registry.root) is None
    registry.client.log_text(run_id, '{"of": "another version"}', "gate.json")
    assert logged_decision("fp1", "digest1", root=registry.root) is None


# ---- the line of champions


def move(action: str, before: str | None, to: str) -> Move:
    return Move.model_validate({"action": action, "from": before, "to": to, "by": "x", "reason": "", "at": "t"})


@given(st.lists(st.sampled_from("12345b"), max_size=30))
def test_the_line_is_what_undoing_gives(steps: list[str]) -> None:
    """Against a plain stack: promoting pushes, going back pops."""
    stack: list[str] = []
    moves = []
    for step in steps:
        top = stack[-1] if stack else None
        if step == "b":
            if len(stack) > 1:
                stack.pop()
                moves.append(move("rollback", top, stack[-1]))
        elif step != top:
            stack.append(step)
            moves.append(move("promote", top, step))
    assert champions(moves, stack[-1] if stack else None) == stack


def test_times_never_go_back_and_long_reasons_fit() -> None:
    ahead = "history/2999-01-01T00:00:00.000009Z"
    assert next_time({ahead: "{}", "other": ""}) == "2999-01-01T00:00:00.000010Z"
    long = move("promote", None, "1").model_copy(update={"reason": "ü" * 9000})
    key, value = history_tag(long)
    assert key == "history/t" and len(value) < 5000 and '"from":null' in value


# ---- a real server


@pytest.mark.slow
def test_promotion_on_a_server_by_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    program = (
        "import sys\nfrom tasks.registry.promotion import promote\n"
        "promote(sys.argv[2], by=sys.argv[2], reason='at once', tracking_uri=sys.argv[1])"
    )
    with mlflow_server(tmp_path) as url:
        for number in (1, 2, 3):
            folder = write_model(tmp_path / f"m{number}", f"fp{number}")
            register(tmp_path, str(folder), f"digest{number}", tracking_uri=url)
        where: dict[str, Any] = {"tracking_uri": url}
        promote("1", by="anna", reason="first", **where)
        both = [subprocess.Popen([sys.executable, "-c", program, url, number], cwd=ROOT) for number in ("2", "3")]
        assert [process.wait(120) for process in both] == [0, 0]
        champion = current("champion", **where)
        assert champion is not None and champion.version in {"2", "3"}
        moves = history(**where)
        assert {m.to for m in moves} == {"1", "2", "3"} and len(moves) == 3
        seen = [champion.version]
        while seen[-1] != "1":
            seen.append(rollback(by="ben", reason="back", **where).champion.version)
        assert len(seen) in {2, 3}
        with pytest.raises(PromotionError, match="replaced no champion"):
            rollback(by="ben", reason="back", **where)
        reject("3" if champion.version == "2" else "2", a_decision(promoted=False), **where)
        log_decision(str(champion.run_id), a_decision(), **where)
        assert MlflowClient(tracking_uri=url).get_run(str(champion.run_id)).data.metrics["gate/promoted"] == 1
