"""The stages of the flow one after the other, without Prefect: ``python -m tasks.local.speed.staged RECIPE HOME DEVICE``.

Fetch, compress, mask and merge into a fresh store, by the jobs that the flow runs. Prints the seconds of each as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ota_core.recipe.recipe import load_recipe
from tasks.compress import compress_jobs
from tasks.mask import mask_jobs
from tasks.merge import merge_job
from tasks.merging.inputs import fetch_all
from tasks.merging.sources import planned
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
    plan = planned(recipe, fetched, where)
    plan = plan.with_artifacts([timed("compress", partial(job.run, where)) for job in compress_jobs(plan)])
    plan = plan.with_artifacts(masks={i: timed("mask", partial(job.run, where, device)) for i, job in mask_jobs(plan).items()})
    timed("merge", partial(merge_job(plan).run, where, device))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
