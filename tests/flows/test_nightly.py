"""Nights in this process: what is taken, what is merged, who becomes champion, and what is told of it."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import tasks.log
from ota_core.errors import OtaError
from tasks.registry import promotion
from tasks.settings import places
from tasks.storage import models as storage
from tasks.tracking.outbox import kept, sync
from tasks.tracking.run import LoggedRun
from tests.flows.nightly_fixture import FIRST, LINEAR, OTA, SECOND, THIRD, WEAK, Night, Nights, broken_copy
from tests.flows.nightly_fixture import nights as nights
from tests.flows.nightly_fixture import trained as trained
from tests.servers import free_port, task_states

HUGE = {"name": "huge", "merge_method": "task_arithmetic", "parameters": {"lambda": 1e30}}
"""Weights so large that no number that comes out of them is finite."""
BROKEN = {"name": "broken", "merge_method": "linear", "tokenizer_source": "model:nobody"}
"""A recipe whose mistake shows only when the models are there."""


@pytest.fixture
def two(nights: Nights) -> Nights:
    """A first expert of each capability."""
    nights.push("math", "math")
    nights.push("knowledge", "knowledge")
    return nights


def promoted(nights: Nights, *candidates: dict[str, Any], **changes: Any) -> Night:
    night = nights.run(*candidates, **changes)
    assert (night.state.name, night.state.is_completed()) == ("Promoted", True), night.state.message
    return night


def expert(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])


def test_the_first_night_promotes_and_the_second_does_nothing(two: Nights, counts: Counter[str]) -> None:
    night = promoted(two)
    champion, challenger, latest, note = two.champion, two.challenger, two.latest, two.note
    assert champion and challenger and latest and note
    assert champion.tags["promoted_by"] == "nightly" and champion.tags["gate/decision"] == "champion"
    # Both know everything: of equals the first listed wins, and the other says why it did not.
    assert challenger.tags["method"] == "linear" and champion.tags["method"] == "ota"
    assert "It passes the gate, but so does ota rho=0.80" in challenger.tags["gate/reason"]
    assert (latest.version, latest.digest) == (champion.version, champion.digest)
    assert storage.exists(f"{latest.uri}/record.json") and latest.uri.startswith(f"{two.uri}/merged/{two.name}/")
    assert {key: expert(uri) for key, uri in note.experts.items()} == {"knowledge": f"knowledge/{FIRST}", "math": f"math/{FIRST}"}
    name, message = night.shown
    assert name == "Promoted" and message == note.outcome
    assert message.startswith("ota rho=0.80 is the new champion, the first one: average 100.0 %")
    assert re.fullmatch(r"nightly \d{4}-\d\d-\d\d \d\d:\d\d", night.name)
    assert counts["merge"] == 2 and counts["score"] == 5

    counts.clear()
    again = two.run()
    name, message = again.shown
    assert name == "NothingNew" and again.state.is_completed() and counts == {}
    assert f"math/{FIRST}" in message and f"knowledge/{FIRST}" in message and "nothing has arrived since" in message
    assert set(task_states(again.id)) == {f"look at {two.experts}", "point latest.json at the champion"} and again.artifacts == {}

    forced = two.run(force=True)
    assert forced.state.name == "Kept" and counts["merge"] == counts["score"] == 0
    assert "stays champion" in forced.state.message and two.champion == champion and two.latest == latest


def test_what_the_prefect_ui_shows(two: Nights) -> None:
    night = promoted(two)
    table, gate = night.artifacts["scores"], night.artifacts["gate"]
    rows = {row["model"]: row for row in json.loads(table.data)}
    assert set(rows) == {"base", "math", "knowledge", "ota rho=0.80", "linear"}
    assert rows["ota rho=0.80"]["average"].startswith("100.0") and float(rows["base"]["average"].partition(" ")[0]) < 50
    assert table.type == "table" and table.description.startswith("Tonight's candidates. Scores and retention")
    assert gate.type == "markdown" and "ota rho=0.80 is the new champion" in gate.description
    assert gate.data.startswith("# ota rho=0.80: promoted to champion") and "# linear: kept as challenger" in gate.data
    assert gate.data.index("# ota rho=0.80: promoted") < gate.data.index("# linear: kept") and "| math | base | 12 |" in gate.data
    assert "Left out" not in gate.data and "Failed" not in gate.data
    states = task_states(night.id)
    assert states[f"check math/{FIRST}"] == ["Completed"] and states["publish and promote ota rho=0.80"] == ["Completed"]
    assert states["log the gate's decision on linear"] == ["Completed"]


def test_broken_experts_are_left_out_by_name_and_the_one_before_them_stays(
    two: Nights, counts: Counter[str], tmp_path: Path
) -> None:
    promoted(two, LINEAR)
    reasons = {
        two.push(broken_copy(two.trained.models / "math", tmp_path / "nan"), "math", SECOND): "model.norm.weight",
        two.push("math", "math", THIRD, base_model="s3://other/base"): "trained from another base",
        two.push("math", "math", "2026-11-23"): "is not JSON",
    }
    storage.write_bytes(f"{list(reasons)[-1]}/expert.json", b"{")
    counts.clear()
    name, message = two.run(LINEAR).shown
    assert name == "NothingNew" and counts["merge"] == counts["score"] == 0
    kept, _, left_out = message.partition("left out: ")
    assert f"math/{FIRST}" in kept and "what has arrived since is left out" in kept
    for uri, reason in reasons.items():
        assert re.search(f"{expert(uri)}: [^;]*{reason}", left_out), left_out
    # The weights are not read again, but as long as the experts lie there they are told.
    counts.clear()
    name, message = two.run(LINEAR).shown
    assert name == "NothingNew" and "nothing has arrived since" in message and counts == {}
    assert message.partition("left out: ")[2] == left_out
    # In a night that merges, its page names them, too.
    two.push("knowledge", "knowledge", THIRD)
    night = two.run(LINEAR)
    assert night.state.name == "Kept", night.state.message
    assert "## Left out" in night.artifacts["gate"].data
    assert all(f"- **{expert(uri)}**: " in night.artifacts["gate"].data for uri in reasons)
    note = two.note
    assert note and expert(note.experts["math"]) == f"math/{FIRST}" and expert(note.experts["knowledge"]) == f"knowledge/{THIRD}"


def test_a_worse_expert_does_not_move_the_champion(two: Nights) -> None:
    promoted(two, LINEAR)
    before, latest = two.champion, two.latest
    two.push("poor", "math", SECOND)
    night = two.run(LINEAR)
    name, message = night.shown
    champion, challenger = two.champion, two.challenger
    assert name == "Kept" and before and challenger and champion
    assert message.startswith(f"version {before.version} stays champion; linear is the challenger: The average, ")
    assert "is not higher than the champion's, 100.0 %" in message
    assert (champion.version, two.latest) == (before.version, latest) and challenger.version != before.version
    assert challenger.tags["gate/decision"] == "challenger" and "is not higher" in challenger.tags["gate/reason"]
    # knowledge has no new expert: its old one was merged.
    note = two.note
    assert note and {key: expert(uri) for key, uri in note.experts.items()} == {
        "knowledge": f"knowledge/{FIRST}", "math": f"math/{SECOND}",
    }  # fmt: skip
    rows = [row["model"] for row in json.loads(night.artifacts["scores"].data)]
    assert rows == ["base", "knowledge", "math", "linear", f"champion v{before.version}"]


def test_a_better_candidate_takes_over_from_the_champion(two: Nights) -> None:
    promoted(two, WEAK)
    before = two.champion
    night = promoted(two, LINEAR)
    champion, latest = two.champion, two.latest
    assert before and champion and latest and champion.version != before.version == champion.tags["replaced_champion"]
    assert latest.version == champion.version
    assert night.state.message.startswith(f"linear is the new champion, in place of version {before.version}: average 100.0 %")


@pytest.mark.slow
def test_the_champions_page_keeps_the_gates_decision(two: Nights, tmp_path: Path) -> None:
    promoted(two, LINEAR)
    champion = two.champion
    assert champion and champion.run_id

    def pages() -> list[str]:
        assert champion and champion.run_id
        held = MlflowClient().download_artifacts(champion.run_id, "report.html", str(tmp_path))
        return [Path(held).read_text(), (storage.read_note(f"{champion.source_uri}/report.html") or b"").decode()]

    assert all("Promoted to champion" in page for page in pages())
    assert two.run(LINEAR, force=True).state.name == two.run(LINEAR, WEAK).state.name == "Kept"
    assert two.champion == champion and all("Promoted to champion" in page for page in pages())


def test_a_champion_that_was_scored_on_another_suite_is_scored_again(two: Nights, counts: Counter[str]) -> None:
    """Its weights lie where they were published: nothing of this machine is needed."""
    promoted(two, LINEAR)
    before = two.champion
    two.push("poor", "math", SECOND)
    counts.clear()
    night = two.run(LINEAR, limit=9)
    assert night.state.name == "Kept" and before and f"version {before.version} stays champion" in night.state.message
    assert counts["score"] == 5  # base, two experts, the candidate, the champion
    assert "| math | champion | 9 |" in night.artifacts["gate"].data.replace("**", "")  # bold, where it falls below


def test_a_candidate_that_fails_stops_no_other_and_nothing_is_remembered(two: Nights, counts: Counter[str]) -> None:
    night = two.run(BROKEN, LINEAR)
    name, message = night.shown
    assert name == "Failed" and night.state.is_failed()
    assert message.startswith("linear is the new champion") and "candidate broken failed: " in message and "nobody" in message
    assert "## Failed\n\n- **broken**: " in night.artifacts["gate"].data
    assert two.champion and two.latest and two.note is None
    counts.clear()
    mended = two.run(BROKEN | {"tokenizer_source": "base", "merge_method": "ties"}, LINEAR)
    assert mended.state.is_completed() and two.note, mended.state.message


def test_a_candidate_that_does_not_fit_what_was_found_is_a_failure_of_its_own(two: Nights) -> None:
    two.push("poor", "third")
    slerp = {"name": "slerp", "merge_method": "slerp", "parameters": {"t": 0.5}}
    name, message = two.run(slerp, LINEAR, OTA | {"name": "third"}).shown
    assert name == "Failed" and "candidate slerp failed: candidate 'slerp': slerp interpolates" in message
    assert "candidate third failed: candidate 'third': a row of the table" in message and two.note is None


def test_a_candidate_that_fails_the_smoke_test_is_refused_and_not_benchmarked(two: Nights, counts: Counter[str]) -> None:
    night = two.run(LINEAR, HUGE)
    name, message = night.shown
    assert name == "Promoted" and message.startswith("linear is the new champion"), message
    assert "; candidate huge is refused: The smoke test failed: finite: logits after " in message
    page = night.artifacts["gate"].data
    assert "## Refused before the benchmark\n\n- **huge**: The smoke test failed: finite: " in page
    assert {row["model"] for row in json.loads(night.artifacts["scores"].data)} == {"base", "math", "knowledge", "linear"}
    assert "one of several" not in page and two.note, "one candidate is left: nothing was chosen"
    assert two.run(LINEAR, HUGE).state.name == "NothingNew"

    counts.clear()
    only = two.run(HUGE)
    assert only.state.name == "Kept" and counts["score"] == 0
    assert only.state.message.startswith(
        f"version {two.champion.version if two.champion else 0} stays champion: no candidate passed"
    )
    runs = MlflowClient().search_runs(["1"], filter_string="tags.method = 'task_arithmetic' and metrics.`smoke/passed` = 0")
    assert any(run.data.tags["smoke"].startswith("The smoke test failed: finite") for run in runs)


def test_where_every_candidate_fails_each_cause_is_told(two: Nights) -> None:
    name, message = two.run(BROKEN, BROKEN | {"name": "too"}).shown
    assert name == "Failed" and "candidate 'broken' could not be merged" in message and "candidate 'too' could not be" in message
    assert two.champion is None and two.note is None


@pytest.mark.parametrize("step", ["merge", "judge", "settle"])
def test_a_night_that_fails_tells_what_was_left_out(
    two: Nights, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.nightly

    def failing(*_: Any) -> None:
        raise OtaError("the registry does not answer")

    two.push(broken_copy(two.trained.models / "math", tmp_path / "nan"), "math", SECOND)
    if step != "merge":
        monkeypatch.setattr(flows.nightly, step, failing)
    night = two.run(BROKEN if step == "merge" else LINEAR, capabilities=("math", "knowledge", "poetry"))
    name, message = night.shown
    cause, _, left_out = message.partition("; left out: ")
    assert name == "Failed" and ("candidate 'broken' could not be merged" if step == "merge" else "does not answer") in cause
    assert (
        f"math/{SECOND}: " in left_out and "model.norm.weight" in left_out and "poetry: no sound expert has arrived" in left_out
    )
    page = night.artifacts["left-out"].data
    assert f"- math/{SECOND}: " in page and "- poetry: no sound expert has arrived" in page and two.note is None


def test_an_interruption_after_the_promotion_is_finished_by_the_next_night(two: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.registry import verdict

    def interrupted(*_: Any) -> None:
        raise RuntimeError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(verdict, "point_latest", interrupted)
        night = two.run()
    assert night.state.is_failed() and "the machine went away" in night.state.message
    champion = two.champion
    assert champion and two.latest is None and two.note is None
    night = two.run()
    latest = two.latest
    assert night.state.name == "Kept" and "it is tonight's" not in night.state.message
    assert two.champion == champion and latest and latest.version == champion.version and two.note
    assert [(move.action, move.to) for move in promotion.history(name=two.name)] == [("promote", champion.version)]
    assert two.run().state.name == "NothingNew"


def test_a_night_without_mlflow_loses_nothing(two: Nights, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """What was merged and measured is found by the next one, which decides."""
    with monkeypatch.context() as patch:
        patch.setattr(tasks.log, "log", tasks.log.log.with_options(retries=0))
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        night = two.run(LINEAR)
    assert night.state.is_failed() and "kept in" in night.state.message and "ota sync" in night.state.message
    assert two.champion is None and two.note is None
    waiting = [one for one in kept(places().home).values() if one.what.name in night.state.message]
    assert len(waiting) == 1
    counts.clear()
    promoted(two, LINEAR)
    assert counts["merge"] == counts["score"] == 0, "the first night did it"
    where = places()
    for unsent, found in sync(where.home, where.tracking, os.environ["MLFLOW_TRACKING_URI"]):
        assert isinstance(found, LoggedRun), (unsent.what.name, found)
    champion = two.champion
    assert champion and [(move.action, move.to) for move in promotion.history(name=two.name)] == [("promote", champion.version)]


@pytest.mark.slow
def test_what_was_rolled_back_is_not_promoted_again_by_itself(two: Nights) -> None:
    promoted(two, WEAK)
    promoted(two, LINEAR)
    left = two.champion
    back = promotion.rollback(by="anna", reason="rude answers", name=two.name).champion
    assert two.run(LINEAR).state.name == "NothingNew"  # but what is published follows the hand
    assert two.latest and two.latest.version == back.version
    night = two.run(LINEAR, force=True)
    champion, challenger, latest = two.champion, two.challenger, two.latest
    assert night.state.name == "Kept" and champion and challenger and left and latest
    assert champion.version == back.version == latest.version and challenger.version == left.version
    assert challenger.tags["gate/reason"].startswith(f"It would pass, but version {left.version} was rolled back by anna on ")
    assert "(rude answers)" in night.state.message and f"ota promote {left.version}" in night.state.message
    # By hand it can be champion again, and stays it.
    promotion.promote(left.version, by="anna", reason="mended", name=two.name)
    night = two.run(LINEAR, force=True)
    assert night.state.name == "Kept" and two.champion and two.champion.version == left.version
    assert two.latest and two.latest.version == left.version


def test_without_any_expert_the_night_says_what_it_looked_for(nights: Nights) -> None:
    uri = nights.push("math", "math", base_model="s3://other/base")
    name, message = nights.run(capabilities=["math", "code"]).shown
    assert name == "NothingNew" and nights.note is None
    assert message.startswith(f"no complete, sound expert of math, code lies below {nights.experts}; left out: {expert(uri)}: ")
    nights.push("knowledge", "knowledge")
    assert nights.run(capabilities=["math", "code"]).state.name == "NothingNew"


@pytest.mark.slow
def test_other_capabilities_are_another_set(two: Nights) -> None:
    promoted(two, LINEAR)
    assert two.run(LINEAR, capabilities=["knowledge"]).state.name in {"Kept", "Promoted"}
    note = two.note
    assert note and list(note.experts) == ["knowledge"]


def test_one_configuration_from_a_file_and_the_end_in_words(two: Nights, tmp_path: Path) -> None:
    from flows.nightly import run_nightly

    file = tmp_path / "nightly.yaml"
    file.write_text(two.config(LINEAR).model_dump_json(exclude_none=True, by_alias=True))  # JSON is YAML
    assert run_nightly(str(file), force=False).startswith("Promoted: linear is the new champion")
    file.write_text(two.config(BROKEN, LINEAR).model_dump_json(exclude_none=True, by_alias=True))
    with pytest.raises(OtaError, match="candidate broken failed: "):
        run_nightly(str(file), force=False)
    with pytest.raises(OtaError, match="nowhere"):
        run_nightly(str(tmp_path / "nowhere.yaml"), force=False)
