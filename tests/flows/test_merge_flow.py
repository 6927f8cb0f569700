"""scratch"""
import time
from collections import Counter

from tests.flows.merge_fixture import World


def test_scratch(world: World, counts: Counter[str]) -> None:
    recipe = world.recipe(density=0.4, compression="rank1")
    for i in range(3):
        t = time.monotonic()
        run = world.run(recipe)
        t1 = time.monotonic()
        print(run.state, run.states, counts, t1 - t, time.monotonic() - t1)
        counts.clear()
    print(run.outcome)
