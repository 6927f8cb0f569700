"""What MLflow is told of a merge, read back through MLflow and compared with scores, masks and files themselves."""

import html
import json
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
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

from flows.report import compare, comparison, git_commit, merge_label, merge_name, rows_of, score_metrics
from ota_core.artifact import ArtifactRef, read_record
from ota_core.recipe import MergeRecipe, load_recipe
from tasks import promotion
from tasks.gate import decide
from tasks.scores import CapabilityScore, ModelScores, to_markdown
from tasks.stages import Subject
from tasks.suites import digest_data, load_suite
from tasks.tracking import MergeRun
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
    assert set(metrics) - set(expected) - machine == {
        "density/math", "density/knowledge", "seconds/compress", "seconds/mask", "seconds/merge", "seconds/benchmark", "peak_memory_gib",
        "moments/bytes_per_param", "moments/sqrt_error",
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
        "plots/scores.png", "report.html", "tables/analysis.csv",
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
    state = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}
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
    assert (">Analysis</h2>" in page) and (unanalysed or "lacks the key exp_avg_sq") in page
    assert ("could not be analysed" in page) == bool(unanalysed)
    run = client.get_run(outcome.logged.run_id)
    assert run.data.tags["analysis"].startswith("none: " if unanalysed else "in the report")
    assert unanalysed in run.data.tags["analysis"]


def scores(**values: float | None) -> ModelScores:
    capabilities = {
        name: CapabilityScore(score=value, stderr=None if value is None else 0.01, n_samples=10, tasks={})
        for name, value in values.items()
    }
    return ModelScores(
        suite="s", suite_digest="d", capabilities=capabilities, samples={}, limit=None, lm_eval_version="0", seconds=1.5
    )


def subject(name: str, role: str, capability: str | None = None) -> Subject:
    return Subject(name=name, role=role, capability=capability, path=Path("x"), digest="xxh3:1")


SUBJECTS = {
    "base": subject("base", "base"), "expert/a": subject("a", "expert", "math"), "expert/b": subject("b", "expert", "math"),
    "expert/c": subject("c", "expert", "code"), "expert/d": subject("d", "expert"), "merged": subject("m", "merge"),
}  # fmt: skip
FOUND = {
    "base": scores(math=0.3, code=0.5, chat=None), "expert/a": scores(math=0.8, code=0.1, chat=None),
    "expert/b": scores(math=0.5, code=0.0, chat=None), "expert/c": scores(math=0.2, code=0.0, chat=None),
    "expert/d": scores(math=0.2, code=0.9, chat=None), "merged": scores(math=0.6, code=0.4, chat=None),
}  # fmt: skip


def test_metrics_of_two_experts_for_one_capability_and_of_what_was_not_measured() -> None:
    assert score_metrics(FOUND, SUBJECTS) == pytest.approx(
        # retention: of two experts for math the better counts; the one for code scored 0, so that it is not defined there
        {
            "score/math": 0.6,
            "score/code": 0.4,
            "score/avg": 0.5,
            "retention/math": 0.75,
            "negative_transfer": 1,
            "seconds/benchmark": 9.0,
            "score_stderr/math": 0.01,
            "score_stderr/code": 0.01,
            "score_stderr/avg": 0.01 / math.sqrt(2),
            "documents/math": 10,
            "documents/code": 10,
        }
    )
    assert score_metrics({}, SUBJECTS) == {}
    without = {key: value for key, value in FOUND.items() if key != "base"}
    assert "negative_transfer" not in score_metrics(without, SUBJECTS)


def experts(found: Mapping[str, ModelScores]) -> dict[str, tuple[str, ModelScores]]:
    return {s.name: (s.capability or s.name, found[key]) for key, s in SUBJECTS.items() if s.role == "expert"}


def test_an_expert_that_is_named_like_a_capability_has_it_for_its_own() -> None:
    subjects = SUBJECTS | {"expert/d": subject("code", "expert")}
    assert score_metrics(FOUND, subjects)["retention/code"] == pytest.approx(0.4 / 0.9)
    table = comparison(FOUND, subjects)
    assert table.loc["m", "retention"] == pytest.approx((0.75 + 0.4 / 0.9) / 2)
    rows = {row["model"]: row["capability"] for row in rows_of(table, FOUND, subjects)}
    assert rows == {"base": None, "a": "math", "b": "math", "c": "code", "code": "code", "m": None}


def test_losses_of_the_page_have_their_errors() -> None:
    from flows.report_page import page_of

    found = {
        "base": FOUND["base"].model_copy(update={"losses": {"math": 2.0, "code": 1.0}}),
        "merged": FOUND["merged"].model_copy(
            update={"losses": {"math": 1.5, "code": 1.0}, "loss_stderr": {"math": 0.03, "code": 0.04}, "limit": 7}
        ),
    }
    run = MergeRun(
        name="m", method="ota", tags={"recipe_fingerprint": "f"}, recipe_yaml="", record={}, model_uri="u", model_digest="d"
    )
    page = page_of(run, ArtifactRef(kind="merged", fingerprint="f", uri="u", bytes=1), found, SUBJECTS, None)
    assert page.losses == (
        ("model", "math", "code", "average"), ("base", "2.000", "1.000", "1.500"),
        ("m", "1.500 ± 0.030", "1.000 ± 0.040", "1.250 ± 0.025"),
    )  # fmt: skip
    assert (page.suite, page.limit, page.documents) == ("s", 7, {"math": 10, "code": 10})


def test_table_with_and_without_a_base() -> None:
    full = compare(FOUND["base"], experts(FOUND), {"m": FOUND["merged"]})
    table = compare(None, experts(FOUND), {"m": FOUND["merged"]})
    assert list(full.index) == ["base", "a", "b", "c", "d", "m"] and list(table.index) == ["a", "b", "c", "d", "m"]
    pd.testing.assert_series_equal(table["average"], full["average"].drop("base"))
    pd.testing.assert_series_equal(table["retention"], full["retention"].drop("base"))
    assert table.attrs == full.attrs and table.attrs["averaged"] == ["math", "code"]
    assert (full.loc["m", "negative_transfer"], full.loc["m", "below_base"]) == (1, "code")
    assert pd.isna(table.loc["m", "negative_transfer"]) and table.loc["m", "below_base"] == ""
    assert "| m | 60.0 | 40.0 | – | 50.0 | 75.0 |" in to_markdown(table)


def test_rows_carry_errors_and_gaps() -> None:
    rows = rows_of(compare(FOUND["base"], experts(FOUND), {"m": FOUND["merged"]}), FOUND, SUBJECTS)
    assert [row["model"] for row in rows] == ["base", "a", "b", "c", "d", "m"]
    assert rows[-1] == {
        "model": "m", "role": "merge", "capability": None, "math": 0.6, "math_stderr": 0.01, "code": 0.4, "code_stderr": 0.01, "chat": None,
        "average": pytest.approx(0.5), "retention": pytest.approx(0.75),
    }  # fmt: skip
    assert rows[0]["retention"] is None


@pytest.mark.parametrize(
    ("models", "options", "name"),
    [
        (["s3://x/math/2026-11-20", "s3://x/code/2026-11-20"], {"parameters": {"density": 0.4}}, "ota math+code rho=0.40"),
        (["org/a@main", "/data/b/"], {"parameters": {"precond_threshold": 1e-26}}, "ota a+b tau=1e-26"),
        (
            ["s3://x/a", "s3://x/b"],
            {"merge_method": "ties", "parameters": {"lambda": 0.5, "density": 0.2}},
            "ties a+b rho=0.20 lambda=0.5",
        ),
        (["a", "b"], {"parameters": {"compression": "rank1", "density": 1}}, "ota a+b rank1"),
        (["a", "it's `b`"], {"merge_method": "linear"}, "linear a+its b"),
        (["a", "b"], {"parameters": {"density": 0.4, "metric": "magnitude"}}, "ota a+b rho=0.40 metric=magnitude"),
        (["a", "b"], {"parameters": {"density": 0.4, "masked_merge": "ties"}}, "ota a+b rho=0.40 masked_merge=ties"),
        (["a", "b"], {"parameters": {"power": 1.0, "metric": "magnitude"}}, "ota a+b power=1"),
        (["a", "b"], {"parameters": {"compression": "rank_k", "power": 0.5}}, "ota a+b rank_k=4"),
        (["a", "b"], {"parameters": {"compression": "rank_k", "rank": 8, "lambda": 2.0}}, "ota a+b rank_k=8 lambda=2"),
        (["a", "b"], {"merge_method": "slerp", "parameters": {"t": 0.3}}, "slerp a+b t=0.3"),
        (
            ["a", "b"],
            {"merge_method": "breadcrumbs", "parameters": {"density": 0.125, "gamma": 0.02, "weight": 0.5}},
            "breadcrumbs a+b rho=0.125 weight=0.5 gamma=0.02",
        ),
        (["a", "b"], {"merge_method": "dare_ties", "parameters": {"density": 0.5, "seed": 7}}, "dare_ties a+b rho=0.50 seed=7"),
    ],
)
def test_names_say_what_is_merged(models: list[str], options: dict[str, Any], name: str) -> None:
    raw = {"merge_method": "ota", "base_model": "base", "models": [{"model": model} for model in models]} | options
    assert merge_name(MergeRecipe.model_validate(raw)) == name


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ([{"density": 0.4}, {"density": 0.2}], "ota rho=0.40/0.20"),
        ([{"density": 0.2}, {"density": 0.4}], "ota rho=0.20/0.40"),
        ([{"density": 0.2}, {"density": 1}], "ota rho=0.20/1.00"),
        ([{"density": 0.2}, {"precond_threshold": 1e-20}], "ota rho=0.20/- tau=-/1e-20"),
        ([{"scaling_factor": 1.5}, {}], "ota scaling_factor=1.5/1"),
    ],
)
def test_labels_tell_which_expert_has_which_setting(settings: list[dict[str, float]], label: str) -> None:
    models = [{"model": name, "parameters": own} for name, own in zip("ab", settings, strict=True)]
    assert merge_label(MergeRecipe.model_validate({"merge_method": "ota", "base_model": "base", "models": models})) == label


CHANGES = {
    "ota": {
        "density": 0.3, "precond_threshold": 1e-26, "scope": "per_tensor", "metric": "magnitude", "mask_curvature": "full", "compression": "log8",
        "bias_correction": True, "missing_curvature": "mean", "scaling_factor": 0.7, "power": 1.0, "normalise": "global", "epsilon": 1e-26,
        "denominator": "all", "fallback": "mean", "masked_merge": "ties", "rescale": True, "lambda": 0.5,
    },
    "fisher": {"compression": "rank1", "bias_correction": True, "missing_curvature": "mean", "weight": 0.5},
    "linear": {"weight": 0.5, "normalize": False},
    "dare_ties": {"density": 0.2, "weight": 0.5, "normalize": True, "lambda": 0.5, "rescale": False, "seed": 1},
    "breadcrumbs": {"density": 0.2, "weight": 0.5, "gamma": 0.1, "normalize": True, "lambda": 0.5},
    "slerp": {"t": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("method", CHANGES)
def test_no_two_merges_have_one_label(method: str) -> None:
    """Each setting that the method knows says so in the label when it changes."""
    usual: dict[str, Any] = {"slerp": {"t": 0.5}, "ota": {"density": 0.4}}.get(method, {})
    raw = {"merge_method": method, "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    settings = [usual, *(({} if key == "precond_threshold" else usual) | {key: new} for key, new in CHANGES[method].items())]
    recipes = [MergeRecipe.model_validate(raw | {"parameters": one}) for one in settings]
    known = recipes[0].effective()
    assert {*known["parameters"], *known["experts"][0]} == set(CHANGES[method])
    labels = [merge_label(recipe) for recipe in recipes]
    assert len(set(labels)) == len(labels) and all(label.startswith(method) and len(label) < 50 for label in labels)


def test_names_of_many_experts_stay_short_and_keep_the_settings() -> None:
    models = [{"model": f"experts/a-rather-long-name-{i}"} for i in range(40)]
    assert len(merge_name(MergeRecipe.model_validate({"merge_method": "linear", "models": models}))) == 200
    raw = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"density": 0.2, "lambda": 0.5}}
    name = merge_name(MergeRecipe.model_validate(raw))
    assert len(name) == 200 and name.startswith("ties a-rather-long-name-0+a") and name.endswith(" rho=0.20 lambda=0.5")
    for model, i in zip(models, range(40), strict=True):
        model["parameters"] = {"density": (i + 1) / 100}  # type: ignore[assignment]
    assert len(merge_name(MergeRecipe.model_validate(raw))) == 200


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    if shutil.which("git") is not None:
        (tmp_path / "ours.py").touch()
        git("init", "--quiet")
        git("add", "ours.py")
        git("commit", "--quiet", "-m", "one")
        assert git_commit(tmp_path / "ours.py") == git("rev-parse", "HEAD")
        installed = tmp_path / ".venv" / "report.py"  # a copy in an environment inside somebody's repository
        installed.parent.mkdir()
        installed.touch()
        assert git_commit(installed) is None
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path / "ours.py") is None


def test_a_server_without_a_ui_is_not_linked() -> None:
    from flows.report_page import prefect_links

    assert prefect_links(None) == prefect_links("None/flow-runs/flow-run/1") == {}
    assert list(prefect_links("http://127.0.0.1:4200/runs/flow-run/1").values()) == ["http://127.0.0.1:4200/runs/flow-run/1"]
