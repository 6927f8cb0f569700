"""A plan, merges, FFG and the analysis of a small model of every kind, with transformers' own classes and an optimizer's own state."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from typer.testing import CliRunner

from flows.cli.app import app
from tests.tasks.merging.merging import average, check, loads, merged, ota, recipe, weights
from tests.tasks.merging.test_conversion import train
from tests.tasks.merging.tiny_architectures import MODELS

MIXTURES = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}


def mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=48, hidden_size=8, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=2)
    return transformers.MambaForCausalLM(config)


KINDS = MODELS | {"mamba": mamba}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_model(tmp_path: Path, kind: str) -> None:
    model = KINDS[kind]()
    model.save_pretrained(tmp_path / "base")
    for name, lr in (("e1", 1e-2), ("e2", 2e-2)):
        train(KINDS[kind](), tmp_path / name, lr=lr)
    plan = ota("plan", tmp_path, "ota", parameters={"density": 0.3})
    assert plan.exit_code == 0 and "no problems found" in plan.output, plan.output
    got, said = merged(tmp_path)
    check(got, average(tmp_path))
    assert "was not checked" not in said
    loads(tmp_path / "out", type(model))
    shutil.rmtree(tmp_path / "out")
    got, said = merged(tmp_path, "ota", parameters={"density": 0.3})
    base = weights(tmp_path / "base")
    assert "kept" in said and any(not torch.equal(got[name], x) for name, x in base.items())
    loads(tmp_path / "out", type(model))


@pytest.mark.parametrize("kind", [*sorted(MIXTURES), "t5", "llava", "mamba", "gemma3", "qwen2_5_vl", "bert"])
def test_the_analysis_of_every_kind(tmp_path: Path, kind: str) -> None:
    KINDS[kind]().save_pretrained(tmp_path / "base")
    for name, lr in (("e1", 1e-2), ("e2", 2e-2)):
        train(KINDS[kind](), tmp_path / name, lr=lr)
    path = recipe(tmp_path, "ota", parameters={"density": 0.3})
    result = CliRunner().invoke(app, ["analyse", str(path), str(tmp_path / "report"), "--home", str(tmp_path / "home")])
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(next((tmp_path / "report").rglob("*.parquet")))
    of_experts = table[(table.analysis == "moe") & (table.role == "all") & table.layer.isna()]
    page = next((tmp_path / "report").rglob("pictures.html")).read_text()
    assert (len(of_experts) > 0) == (kind in MIXTURES) == ("Which experts of the mixture does FFG keep?" in page)
    assert "Where does FFG keep the experts" in page
    for _, rows in of_experts.groupby(["expert", "variant"]):
        assert sorted(rows["at"]) == [0.0, 1.0, 2.0, 3.0] and rows["value"].between(0, 1).all()
        # Together they keep what all the matrices of experts keep.
        assert rows["elements"].nunique() == 1
