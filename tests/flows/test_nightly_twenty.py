"""A night over twenty capabilities: an expert each, one of which hurts; how many merges it makes, and what it says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.flows.merge_fixture import write_v
from tests.flows.nightly_fixture import LINEAR, OTA, Nights, Trained
from tests.flows.nightly_fixture import trained as trained
from tests.tiny_models import perturb
from tests.tiny_suite import FACTS, write_rows

pytestmark = pytest.mark.slow
NAMES = [f"skill{number:02d}" for number in range(20)]
HURTS = NAMES[7]


@pytest.fixture
def twenty(trained: Trained, tmp_path: Path) -> Nights:
    """Twenty capabilities of eight documents each; nineteen experts that know nothing new, and one whose edits are large noise."""
    tasks = tmp_path / "suite" / "many"
    tasks.mkdir(parents=True)
    for name in NAMES:
        (tasks / f"{name}.yaml").write_text(FACTS.replace("tiny_facts", name).replace("facts.jsonl", f"{name}.jsonl"))
        rows = [
            {"prompt": f"{name}: {i:02d} is ", "choices": ["ab", "cd", "ef", "gh"], "label": i % 4} for i in range(8)
        ]  # fmt: skip
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    capabilities = "".join(f"  {name}: {{tasks: [{{task: {name}, metric: acc}}]}}\n" for name in NAMES)
    (tmp_path / "suite" / "many.yaml").write_text(f"name: many\ninclude_path: many\ncapabilities:\n{capabilities}")
    nights = Nights(trained, name=f"twenty-{tmp_path.name}")
    for seed, name in enumerate(NAMES, start=1):
        expert = perturb(trained.models / "math", tmp_path / name, seed=seed, scale=1.0 if name == HURTS else 1e-4)
        write_v(expert, seed=seed)
        nights.push(expert, name)
    return nights


def test_a_night_over_twenty_capabilities(twenty: Nights, counts: Counter[str], tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "suite": str(tmp_path / "suite" / "many.yaml"),
        "data_dir": str(tmp_path / "data"),
        "leave_out": "each",
    }
    night = twenty.run(LINEAR, OTA, **given)
    assert night.state.is_completed(), night.state.message
    print(night.state.message, dict(counts))
    # Two candidates, the better one without each of the twenty; then at most without those whose absence gained, too.
    assert 22 <= counts["merge"] <= 2 + 2 * len(NAMES), counts
    assert counts["compress"] == len(NAMES), "once for both candidates"
    assert len(night.state.message) < 1000, "what a mail or a chat shows"
    page = night.artifacts["gate"].data
    assert len(page) < 60_000 and page.count("\n") < 400
    table = json.loads(night.artifacts["scores"].data)
    assert all(any(name in column for column in table[0]) for name in NAMES), "every capability has its column"
    assert twenty.run(LINEAR, OTA, **given).state.name == "NothingNew"
