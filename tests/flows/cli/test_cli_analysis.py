"""``ota analyse`` as a person types it, and the analysis as a task of a flow."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tasks.pages.analysis import read_tables
from tests.flows.cli.typed import invoke, ota, refused, said
from tests.flows.merge_fixture import World


def change(recipe: Path, **changes: Any) -> Path:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    return recipe


def test_analyse_writes_tables_and_says_what_it_found(recipe: Path) -> None:
    out = recipe.parent / "out"
    result = ota("analyse", recipe, out, "--compressions", "rank1", "--memory", "256MiB")
    assert sorted(path.name for path in out.iterdir()) == ["analysis.csv", "analysis.json", "analysis.parquet", "pictures.html"]
    table = read_tables(out)
    assert f"{out}: {len(table):,} numbers" in result.stdout
    for text in ("Where FFG keeps most", "Pairs of experts", "edits: sign conflict", "Compressions", "rank1"):
        assert text in result.stdout
    assert set(json.loads((out / "analysis.json").read_text())) == {"settings", "left_out", "notes"}

    assert "exists" in refused("analyse", recipe, out)
    assert invoke("analyse", recipe, out, "--overwrite", "--compressions", "-").exit_code == 0
    assert "compression" not in set(read_tables(out).analysis)


def test_it_says_what_it_leaves_out(recipe: Path) -> None:
    change(recipe, merge_method="linear", parameters={})
    for expert in ("expert0", "expert1"):
        (recipe.parent / expert / "exp_avg_sq.safetensors").unlink()
    result = ota("analyse", recipe, recipe.parent / "out", "--density", "0.2")
    assert "left out: everything of the curvature of" in result.stdout and "note: the merge masks nothing" in result.stdout
    table = read_tables(recipe.parent / "out")
    assert set(table.variant) == {"", "magnitude"}
    assert "holds no second moments" in refused("analyse", recipe, recipe.parent / "other", "--curvature", "require")
    assert not (recipe.parent / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "2"], "density: got 2.0"),
        (["--compressions", "zip"], "compressions: got 'zip'"),
        (["--curvature", "maybe"], "curvature: got 'maybe'"),
        (["--memory", "1MiB"], "expected at least 64MiB"),
    ],
    ids=str,
)
def test_mistakes_end_with_a_message_and_no_folder(recipe: Path, arguments: list[str], message: str) -> None:
    assert message in refused("analyse", recipe, recipe.parent / "out", *arguments)
    assert not (recipe.parent / "out").exists()


def test_broken_inputs_and_their_own_folder_are_refused(recipe: Path) -> None:
    assert "--overwrite does not replace it" in refused("analyse", recipe, recipe.parent / "expert0", "--overwrite")
    assert f"is, or holds, {recipe}" in refused("analyse", recipe, recipe.parent, "--overwrite")
    (recipe.parent / "expert1" / "model.safetensors").write_bytes(b"no weights")
    assert "expert1" in refused("analyse", recipe, recipe.parent / "out") and not (recipe.parent / "out").exists()
    assert [path for path in recipe.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_experts_in_s3_are_read_where_they_are(world: World, tmp_path: Path) -> None:
    """Also of a merge that needs no second moments: those that lie beside the experts."""
    for method in ("ota", "linear"):
        path = tmp_path / f"{method}.yaml"
        path.write_text(world.recipe(method).to_yaml())
        ota("analyse", path, tmp_path / method, "--home", tmp_path / "home", "--compressions", "rank1")
    pd.testing.assert_frame_equal(read_tables(tmp_path / "ota"), read_tables(tmp_path / "linear"))


def test_the_task_is_cached_by_what_it_makes(world: World) -> None:
    from prefect import flow

    from tasks.analyse import analyse_job, analysis_options
    from tasks.job import run_jobs
    from tasks.merging.inputs import fetch_all
    from tasks.merging.sources import planned
    from tasks.orchestration.executors import Here
    from tasks.pages.analysis import read_analysis
    from tasks.settings import places
    from tests.servers import task_states

    where = places(world.home / "analysis")

    @flow
    def run(power: float) -> Any:
        recipe = world.recipe(density=0.4, power=power)
        fetched = fetch_all(recipe, cache=where.cache, recipe_dir=None)
        job = analyse_job(planned(recipe, fetched, where, memory="256MiB"), analysis_options(compressions="-"))
        return run_jobs([job], where, Here())[0]

    runs = [run(power, return_state=True) for power in (0.5, 0.25)]
    refs = [one.result() for one in runs]
    assert refs[0] == refs[1] and set(read_analysis(where, refs[0]).expert) == {"math", "knowledge"}
    states = [task_states(one.state_details.flow_run_id) for one in runs]
    assert states == [{"analyse ota": ["Completed"]}, {"analyse ota": ["Cached"]}]


def test_preflight_says_what_it_measures_and_that_it_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts)
    told = said("preflight", recipe)
    assert "Pairs of experts" in told and "λ as the row spaces say" in told and "expert0" in told
    found = json.loads(said("preflight", recipe, "--json"))
    assert {one["name"] for one in found["experts"]} == {"expert0", "expert1"} and found["scale"] > 0
    assert found["pairs"][0].keys() >= {"row_space", "interference", "sign_conflict", "cosine_sqrt_v", "mask_jaccard"}
    assert (found["average"] is None) == bool(found["why_not"]) and found["in_scores"] is False
    assert sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts) == before


def test_preflight_without_a_base_says_what_is_missing(recipe: Path) -> None:
    raw = yaml.safe_load(recipe.read_text()) | {"merge_method": "linear", "parameters": {}}
    del raw["base_model"]
    recipe.write_text(yaml.safe_dump(raw))
    assert "base_model is missing" in refused("preflight", recipe)
