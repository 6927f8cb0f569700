"""What a merge's run, page and table are made of, each part by itself: metrics, losses, rows, names, the commit."""

import math
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ota_core.artifact import ArtifactRef
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.comparison import comparison
from tasks.evaluation.scores import CapabilityScore, ModelScores, rows_of, scores_table
from tasks.evaluation.subject import Subject
from tasks.log import git_commit, score_metrics
from tasks.merging.labels import merge_label, merge_name
from tasks.tracking.merge import MergeRun


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
    assert table["capability"].dropna().to_dict() == {"a": "math", "b": "math", "c": "code", "code": "code"}


def test_losses_of_the_page_have_their_errors() -> None:
    from tasks.pages.report_page import page_of

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
    of_merge = {"loss/math": 1.5, "loss/math_stderr": 0.03, "loss/code": 1.0, "loss/code_stderr": 0.04}
    assert page.losses == (
        {"model": "base", "role": "base", "loss/math": 2.0, "loss/code": 1.0, "loss/average": 1.5},
        {"model": "m", "role": "merge", **of_merge, "loss/average": 1.25, "loss/average_stderr": 0.025},
    )
    assert (page.suite, page.limit, page.documents) == ("s", 7, {"math": 10, "code": 10})


def test_table_with_and_without_a_base() -> None:
    full = scores_table(FOUND["base"], experts(FOUND), {"m": FOUND["merged"]})
    table = scores_table(None, experts(FOUND), {"m": FOUND["merged"]})
    assert list(full.index) == ["base", "a", "b", "c", "d", "m"] and list(table.index) == ["a", "b", "c", "d", "m"]
    pd.testing.assert_series_equal(table["average"], full["average"].drop("base"))
    pd.testing.assert_series_equal(table["retention"], full["retention"].drop("base"))
    assert (full.loc["m", "negative_transfer"], full.loc["m", "below_base"]) == (1, "code")
    assert pd.isna(table.loc["m", "negative_transfer"]) and table.loc["m", "below_base"] == ""


def test_rows_carry_errors_and_gaps() -> None:
    rows = rows_of(scores_table(FOUND["base"], experts(FOUND), {"m": FOUND["merged"]}))
    assert [row["model"] for row in rows] == ["base", "a", "b", "c", "d", "m"]
    assert rows[-1] == {
        "model": "m", "role": "merge", "capability": None, "math": 0.6, "math_stderr": 0.01, "code": 0.4, "code_stderr": 0.01, "chat": None,
        "average": pytest.approx(0.5), "average_stderr": pytest.approx(0.01 / math.sqrt(2)), "retention": pytest.approx(0.75),
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
    from tasks.pages.report_page import prefect_links

    assert prefect_links(None) == prefect_links("None/flow-runs/flow-run/1") == {}
    assert list(prefect_links("http://127.0.0.1:4200/runs/flow-run/1").values()) == ["http://127.0.0.1:4200/runs/flow-run/1"]
