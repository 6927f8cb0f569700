"""Two hundred merges in the queue of a stack with its two workers: all end, and nothing is computed twice."""

from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tests.flows.merge_fixture import write_v
from tests.flows.stack.live_stack import Live, made, stack_up, until
from tests.tiny_models import perturb, write_tiny_llama

pytestmark = pytest.mark.slow
BUCKET = "s3://ota-load"
RECIPES, TIMES = 10, 20
HOURS = 3
"""A run's process starts in seconds, of which most imports are; two hundred of them take a quarter of an hour on two idle cores."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with stack_up(tmp_path_factory.mktemp("load")) as live:
        s3.create_bucket(BUCKET)
        base = write_tiny_llama(live.folder / "base")
        upload_folder(base, f"{BUCKET}/base")
        for seed, name in enumerate(("math", "knowledge"), start=1):
            expert = perturb(base, live.folder / name, seed=seed)
            write_v(expert, seed=seed)
            write_expert_json(expert, capability=name, base_model=f"{BUCKET}/base", trained_at="2026-11-20")
            upload_folder(expert, f"{BUCKET}/experts/{name}", last=EXPERT_JSON)
        yield live


def recipe(number: int) -> dict[str, Any]:
    models = [{"model": f"{BUCKET}/experts/{name}"} for name in ("math", "knowledge")]
    parameters = {"density": (1 + number) / 20, "compression": "rank1"}
    return {"merge_method": "ota", "base_model": f"{BUCKET}/base", "models": models, "parameters": parameters}


def test_two_hundred_merges_compute_every_recipe_once(live: Live) -> None:
    queued = [
        live.start("merge/merge", recipe=recipe(number), suite=None, report="none", registered_model=None)
        for _ in range(TIMES)
        for number in range(RECIPES)
    ]
    ended = all_ended(live, queued)
    assert Counter(one.state_name for one in ended) == {"Completed": RECIPES * TIMES}
    stages = [below for run in queued for below in live.below(run)]
    counts = made([*ended, *stages])
    assert max(counts.values()) == 1, [what for what, times in counts.items() if times > 1]
    kinds = Counter(what.split()[0] for what in counts)
    assert kinds["merged"] == RECIPES and kinds["moments"] == 2, kinds
    took = max(one.end_time for one in ended) - min(one.start_time for one in ended)
    print(f"{len(queued)} merges in {took.total_seconds() / 60:.0f} min, {len(stages)} of them sent to the GPU worker")


def all_ended(live: Live, queued: list[UUID]) -> list[Any]:
    """The runs, once all have ended."""

    def ended() -> list[Any]:
        found = live.runs(queued)
        return found if all(one.state.is_final() for one in found) else []

    return until(ended, live, seconds=HOURS * 3600)  # type: ignore[no-any-return]
