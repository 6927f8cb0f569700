"""The stages of the flow one after the other, without Prefect: ``python -m tasks.local.speed.staged RECIPE HOME DEVICE``.

Fetch, compress, mask and merge into a fresh store, by the functions that the flow's tasks call. Prints the seconds of each as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import load_recipe
from tasks import stages
from tasks.merging.inputs import fetch_all
from tasks.settings import places

T = TypeVar("T")


def main() -> None:
    recipe, where, device = load_recipe(Path(sys.argv[1])), places(sys.argv[2]), sys.argv[3]
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
        return result

    fetched = timed("fetch", lambda: fetch_all(recipe, cache=where.cache, recipe_dir=None))
    inputs = stages.inputs_of(recipe, fetched, where, None)
    experts = []
    for expert in inputs.experts:
        step = stages.moments_step(recipe, expert)
        ref = timed("compress", lambda step=step, expert=expert: stages.compress(where, step, expert))  # type: ignore[misc]
        experts.append(stages.with_compressed(where, expert, ref))
    ready = MergeInputs(base=inputs.base, experts=tuple(experts))
    masks = {}
    for i in range(len(experts)):
        step = stages.mask_step(recipe, inputs, i)
        masks[i] = timed("mask", lambda step=step, i=i: stages.mask(where, step, recipe, ready, i, device=device))  # type: ignore[misc]
    ready = stages.with_masks(where, ready, masks)
    timed("merge", lambda: stages.merge(where, stages.merge_step(recipe, inputs), recipe, ready, device=device))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
