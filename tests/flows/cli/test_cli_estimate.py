"""``ota estimate``, and ``ota merge``, ``plan`` and ``inspect`` of experts that kept no second moments, as a person types them."""

import json
from pathlib import Path

import pytest
import yaml

from ota_core.artifact import read_record
from ota_core.moments import open_moments
from tests.flows.cli.typed import ota, refused, said
from tests.tiny_suite import write_rows

FEW = ("--samples", "4", "--batch", "2", "--device", "cpu")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_rows(tmp_path / "texts.jsonl", [{"text": f"{i} is the number {i}."} for i in range(8)])
    return tmp_path / "texts.jsonl"


def test_a_file_beside_the_model_is_found_and_called_an_estimate(recipe: Path, texts: Path) -> None:
    expert, base = recipe.parent / "expert0", recipe.parent / "base"
    compared = said("estimate", expert, "--data", texts, *FEW, "--base", base, "--compare")
    assert "2 batches" in compared and "saliency against the second moments from training: rank correlation 0." in compared
    (expert / "exp_avg_sq.safetensors").unlink()
    assert "estimated" in said(
        "estimate", expert, "--data", texts, *FEW, "--base", base, "--out", expert / "exp_avg_sq.safetensors"
    )
    whole = open_moments(expert / "exp_avg_sq.safetensors")
    assert whole.estimated is not None and whole.estimated["clip"] == 1.0
    # To add second moments makes no other model: the same estimate is found, in another form.
    out = recipe.parent / "v.safetensors"
    told = json.loads(
        said("estimate", expert, "--data", texts, *FEW, "--base", base, "--out", out, "--method", "rank1", "--json")
    )
    assert told["batches"] == 2 and told["path"] == str(out) and open_moments(out).estimated == whole.estimated
    assert len(list((recipe.parent / "home" / "artifacts" / "moments").iterdir())) == 1
    assert "estimated: the mean squared gradient over 4 documents" in said("inspect", expert / "exp_avg_sq.safetensors")


def test_a_merge_estimates_what_was_not_kept(recipe: Path, texts: Path) -> None:
    raw = yaml.safe_load(recipe.read_text())
    (recipe.parent / "expert1" / "exp_avg_sq.safetensors").unlink()
    assert "or have second moments estimated: missing_curvature: estimate" in refused("merge", recipe, recipe.parent / "out")
    raw["parameters"] |= {"missing_curvature": "estimate", "estimate": {"data": "texts.jsonl", "samples": 4, "batch": 2}}
    recipe.write_text(yaml.safe_dump(raw))
    planned = said("plan", recipe)
    assert "the second moments of expert0, expert1 are estimated first" in planned and "no problems found" in planned
    merged = ota("merge", recipe, recipe.parent / "out")
    assert "take points: 2, or normalise: global" in merged.stdout
    record = read_record(recipe.parent / "out")
    assert set(record.results["estimated"]) == {"expert0", "expert1"}
    assert len(list((recipe.parent / "home" / "artifacts" / "moments").iterdir())) == 2
    (recipe.parent / "texts.jsonl").unlink()
    assert "texts.jsonl is no file" in refused("merge", recipe, recipe.parent / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either data, the texts, or random_tokens"),
        (["--data", "texts.jsonl", "--clip", "much"], "--clip: got 'much', expected a number above 0, or none"),
        (["--data", "texts.jsonl", "--clip", "0"], "clip"),
        (["--data", "texts.jsonl", "--samples", "9"], "samples 9 is no multiple of batch 8"),
        (["--data", "texts.jsonl"], "gives 8 documents, 256 are asked for"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["--data", "nosuch"], "there is no suite 'nosuch'"),
        (["--data", "texts.jsonl", "--method", "rank1"], "--method rank1 says how --out is written"),
        (["--data", "texts.jsonl", "--compare"], "name the base model with --base"),
        (["--data", "texts.jsonl", "--out", "expert0"], "expert0 is a folder"),
    ],
)
def test_mistakes(recipe: Path, texts: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    assert message in refused("estimate", "expert0", *options, *(["--overwrite"] if "--out" in options else []))
