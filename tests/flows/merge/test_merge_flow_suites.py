"""A merge on a suite with tiers that leaves chat templates to the models: all are asked alike, and what was done is told."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.kept import read_all
from tasks.settings import places
from tests.flows.merge_fixture import EXPERTS, World, write_experts
from tests.flows.nightly_fixture import artifacts_of
from tests.tiny_suite import edited, write_tiny_suite

FACTS = "knowledge: {tasks: [{task: tiny_facts, metric: acc"


@pytest.fixture
def suite(tmp_path: Path) -> tuple[Path, Path]:
    file, data = write_tiny_suite(tmp_path / "suite")
    edited(file, ("name: tiny", "name: tiny\napply_chat_template: auto"), (f"{FACTS}}}]", f"{FACTS}, tier: safety}}]"))
    return file, data


@pytest.mark.parametrize("without", ["base", None])
def test_all_models_of_a_merge_are_asked_alike(
    world: World, suite: tuple[Path, Path], tmp_path: Path, without: str | None
) -> None:
    models = write_experts(tmp_path / "models")
    for name in ("base", *EXPERTS):
        if name != without:
            (models / name / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    recipe = MergeRecipe.model_validate(
        {
            "merge_method": "linear",
            "base_model": str(models / "base"),
            "models": [{"model": str(models / name)} for name in EXPERTS],
        }
    )
    run = world.at(tmp_path / "home").run(recipe, suite=str(suite[0]), data_dir=str(suite[1]))
    found = read_all(places(tmp_path / "home"), run.outcome.scores)
    assert set(found) == {"base", *(f"expert/{name}" for name in EXPERTS), "merged"}
    assert {scores.chat_template for scores in found.values()} == {without is None}
    assert len({scores.suite_digest for scores in found.values()}) == 1

    rows = {row["model"]: row for row in json.loads(artifacts_of(run.id)["tiers"].data)}
    assert len(rows) == 4 and set(rows["base"]) == {"model", "development", "safety"}
    merged = found["merged"]
    assert merged.by_tier() == {"development": ("math",), "safety": ("knowledge-safety",)}
    assert merged.average == merged.capabilities["math"].score
    logged = MlflowClient(tracking_uri=world.tracking_uri).get_run(run.outcome.logged.run_id).data
    metrics = logged.metrics
    assert logged.tags.get("chat_template") == ("true" if without is None else None)
    assert metrics["tier/safety"] == merged.capabilities["knowledge-safety"].score
    assert metrics["score/avg"] == metrics["tier/development"] == merged.average
    assert metrics["answer_characters/tiny_sums"] == merged.answer_lengths["tiny_sums"][0]
