"""The flow with other methods, without a base, without a benchmark, with experts in folders."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ota_core.recipe.recipe import MergeRecipe
from tasks.storage.layout import write_expert_json
from tests.flows.merge_fixture import EXPERTS, World

SOME = {"density": 0.4}


@pytest.mark.parametrize(
    ("method", "parameters", "stages"),
    [
        ("linear", {}, set()),
        ("ties", SOME, set()),
        ("dare_ties", SOME, set()),
        ("fisher", {"compression": "rank1"}, {"compress"}),
        ("ota", {}, {"compress"}),
        ("ota", {"density": 1.0}, {"compress"}),
        ("ota", {"precond_threshold": 1e-16}, {"compress", "mask"}),
    ],
)
def test_methods_run_only_the_stages_that_they_need(
    world: World, counts: Counter[str], tmp_path: Path, method: str, parameters: dict[str, Any], stages: set[str]
) -> None:
    recipe = world.recipe(method, **parameters)
    here = world.at(tmp_path / "home")
    run = here.run(recipe, suite=None)
    outcome = run.outcome
    kinds = {name.split(" ")[0] for name in run.states}
    assert kinds == {"fetch", "merge", "log"} | stages
    assert counts == {"fetch": 3, "merge": 1} | dict.fromkeys(stages, 2)
    assert outcome.scores == {} and set(outcome.densities) == (set(EXPERTS) if "mask" in stages else set())
    assert outcome.logged.model_version and (Path(outcome.path) / "model.safetensors").is_file()
    again = here.run(recipe, suite=None)
    assert again.computed() == [] and again.outcome == outcome


@pytest.mark.parametrize("method", ["ota", "linear"])
def test_without_a_base(world: World, counts: Counter[str], tmp_path: Path, method: str) -> None:
    recipe, here = world.recipe(method, base=False), world.at(tmp_path / "home")
    run = here.run(recipe)
    assert not [name for name in run.states if "base" in name]
    assert set(run.outcome.scores) == {"expert/math", "expert/knowledge", "merged"} and counts["score"] == 3
    assert counts["merge"] == 1 and counts["mask"] == 0
    assert here.run(recipe).computed() == []


def test_experts_in_folders_beside_the_recipe(world: World, counts: Counter[str], tmp_path: Path) -> None:
    """Local folders, named relative to the recipe: a change in one is noticed, and nothing else is computed again."""
    shutil.copytree(world.models, tmp_path / "models")
    recipe = MergeRecipe.model_validate(
        {
            "merge_method": "ota",
            "base_model": "models/base",
            "models": [{"model": f"models/{name}", "parameters": {"density": 0.3}} for name in EXPERTS],
            "parameters": {"bias_correction": True},
        }
    )
    options: dict[str, Any] = {"suite": None, "recipe_dir": tmp_path, "home": tmp_path / "home"}
    first = world.run(recipe, **options)
    assert set(first.computed()) == {name for name in first.states if not name.startswith("log ")}
    assert world.run(recipe, **options).computed() == []

    counts.clear()
    math = tmp_path / "models" / "math"
    # Another number of steps is another bias correction, though no weight changed.
    write_expert_json(math, capability="math", base_model="base", trained_at="2026-11-21", step=777, beta2=0.999)
    run = world.run(recipe, **options)
    assert set(run.computed()) == {f"fetch {math}", "compress math", "mask math", "merge ota rho=0.30 bias_correction=true"}
    assert run.outcome.merged != first.outcome.merged


def test_two_files_of_second_moments_in_one_folder(world: World, tmp_path: Path) -> None:
    """``preconditioner_path`` chooses between them: another choice is another merge."""
    shutil.copytree(world.models, tmp_path / "models")
    math = tmp_path / "models" / "math"
    (tmp_path / "models" / "knowledge" / "exp_avg_sq.safetensors").rename(tmp_path / "knowledge.safetensors")
    shutil.copy(tmp_path / "knowledge.safetensors", math / "exp_avg_sq_other.safetensors")

    def run(file: str) -> Any:
        models = [
            {"model": str(math), "parameters": {"preconditioner_path": file}},
            {
                "model": str(tmp_path / "models" / "knowledge"),
                "parameters": {"preconditioner_path": str(tmp_path / "knowledge.safetensors")},
            },
        ]
        raw = {"merge_method": "ota", "base_model": str(tmp_path / "models" / "base"), "models": models}
        return world.run(MergeRecipe.model_validate(raw), suite=None)

    first, second = run("exp_avg_sq.safetensors"), run("exp_avg_sq_other.safetensors")
    assert {"compress math", "merge ota"} == set(second.computed())
    weights = [(Path(one.outcome.path) / "model.safetensors").read_bytes() for one in (first, second)]
    assert weights[0] != weights[1]
