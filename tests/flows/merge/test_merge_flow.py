"""The flow's stages and what is cached between runs, by the states of the task runs and by counting calls."""

import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ota_core.artifact import RECORD, read_record
from ota_core.engine import engine
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.store import ArtifactStore
from tasks.merging.inputs import assemble, fetch_all
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tests.flows.merge_fixture import EXPERTS, RUN, World, write_v
from tests.servers import flow_run_name
from tests.tiny_models import perturb

NAME = "ota math+knowledge rho=0.40 rank1"
LABEL = "ota rho=0.40 rank1"
STAGES = {"compress math", "compress knowledge", "mask math", "mask knowledge", f"merge {LABEL}"}
SCORED = {"benchmark base", "benchmark math", "benchmark knowledge"}


def ota(world: World, **parameters: Any) -> MergeRecipe:
    return world.recipe(**{"density": 0.4, "compression": "rank1"} | parameters)


def fetches(world: World) -> set[str]:
    return {f"fetch {world.uri}/models/base", *(f"fetch {world.uri}/experts/{name}/{RUN}" for name in EXPERTS)}


def test_first_run_computes_all_and_the_second_nothing(world: World, counts: Counter[str], tmp_path: Path) -> None:
    recipe = ota(world)
    here = world.at(tmp_path / "home")
    first = here.run(recipe, report="full")
    outcome = first.outcome
    expected = fetches(world) | STAGES | SCORED | {"analyse ota", "preflight ota", f"benchmark {LABEL}", f"log {NAME}"}
    assert first.states == {name: ["Completed"] for name in expected}
    assert counts == {"fetch": 3, "compress": 2, "mask": 2, "merge": 1, "score": 4}
    assert (outcome.name, flow_run_name(first.id)) == (LABEL, NAME)
    assert set(outcome.scores) == {"base", "expert/math", "expert/knowledge", "merged"}
    root = here.home / "artifacts"
    assert Counter(path.parent.name for path in root.glob("*/*")) == {
        "moments": 2,
        "masks": 2,
        "merged": 1,
        "scores": 4,
        "analysis": 2,
    }
    for folder in root.glob("*/*"):
        record = read_record(folder)  # raises unless it lists the files that are there
        assert (record.kind, record.fingerprint) == (folder.parent.name, folder.name)
        assert record.inputs and record.results and record.provenance["seconds"] >= 0

    counts.clear()
    again = here.run(recipe, report="full")
    assert again.states == {name: ["Cached"] for name in expected} | {f"log {NAME}": ["Completed"]}
    assert counts == {}
    assert again.outcome == outcome  # the same artifacts, the same MLflow run, no second version of the model

    # The same in other words is the same merge.
    spelled = world.recipe(density=0.4, rank1_approx=True, power=0.5, **{"lambda": 1.0})
    assert here.run(spelled).computed() == [] and counts == {}


def test_the_staged_flow_writes_the_bytes_of_the_fused_merge(world: World, tmp_path: Path) -> None:
    for parameters in ({"compression": "rank1"}, {"scope": "per_tensor", "bias_correction": True, "lambda": 1.5}):
        recipe = ota(world, **{"compression": "none"} | parameters)
        outcome = world.run(recipe, suite=None).outcome
        cache = tmp_path / "cache"
        inputs = assemble(recipe, fetch_all(recipe, cache=cache, recipe_dir=None), cache=cache, recipe_dir=None)
        fused = tmp_path / f"fused-{len(parameters)}"
        report = engine.merge(recipe, fused, inputs=inputs)
        staged = Path(outcome.path)
        names = sorted(path.name for path in fused.iterdir())
        assert names == sorted(path.name for path in staged.iterdir())
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", RECORD} <= set(names)
        for name in names:
            assert name == RECORD or (fused / name).read_bytes() == (staged / name).read_bytes(), name
        ours, theirs = read_record(staged), read_record(fused)
        assert (ours.fingerprint, ours.config, ours.inputs, ours.files) == (
            report.fingerprint,
            theirs.config,
            theirs.inputs,
            theirs.files,
        )
        assert ours.results["densities"] == theirs.results["densities"]


def test_the_size_of_weight_files_is_part_of_the_merge_also_where_one_file_holds_it(world: World, tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    merges = [here.run(ota(world), suite=None, **size).outcome.merged for size in ({}, {"shard_size": "4GB"})]
    assert merges[0].fingerprint != merges[1].fingerprint
    first, second = (Path(merge.uri) / "model.safetensors" for merge in merges)
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def done(world: World) -> World:
    """A home where one recipe's run is complete. Its tests leave it complete."""
    home = world.at(world.home.with_name("done"))
    assert home.run(ota(world)).state.is_completed()
    return home


def test_another_density_keeps_what_does_not_depend_on_it(done: World, counts: Counter[str]) -> None:
    run = done.run(ota(done, density=0.2))
    assert set(run.computed()) == {"mask math", "mask knowledge", "merge ota rho=0.20 rank1", "benchmark ota rho=0.20 rank1"}
    assert counts == {"mask": 2, "merge": 1, "score": 1}
    for expert, density in run.outcome.densities.items():
        assert density == pytest.approx(0.2, abs=1e-3), expert


def test_another_density_of_one_expert_keeps_the_other_mask(done: World, counts: Counter[str]) -> None:
    models = ota(done).models
    one = replace_model(ota(done), 0, models[0].parameters.model_copy(update={"density": 0.1}))
    run = done.run(one, suite=None)
    assert set(run.computed()) == {"mask math", "merge ota rho=0.10/0.40 rank1"} and counts == {"mask": 1, "merge": 1}


def replace_model(recipe: MergeRecipe, index: int, parameters: Any) -> MergeRecipe:
    models = list(recipe.models)
    models[index] = models[index].model_copy(update={"parameters": parameters})
    return recipe.model_copy(update={"models": tuple(models)})


def test_an_option_of_the_merge_alone_keeps_moments_and_masks(done: World, counts: Counter[str]) -> None:
    run = done.run(ota(done, **{"lambda": 1.5, "epsilon": 1e-26}), suite=None)
    assert run.computed() == [f"merge {LABEL} lambda=1.5 epsilon=1e-26"] and counts == {"merge": 1}


def test_another_compression_is_computed_anew(done: World, counts: Counter[str]) -> None:
    assert set(done.run(ota(done, compression="none"), suite=None).computed()) == STAGES - {f"merge {LABEL}"} | {
        "merge ota rho=0.40"
    }


def test_another_limit_scores_every_model_again(done: World, counts: Counter[str]) -> None:
    run = done.run(ota(done), limit=3)
    assert set(run.computed()) == SCORED | {f"benchmark {LABEL}"} and counts == {"score": 4}


def test_two_homes_do_not_share_results(done: World, counts: Counter[str], tmp_path: Path) -> None:
    """Prefect's cache is one for all; a reference into one root of artifacts must not reach a run with another."""
    other = done.at(tmp_path / "other")
    there = other.run(ota(done), suite=None).outcome
    assert Path(there.path).is_relative_to(tmp_path) and counts["merge"] == 1
    counts.clear()
    here = done.run(ota(done), suite=None)
    assert here.computed() == [] and counts == {}
    assert Path(here.outcome.path).is_relative_to(done.home)


def test_an_expert_replaced_under_its_prefix_is_noticed(world: World, counts: Counter[str], tmp_path: Path) -> None:
    uri = f"{world.uri}/replaced/math/{RUN}"
    upload_folder(world.models / "math", uri, last=EXPERT_JSON)
    recipe = ota(world)
    recipe = recipe.model_copy(update={"models": (recipe.models[0].model_copy(update={"model": uri}), recipe.models[1])})
    here = world.at(tmp_path / "home")
    before = here.run(recipe, suite=None).outcome

    newer = perturb(world.models / "base", tmp_path / "newer", seed=77)
    write_v(newer, seed=77)
    write_expert_json(newer, capability="math", base_model="base", trained_at=RUN, step=100, beta2=0.999, optimizer="adamw")
    for path in newer.iterdir():
        assert path.stat().st_size == (world.models / "math" / path.name).stat().st_size, "the test wants equal sizes"
    upload_folder(newer, uri, last=EXPERT_JSON)
    counts.clear()
    run = here.run(recipe, suite=None)
    assert set(run.computed()) == {f"fetch {uri}", "compress math", "mask math", f"merge {LABEL}"}
    assert counts == {"fetch": 1, "compress": 1, "mask": 1, "merge": 1}
    after = run.outcome
    assert after.merged.fingerprint != before.merged.fingerprint
    with (
        safe_open(Path(before.path) / "model.safetensors", "pt") as a,
        safe_open(Path(after.path) / "model.safetensors", "pt") as b,
    ):
        assert any(not torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118 - no mapping


def test_two_flows_at_once_compute_each_artifact_once(world: World, counts: Counter[str], tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    runs: dict[int, Any] = {}
    start = threading.Barrier(2)

    def go(i: int) -> None:
        start.wait()
        runs[i] = here.run(ota(world))

    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = runs[0].outcome, runs[1].outcome
    assert (first.merged, first.scores, first.logged) == (second.merged, second.scores, second.logged)
    counts.pop("fetch")  # both may look; the bytes are loaded once (tests of the storage)
    assert counts == {"compress": 2, "mask": 2, "merge": 1, "score": 4}


def test_parameters_survive_the_server(world: World) -> None:
    """Prefect keeps a flow run's parameters as JSON, and a deployment's run starts from them."""
    from prefect.client.orchestration import get_client

    from flows.merge import merge_flow

    recipe = ota(world, **{"lambda": 1.5, "epsilon": 1e-26, "normalise": "global"})
    recipe = replace_model(
        recipe,
        1,
        recipe.models[1].parameters.model_copy(update={"density": 1e-3, "preconditioner_path": "exp_avg_sq.safetensors"}),
    )
    run = world.run(recipe, suite=None)
    with get_client(sync_client=True) as client:
        kept = client.read_flow_run(run.id).parameters
    started = merge_flow.validate_parameters(json.loads(json.dumps(kept)))
    assert started["recipe"] == recipe and started["recipe"].effective() == recipe.effective()
    assert MergeRecipe.model_validate(kept["recipe"]).to_yaml() == recipe.to_yaml()
    assert started["home"] == world.home and started["suite"] is None
    assert flow_run_name(run.id) == "ota math+knowledge rho=0.40/0.001 rank1 lambda=1.5 epsilon=1e-26 normalise=global"


def test_artifacts_in_s3(world: World, counts: Counter[str], tmp_path: Path) -> None:
    recipe, root = ota(world), f"{world.uri}/artifacts"
    here = world.at(tmp_path / "home")
    first = here.run(recipe, artifacts=root)
    merged = first.outcome.merged
    assert merged.uri == f"{root}/merged/{merged.fingerprint}" and not (here.home / "artifacts").exists()
    assert counts == {"fetch": 3, "compress": 2, "mask": 2, "merge": 1, "score": 4}
    local = world.run(recipe, suite=None).outcome
    for path in Path(local.path).iterdir():
        assert path.name == RECORD or path.read_bytes() == (Path(first.outcome.path) / path.name).read_bytes()

    counts.clear()
    assert here.run(recipe, artifacts=root).computed() == [] and counts == {}
    shutil.rmtree(here.home)  # another machine: no local copies of anything
    run = here.run(recipe, artifacts=root)
    assert counts == {"fetch": 3} and set(run.computed()) == fetches(world)

    counts.clear()
    store = ArtifactStore(root, here.home / "cache")
    store.delete(run.outcome.scores["base"])
    store.delete(merged)
    again = here.run(recipe, artifacts=root)
    assert set(again.computed()) == {f"merge {LABEL}", "benchmark base"} and counts == {"merge": 1, "score": 1}
    assert again.outcome.merged == replace_bytes(merged, again.outcome.merged.bytes)


def replace_bytes(ref: Any, size: int) -> Any:
    return ref.model_copy(update={"bytes": size})
