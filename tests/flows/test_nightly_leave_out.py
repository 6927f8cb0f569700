"""A night that leaves out an expert which lowers the average beyond the noise, and keeps one that helps."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.experiments.preflight.features import MEASURES
from tasks.experiments.preflight.history import here
from tasks.tracking.experiment import read_experiment
from tasks.tracking.store import resolve_store
from tests.flows.merge_fixture import write_v
from tests.flows.nightly_fixture import LINEAR, Nights
from tests.flows.nightly_fixture import nights as nights
from tests.flows.nightly_fixture import trained as trained
from tests.tiny_models import perturb

TRY: dict[str, Any] = {"leave_out": "measured"}


@pytest.fixture
def three(nights: Nights, tmp_path: Path) -> Nights:
    """Two experts that know the suite by heart, and one whose edits are nothing but large noise."""
    nights.push("math", "math")
    nights.push("knowledge", "knowledge")
    noise = perturb(nights.trained.models / "base", tmp_path / "noise", seed=7, scale=1.0)
    write_v(noise, seed=7)
    nights.push(noise, "noise")
    return nights


def test_an_expert_that_hurts_is_left_out_and_the_others_stay(three: Nights, counts: Counter[str]) -> None:
    night = three.run(LINEAR, **TRY)
    champion = three.champion
    assert night.state.name == "Promoted" and champion, night.state.message
    assert night.state.message.startswith("linear without noise is the new champion")
    page = night.artifacts["gate"].data
    assert "## Will it merge? linear" in page and "noise hurts: it acts on the inputs of the others" in page
    assert "## linear without one expert" in page and re.search(r"\| \*\*noise\*\* \|.*\| yes \|", page)
    assert not re.search(r"\| \*?\*?(math|knowledge)\b.*\| yes \|", page)
    # The set is remembered with all of its experts: nothing has arrived, nothing is tried again.
    counts.clear()
    assert three.run(LINEAR, **TRY).state.name == "NothingNew" and counts["merge"] == 0
    again = three.run(LINEAR, force=True, **TRY)
    assert again.state.name == "Kept" and counts["merge"] == counts["score"] == 0 and three.champion == champion


def test_by_default_the_page_names_it_and_nothing_is_tried(three: Nights, counts: Counter[str]) -> None:
    night = three.run(LINEAR)
    page, tried = night.artifacts["gate"].data, [name for name in counts if name == "merge" and counts[name] > 1]
    assert (
        "noise hurts" in page and "without one expert" not in page and not tried and "linear without" not in night.state.message
    )


def test_experts_that_help_stay_whoever_is_tried(nights: Nights) -> None:
    nights.push("math", "math")
    nights.push("knowledge", "knowledge")
    nights.push("poor", "third")
    night = nights.run(LINEAR, leave_out="each")
    assert night.state.name == "Promoted" and night.state.message.startswith("linear is the new champion"), night.state.message
    page = night.artifacts["gate"].data.partition("## linear without one expert")[2]
    assert set(re.findall(r"^\| (math|knowledge|third) \|.*\| no \|$", page, re.MULTILINE)) == {"math", "knowledge", "third"}


def test_the_next_night_learns_from_this_one(nights: Nights) -> None:
    nights.push("math", "math")
    nights.push("knowledge", "knowledge")
    night = nights.run(LINEAR)
    assert night.state.name == "Promoted" and nights.champion
    assert "retention, came out %" in night.artifacts["gate"].data
    learned = [one for one in here(read_experiment(resolve_store())) if one.merge == nights.champion.run_id]
    assert {one.capability for one in learned} == {"tiny/math", "tiny/knowledge"}
    assert all(
        one.retention > 0.5 and one.experts == 2 and not one.refined and one.features.keys() == set(MEASURES) for one in learned
    )
