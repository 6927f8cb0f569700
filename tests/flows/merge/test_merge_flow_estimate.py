"""A merge whose second moments are estimated by tasks of their own: once, also for a recipe that differs in how it merges."""

from pathlib import Path

from ota_core.artifact import read_record
from tests.flows.merge_fixture import EXPERTS, World


def test_second_moments_are_estimated_once_by_tasks_of_their_own(world: World, tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    how = {"data": str(world.suite), "data_dir": str(world.data), "samples": 8, "batch": 2, "points": 2, "replace": True}
    recipe = here.recipe(density=0.4, missing_curvature="estimate", estimate=how)
    first = here.run(recipe, suite=None)
    estimated = {f"estimate {name}" for name in EXPERTS}
    assert estimated <= set(first.computed())
    record = read_record(Path(first.outcome.path))
    assert {name: said["points"] for name, said in record.results["estimated"].items()} == dict.fromkeys(EXPERTS, 2)
    # The texts are each expert's own capability's.
    assert len({said["texts"] for said in record.results["estimated"].values()}) == 1
    assert record.inputs["moments0"] != record.inputs["moments1"]
    card = (Path(first.outcome.path) / "README.md").read_text()
    assert (
        "- math: estimated: the mean squared gradient over 8 documents" in card
        and "at 2 points from the base to the expert" in card
    )
    second = here.run(here.recipe(density=0.2, missing_curvature="estimate", estimate=how), suite=None)
    assert not estimated & set(second.computed()) and estimated <= set(second.states)
