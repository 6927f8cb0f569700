"""What MLflow is told of a merge, read back through MLflow and compared with scores, masks and files themselves."""

import html
import json
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors import safe_open

from ota_core.artifact import read_record
from ota_core.recipe.recipe import MergeRecipe, load_recipe
from tasks.evaluation.gate import decide
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import digest_data, load_suite
from tasks.registry import promotion
from tests.flows.merge_fixture import EXPERTS, RUN, FlowRun, World

NAME = "ota math+knowledge rho=0.40 rank1"
LABEL = "ota rho=0.40 rank1"


@pytest.fixture(scope="module")
def logged(world: World) -> FlowRun:
    return world.run(world.recipe(density=0.4, compression="rank1"), report="full")


@pytest.fixture(scope="module")
def client(world: World) -> MlflowClient:
    return MlflowClient(tracking_uri=world.tracking_uri)


@pytest.fixture(scope="module")
def parent(logged: FlowRun, client: MlflowClient) -> Run:
    return client.get_run(logged.outcome.logged.run_id)


def scores_of(run: FlowRun) -> dict[str, dict[str, float]]:
    """``base``, ``expert/…``, ``merged`` to capability to score, from the artifacts' files."""
    found = {}
    for key, ref in run.outcome.scores.items():
        held = json.loads((Path(ref.uri) / "scores.json").read_text())
        found[key] = {name: one["score"] for name, one in held["capabilities"].items()}
    return found


def test_names_params_and_tags(logged: FlowRun, parent: Run, client: MlflowClient, world: World) -> None:
    assert client.get_experiment(parent.info.experiment_id).name == "ota-merging"
    assert (parent.info.run_name, parent.info.status) == (NAME, "FINISHED")
    expected = {
        "merge_method": "ota", "density": "0.4", "power": "0.5", "compression": "rank1", "base_model": f"{world.uri}/models/base",
        "experts": "math,knowledge", "lambda": "1.0", "scope": "global",
    }  # fmt: skip
    assert expected.items() <= parent.data.params.items()
    assert parent.data.tags["recipe_fingerprint"] == logged.outcome.merged.fingerprint
    assert parent.data.tags["prefect_flow_run_id"] == str(logged.id)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert parent.data.tags.get("git_commit") == (head.stdout.strip() if head.returncode == 0 else None)


def test_metrics(logged: FlowRun, parent: Run, world: World) -> None:
    metrics, scores = parent.data.metrics, scores_of(logged)
    merged, base = scores["merged"], scores["base"]
    expected = {f"score/{name}": value for name, value in merged.items()}
    expected["score/avg"] = sum(merged.values()) / len(merged)
    expected |= {f"retention/{name}": merged[name] / own for name in EXPERTS if (own := scores[f"expert/{name}"][name])}
    expected["negative_transfer"] = float(sum(merged[name] < base[name] for name in merged))
    held = json.loads((Path(logged.outcome.scores["merged"].uri) / "scores.json").read_text())["capabilities"]
    expected |= {f"score_stderr/{name}": one["stderr"] for name, one in held.items()}
    expected["score_stderr/avg"] = math.hypot(*(one["stderr"] for one in held.values())) / len(held)
    expected |= {f"documents/{name}": float(one["n_samples"]) for name, one in held.items()}
    families = {"score", "retention", "negative_transfer", "score_stderr", "documents"}
    assert {name: metrics[name] for name in metrics if name.split("/")[0] in families} == pytest.approx(expected)
    machine = {name for name in metrics if name.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= machine
    before = {name for name in metrics if name.startswith("preflight/")}  # its numbers: tests/ota_core/analysis/test_preflight.py
    assert {"preflight/lambda", "preflight/row_space", "preflight/reach/math", "preflight/interference/knowledge"} <= before
    assert set(metrics) - set(expected) - machine - before == {
        "density/math", "density/knowledge", "seconds/compress", "seconds/mask", "seconds/merge", "seconds/benchmark", "peak_memory_gib",
        "moments/bytes_per_param", "moments/sqrt_error", "answer_characters/tiny_sums",
    }  # fmt: skip
    assert all(metrics[name] >= 0 for name in metrics if name.startswith("seconds/")) and metrics["peak_memory_gib"] > 0

    # Densities and bytes counted here, in the files.
    records = {read_record(path).provenance["expert"]: path for path in (world.home / "artifacts" / "masks").iterdir()}
    total = elements(world.models / "math" / "model.safetensors")
    for name, folder in records.items():
        with safe_open(folder / "mask.safetensors", "np") as masks:
            kept = sum(int(np.unpackbits(masks.get_tensor(key)).sum()) for key in masks.keys())  # noqa: SIM118 - no mapping
        assert metrics[f"density/{name}"] == logged.outcome.densities[name] == pytest.approx(kept / total, rel=1e-12)
    held = [data_bytes(path / "moments.safetensors") for path in (world.home / "artifacts" / "moments").iterdir()]
    assert metrics["moments/bytes_per_param"] == pytest.approx(sum(held) / (2 * total))


def elements(path: Path) -> int:
    with safe_open(path, "np") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no mapping


def data_bytes(path: Path) -> int:
    """Size of a safetensors file without its header."""
    with open(path, "rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def test_artifacts(logged: FlowRun, parent: Run, client: MlflowClient, tmp_path: Path, world: World) -> None:
    folder = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "recipe.yaml", "record.json", "README.md", "model/reference.json", "tables/scores.csv", "tables/scores.json", "tables/samples.json.gz",
        "plots/scores.png", "report.html", "tables/analysis.csv", "tables/documents.json", "documents.html",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == world.recipe(density=0.4, compression="rank1")
    assert json.loads((folder / "record.json").read_text()) == json.loads((Path(logged.outcome.path) / "record.json").read_text())
    reference = json.loads((folder / "model" / "reference.json").read_text())
    assert (reference["uri"], reference["digest"]) == (logged.outcome.merged.uri, logged.outcome.digest)
    card = (folder / "README.md").read_text()
    scores = scores_of(logged)
    head = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in head, "a hub knows no addresses in S3"
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert {one["type"]: one["value"] for one in metrics} == pytest.approx(scores["merged"], abs=1e-6)
    assert (Path(logged.outcome.path) / "README.md").read_text() == card, "beside the model, too"
    read_record(Path(logged.outcome.path))
    table = pd.read_csv(folder / "tables" / "scores.csv", index_col="model")
    assert list(table.index) == ["base", *EXPERTS, LABEL]
    for row, key in zip(table.index, ("base", "expert/math", "expert/knowledge", "merged"), strict=True):
        assert table.loc[row, list(EXPERTS)].to_dict() == pytest.approx(scores[key]), row
        assert table.loc[row, "average"] == pytest.approx(sum(scores[key].values()) / 2)


def test_children_lineage_and_version(logged: FlowRun, parent: Run, client: MlflowClient, world: World) -> None:
    found = client.search_runs([parent.info.experiment_id], filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    children = {run.info.run_name: run for run in found}
    assert set(children) == {"base", *EXPERTS, LABEL} and len(found) == 4
    for name, key in {"base": "base", "math": "expert/math", "knowledge": "expert/knowledge", LABEL: "merged"}.items():
        scores = scores_of(logged)[key]
        plain = {key: value for key, value in children[name].data.metrics.items() if key.startswith("score/")}
        assert plain == pytest.approx(
            {f"score/{c}": s for c, s in scores_of(logged)[key].items()} | {"score/avg": sum(scores.values()) / 2}
        )
    assert children["math"].data.params.items() >= {"role": "expert", "capability": "math"}.items()
    inputs = {one.dataset.name: json.loads(one.dataset.source)["uri"] for one in parent.inputs.dataset_inputs}
    models = {"base": f"{world.uri}/models/base"} | {name: f"{world.uri}/experts/{name}/{RUN}" for name in EXPERTS}
    data = next(one.dataset for one in parent.inputs.dataset_inputs if one.tags[0].value == "data")
    assert inputs == models | {"suite tiny": str(world.data)}
    assert json.loads(data.source)["digest"] == digest_data(world.data) == parent.data.tags["data_digest"]
    read = [client.get_logged_model(one.model_id) for one in parent.inputs.model_inputs]
    assert {one.name: one.tags["source_uri"] for one in read} == models
    (made,) = (client.get_logged_model(one.model_id) for one in parent.outputs.model_outputs)
    assert (made.tags["model_digest"], made.source_run_id) == (logged.outcome.digest, parent.info.run_id)

    version = client.get_model_version("ota-merged", logged.outcome.logged.model_version)
    assert version.source == logged.outcome.merged.uri and version.run_id == parent.info.run_id
    assert version.tags["model_digest"] == logged.outcome.digest
    assert client.get_model_version_by_alias("ota-merged", "challenger").version == version.version


def test_the_same_merge_again_is_the_same_run_and_version(
    logged: FlowRun, parent: Run, client: MlflowClient, world: World
) -> None:
    before = Counter(run.info.run_name for run in client.search_runs([parent.info.experiment_id]))
    again = world.run(world.recipe(density=0.4, rank1_approx=True))
    assert again.outcome.logged == logged.outcome.logged
    assert Counter(run.info.run_name for run in client.search_runs([parent.info.experiment_id])) == before
    assert len(client.search_model_versions("name='ota-merged'")) == 1
    for name in ("score/avg", "density/math", "seconds/merge"):
        assert len(client.get_metric_history(parent.info.run_id, name)) == 1
    # Nothing was computed, so there is nothing to say of the machine.
    cpu = client.get_metric_history(parent.info.run_id, "system/cpu_utilization_percentage")
    assert max(one.timestamp for one in cpu) <= parent.info.start_time


def test_without_a_benchmark_the_merge_is_logged(world: World, client: MlflowClient) -> None:
    run = client.get_run(world.run(world.recipe("ties", density=0.5), suite=None).outcome.logged.run_id)
    assert run.data.params.items() >= {"merge_method": "ties", "density": "0.5", "experts": "math,knowledge"}.items()
    assert {name for name in run.data.metrics if not name.startswith("system/")} == {"seconds/merge", "peak_memory_gib"}
    assert not client.search_runs([run.info.experiment_id], filter_string=f"tags.mlflow.parentRunId = '{run.info.run_id}'")


def test_a_merge_that_is_not_benchmarked_again_keeps_its_scores(
    logged: FlowRun, parent: Run, client: MlflowClient, world: World, tmp_path: Path
) -> None:
    folder = Path(logged.outcome.path)
    before = {name: (folder / name).read_text() for name in ("README.md", "report.html")}
    assert "## Scores" in before["README.md"] and ">Scores</h2>" in before["report.html"]
    again = world.run(world.recipe(density=0.4, compression="rank1"), suite=None, report="scores")
    assert again.outcome.logged.run_id == parent.info.run_id
    assert {name: (folder / name).read_text() for name in before} == before
    for name, text in before.items():
        assert Path(client.download_artifacts(parent.info.run_id, name, str(tmp_path))).read_text() == text


def test_the_page_keeps_what_the_gate_decided(
    logged: FlowRun, parent: Run, client: MlflowClient, world: World, tmp_path: Path
) -> None:
    base, merged = (ModelScores.model_validate_json((Path(logged.outcome.scores[key].uri) / "scores.json").read_text())
                    for key in ("base", "merged"))  # fmt: skip
    decision = decide("ota", merged, champion=None, base=base, suite=load_suite(str(world.suite)))
    promotion.log_decision(parent.info.run_id, decision, tracking_uri=world.tracking_uri)
    world.run(world.recipe(density=0.4, compression="rank1"), report="full")
    beside = (Path(logged.outcome.path) / "report.html").read_text()
    assert "The gate&#39;s decision</h2>" in beside and decision.reasons[0] in html.unescape(beside)
    assert Path(client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))).read_text() == beside


def without_second_moments(folder: Path, name: str) -> None:
    (folder / name / "exp_avg_sq.safetensors").unlink()


def sgd(folder: Path, name: str) -> None:
    without_second_moments(folder, name)
    state = {
        "state": {0: {"momentum_buffer": torch.zeros(2)}},
        "param_groups": [{"params": [0], "momentum": 0.9, "dampening": 0}],
    }
    torch.save(state, folder / name / "optimizer.pt")


@pytest.mark.parametrize(
    ("method", "base", "spoil", "unanalysed"),
    [("linear", False, without_second_moments, "nothing can be analysed"), ("ties", True, sgd, "")],
)
def test_a_merge_outlives_an_analysis_that_cannot_be_made(
    world: World, client: MlflowClient, tmp_path: Path, method: str, base: bool, spoil: Any, unanalysed: str
) -> None:
    models = tmp_path / "models"
    shutil.copytree(world.models, models)
    for name in EXPERTS:
        spoil(models, name)
    recipe = MergeRecipe.model_validate(
        {
            "merge_method": method, "models": [{"model": str(models / name)} for name in EXPERTS],
            **({"base_model": str(models / "base"), "parameters": {"density": 0.5}} if base else {}),
        }
    )  # fmt: skip
    outcome = world.run(recipe, report="full").outcome
    assert "merged" in outcome.scores
    page = html.unescape((Path(outcome.path) / "report.html").read_text())
    assert (">Analysis</h2>" in page) and (unanalysed or "keeps a momentum and no second moments") in page
    assert ("could not be analysed" in page) == bool(unanalysed)
    run = client.get_run(outcome.logged.run_id)
    assert run.data.tags["analysis"].startswith("none: " if unanalysed else "in the report")
    assert unanalysed in run.data.tags["analysis"]
