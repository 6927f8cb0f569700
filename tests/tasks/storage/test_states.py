"""Optimizer states belong to an expert when its second moments come from there, and only then: listings, folders, S3."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.storage.layout import folder_model_files, model_files
from tasks.storage.models import fetch, upload_folder
from tasks.storage.states import taken_of
from tests.servers import S3Test

WEIGHTS = ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("states", "belong"),
    [
        (["optimizer.pt", "checkpoint-5/optimizer.pt"], ["optimizer.pt"]),
        (["exp_avg_sq.safetensors", "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"], ["exp_avg_sq.safetensors"]),
        (["exp_avg_sq.safetensors", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp"], ["exp_avg_sq.safetensors"]),
        (["optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "checkpoint-5/optimizer.pt"], ["optimizer_0/.metadata", "optimizer_0/__0_0.distcp"]),
        (["checkpoint-5/optimizer.bin", "checkpoint-5/model.safetensors", "checkpoint-5/scheduler.pt"], ["checkpoint-5/optimizer.bin"]),
        (
            ["checkpoint-5/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "checkpoint-5/latest", "checkpoint-5/zero_to_fp32.py"],
            ["checkpoint-5/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "checkpoint-5/latest"],
        ),
        (["checkpoint-5/optimizer_0/.metadata", "checkpoint-5/rng_state_0.pth"], ["checkpoint-5/optimizer_0/.metadata"]),
        (["global_step5_universal/zero/w/exp_avg_sq.pt", "latest_universal"], ["global_step5_universal/zero/w/exp_avg_sq.pt", "latest_universal"]),
        (["latest"], []),
        (["latest.txt", "model_config.json", "model/a/model_weight.safetensors"], []),
        (["step-9/.metadata", "step-9/__0_0.distcp", "step-9/model.safetensors"], ["step-9/.metadata", "step-9/__0_0.distcp"]),
        (["step-8/.metadata", "step-8/__0_0.distcp", "step-9/.metadata", "step-9/__0_0.distcp"], ["step-8/.metadata", "step-9/.metadata"]),
        (["step-9/.metadata", "step-9/__0_0.distcp", "exp_avg_sq.safetensors"], ["exp_avg_sq.safetensors"]),
        (["recipe_state/recipe_state.pt", "recipe_state/other.pt"], ["recipe_state/recipe_state.pt"]),
        (["recipe_state/recipe_state.pt", "exp_avg_sq.safetensors"], ["exp_avg_sq.safetensors"]),
        (["model_and_optim/.metadata", "model_and_optim/__0_0.distcp"], ["model_and_optim/.metadata", "model_and_optim/__0_0.distcp"]),
        (["model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "optimizer.pt"], ["optimizer.pt"]),
        ([".metadata", "__0_0.distcp", ".git"], [".metadata", "__0_0.distcp"]),
        ([".metadata", "__0_0.distcp", "exp_avg_sq.safetensors"], ["exp_avg_sq.safetensors"]),
        (
            ["optimizer/optimizer_pp-0-of-1_tp-0-of-1.pt", "optimizer/optimizer_config.json", "model_config.json", "model/a/model_weight.safetensors"],
            ["optimizer/optimizer_pp-0-of-1_tp-0-of-1.pt", "optimizer/optimizer_config.json", "model_config.json"],
        ),
        (
            ["latest.txt", *(f"{n}/{name}" for n in (9, 10) for name in ("optimizer/optimizer_pp-0-of-1_dp-0-of-1_tp-0-of-2.pt", "model/a/b/c/d/model_w.safetensors"))],
            ["latest.txt", "10/optimizer/optimizer_pp-0-of-1_dp-0-of-1_tp-0-of-2.pt", "10/model/a/b/c/d/model_w.safetensors"],
        ),
        (["optimizer/optimizer_pp-0-of-1_tp-0-of-1.pt", "model_config.json", "exp_avg_sq.safetensors"], ["exp_avg_sq.safetensors"]),
        (["zero/w/exp_avg_sq.pt", "zero/w/step.pt"], ["zero/w/exp_avg_sq.pt", "zero/w/step.pt"]),
        (["checkpoint-5/optimizer.pt", "checkpoint-6/optimizer.pt"], ["checkpoint-5/optimizer.pt", "checkpoint-6/optimizer.pt"]),
    ],
)  # fmt: skip
def test_files_of_a_listing(states, belong):
    assert model_files([*WEIGHTS, *states]) == sorted([*WEIGHTS, *belong])


def test_a_folder_with_the_weights_in_it_belongs_in_any_case():
    sharded = ["model_and_optim/.metadata", "model_and_optim/__0_0.distcp"]
    assert model_files(["config.json", "exp_avg_sq.safetensors", *sharded]) == sorted(
        ["config.json", "exp_avg_sq.safetensors", *sharded]
    )
    alone = [".metadata", "__0_0.distcp"]
    assert model_files(["config.json", "exp_avg_sq.safetensors", *alone]) == sorted(
        ["config.json", "exp_avg_sq.safetensors", *alone]
    )


def test_of_several_checkpoints_the_taken_one_belongs():
    names = [*WEIGHTS, "checkpoint-5/optimizer.bin", "checkpoint-6/optimizer.bin", "checkpoint-6/global_step6/x_optim_states.pt"]
    assert model_files(names, "checkpoint-6") == sorted([*WEIGHTS, *names[3:]])


def test_a_listing_tells_by_contents_or_by_the_step():
    contents = {"model.safetensors": "same", "trainer_state.json": "t"} | {
        f"checkpoint-{n}/{file}": f"{file}{n}" for n in (5, 6, 10) for file in ("optimizer.pt", "model.safetensors")
    }
    read = {"trainer_state.json": b'{"global_step": 5}'}.get
    assert taken_of(contents | {"checkpoint-6/model.safetensors": "same"}, read) == "checkpoint-6"
    assert taken_of(contents, read) is None, "weights that differ do not fit, whatever the step"
    bare = {name: content for name, content in contents.items() if not name.endswith("/model.safetensors")}
    assert taken_of(bare, read) == "checkpoint-5"
    assert taken_of(bare, lambda _: b"no json") is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of training: its weights are those of checkpoint-4, and three optimizers lie below."""
    folder = tmp_path / "run"
    for step in (2, 4, 6):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"w": torch.full((2,), float(step))}, place / "model.safetensors")
        torch.save({"state": {}, "param_groups": [], "step": step}, place / "optimizer.pt")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"w": torch.full((2,), 4.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_and_its_copy_in_s3_bring_the_same_checkpoint(run: Path, s3_server: S3Test, tmp_path: Path):
    expected = ["checkpoint-4/optimizer.pt", "config.json", "model.safetensors"]
    assert folder_model_files(run) == expected
    upload_folder(run, f"{s3_server.uri}/run")
    there = fetch(f"{s3_server.uri}/run", cache=tmp_path / "cache")
    assert sorted(there.files) == expected
    assert there.digest == fetch(str(run), cache=tmp_path / "cache").digest
    assert (there.path / "checkpoint-4/optimizer.pt").read_bytes() == (run / "checkpoint-4/optimizer.pt").read_bytes()
    assert not (there.path / "checkpoint-6").exists()
