"""Second moments and weights from shards of FSDP and other folders of DCP: equal to the live run's, and clear messages."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ota_core.errors import CheckpointError, MomentsError
from ota_core.files.checkpoint import Checkpoint, weight_files
from ota_core.files.dcp import DcpFolder
from ota_core.moments import ParameterLayout, find_moments, moments_files, open_moments
from tests.ota_core.moments.sharded_fixture import FIXTURES, assert_same, copied, expected

CASES = ["fsdp1", "fsdp2", "fsdp2_tied_bf16"]
STATE = "optimizer_0"


def no_layout() -> ParameterLayout:
    raise AssertionError("names are in the checkpoint")


@pytest.mark.parametrize("case", CASES)
def test_v_is_the_live_optimizer_s(tmp_path, case):
    folder = copied(f"fsdp/{case}", tmp_path)
    assert find_moments(folder) == folder / STATE
    moments = open_moments(folder, layout=no_layout)
    assert_same(moments, expected(f"fsdp/{case}"))
    assert {moments.step(name) for name in moments.shapes()} == {3} and moments.beta2 == 0.95
    assert [file.name for file in moments_files(folder)] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    moments.close()


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_live_model_s(tmp_path, case):
    folder = copied(f"fsdp/{case}", tmp_path)
    (folder / "config.json").rename(tmp_path / "config.json")  # the Trainer leaves it in the folder of the run, if anywhere
    checkpoint, weights = Checkpoint(folder), expected(f"fsdp/{case}", "weights.safetensors")
    tied = {"lm_head.weight"} if "tied" in case else set()  # shards hold a tied tensor under both names
    assert set(checkpoint.names()) == set(weights) | tied and checkpoint.config["model_type"] == "llama"
    for name, own in weights.items():
        info, rows = checkpoint.info(name), own.shape[0]
        assert (info.shape, info.dtype.name) == (tuple(own.shape), str(own.dtype).removeprefix("torch."))
        for step in (rows, 1, 5):
            checkpoint.prefetch(name, 0, step)
            read = [checkpoint.read_rows(name, start, min(start + step, rows)).tensor() for start in range(0, rows, step)]
            assert torch.equal(torch.cat(read).reshape(own.shape), own)
    checkpoint.drop_pages()
    checkpoint.close()
    assert [file.name for file in weight_files(folder)] == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def test_boxes_of_columns_and_of_inner_axes(tmp_path):
    assert_same(open_moments(copied("fsdp/boxes", tmp_path)), expected("fsdp/boxes"))


def save(folder: Path, state: dict) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def adam(**v: torch.Tensor) -> dict:
    return {"state": {name: {"exp_avg_sq": tensor, "step": torch.tensor(7.0)} for name, tensor in v.items()}}


@pytest.mark.parametrize("top", ["optimizer", "optim", None])
def test_wherever_the_optimizer_lies(tmp_path, top):
    v = {"a.weight": torch.rand(3, 4), "a.bias": torch.rand(3)}
    state = adam(**v)
    save(tmp_path / "step-10", {top: state, "model": {"a.weight": torch.zeros(3, 4)}} if top else state)
    moments = open_moments(tmp_path)
    assert_same(moments, v)
    assert find_moments(tmp_path) == tmp_path / "step-10" and moments.step("a.bias") == 7 and moments.beta2 is None


def test_numbered_parameters_get_names(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "raw", {"optimizer": optimizer.state_dict()})
    layout = ParameterLayout(shapes={"weight": (2, 3), "bias": (2,)}, decayed=frozenset({"weight"}))
    moments = open_moments(tmp_path / "raw", layout=layout)
    assert_same(moments, {name: optimizer.state[own]["exp_avg_sq"] for name, own in model.named_parameters()})
    assert moments.beta2 == 0.98
    with pytest.raises(MomentsError, match="numbers its parameters, and without the model's configuration"):
        open_moments(tmp_path / "raw")


def test_tensors_that_are_not_contiguous(tmp_path):
    turned = torch.rand(5, 3).T
    assert_same(open_moments(save(tmp_path / "turned", {"optimizer": adam(w=turned)})), {"w": turned.contiguous()})


def test_a_bare_model_and_one_beside_an_optimizer(tmp_path):
    weights = {"model.norm.weight": torch.rand(4), "lm_head.weight": torch.rand(5, 4, dtype=torch.bfloat16)}
    save(tmp_path / "bare", weights)
    save(tmp_path / "beside", {"model": weights, "optimizer": adam(**weights)})
    save(tmp_path / "flat", weights | {"optimizer": adam(**weights), "train_state": {"step": torch.tensor(3)}})
    for name in ("bare", "beside", "flat"):
        checkpoint = Checkpoint(tmp_path / name)
        assert checkpoint.names() == sorted(weights)
        assert torch.equal(checkpoint.read_rows("lm_head.weight", 1, 3).tensor(), weights["lm_head.weight"][1:3])
    with pytest.raises(CheckpointError, match="without a model's weights among them"):
        Checkpoint(save(tmp_path / "optimizer", {"optimizer": adam(**weights)}))


def test_safetensors_come_before_shards(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    assert Checkpoint(folder).names() == ["w"]


def refused(folder: Path) -> str:
    with pytest.raises(MomentsError) as caught:
        moments = open_moments(folder)
        for name, shape in moments.shapes().items():
            moments.read(name, 0, shape[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_and_a_truncated_rank_file(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path)
    path = folder / STATE / "__1_0.distcp"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert f"{path} is truncated: {size // 2} bytes are there, the metadata says {size}" in refused(folder)
    path.unlink()
    assert f"{path} is missing; it holds one rank's part of the checkpoint: fetch it" in refused(folder)
    shutil.rmtree(folder / STATE)
    weights = folder / "pytorch_model_fsdp_0"
    (weights / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lacks __0_0\.distcp, which its \.metadata names"):
        Checkpoint(folder)


def test_damaged_bytes_within_a_rank_file(tmp_path):
    path = copied("fsdp/fsdp2", tmp_path) / STATE / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    assert re.search(r"__1_0\.distcp.*no (tensor|object) as torch\.save writes it", refused(path.parent))


def test_one_file_of_many(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path)
    for name in (".metadata", "__0_0.distcp"):
        assert "is one file of a checkpoint in many; name its folder instead" in refused(folder / STATE / name)


def test_metadata_that_does_not_cover_a_tensor(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path) / STATE
    saved = pickle.loads((folder / ".metadata").read_bytes())
    entry = saved.state_dict_metadata["optimizer.state.model.norm.weight.exp_avg_sq"]
    entry.chunks = entry.chunks[:1]
    (folder / ".metadata").write_bytes(pickle.dumps(saved))
    assert "the parts of 'optimizer.state.model.norm.weight.exp_avg_sq' do not cover its shape [15]" in refused(folder)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path) / STATE
    saved = pickle.loads((folder / ".metadata").read_bytes())
    saved.planner_data["x"] = Hostile(tmp_path / "ran")
    (folder / ".metadata").write_bytes(pickle.dumps(saved))
    assert "names posix.system, which could run code and is not loaded" in refused(folder)
    inside = save(
        tmp_path / "inside", {"optimizer": adam(w=torch.ones(2)) | {"param_groups": {"0": {"betas": Hostile(tmp_path / "ran")}}}}
    )
    assert "names posix.system, which could run code and is not loaded" in refused(inside)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="which could run code"):
        DcpFolder(folder)


def test_reading_shards_needs_no_torch(tmp_path):
    folder = copied("fsdp/fsdp2", tmp_path)
    program = (
        "import sys; from pathlib import Path; from ota_core.files.checkpoint import Checkpoint; from ota_core.moments import open_moments\n"
        f"folder = Path({str(folder)!r})\n"
        "print(open_moments(folder).read('lm_head.weight', 3, 30).sum() > 0, Checkpoint(folder).read_rows('lm_head.weight', 3, 30).size)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.split() == ["True", str(27 * 15), "False"]


def test_a_merge_of_shards_is_the_merge_of_the_same_files(tmp_path):
    """The engine takes FSDP's folders as they are: the merge has the bytes of that of safetensors files."""
    from ota_core.engine import engine
    from ota_core.recipe.recipe import MergeRecipe

    case, made = "fsdp/fsdp2", {}
    weights, v = expected(case, "weights.safetensors"), expected(case)
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(FIXTURES / case / "config.json", base)
    generator = torch.Generator().manual_seed(1)
    start = {name: own + 0.01 * torch.randn(own.shape, generator=generator) for name, own in weights.items()}
    save_file(start, base / "model.safetensors", {"format": "pt"})
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(FIXTURES / case / "config.json", plain)
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(v, plain / "exp_avg_sq.safetensors", {"step": "3", "beta2": "0.95"})
    sharded = copied(case, tmp_path)
    (sharded / "config.json").unlink()  # the base has it
    for name, expert in (("plain", plain), ("sharded", sharded)):
        recipe = MergeRecipe.model_validate(
            {
                "merge_method": "ota",
                "base_model": str(base),
                "dtype": "float32",
                "models": [{"model": str(expert), "name": "a"}, {"model": str(plain), "name": "b"}],
            }
        )
        engine.merge(recipe, tmp_path / f"out-{name}")
        made[name] = load_file(tmp_path / f"out-{name}" / "model.safetensors")
    assert made["plain"].keys() == made["sharded"].keys()
    assert all(np.array_equal(made["plain"][name].numpy(), made["sharded"][name].numpy()) for name in made["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fsdp1", "fsdp2"])
def test_with_accelerate_on_two_processes(tmp_path, case):
    subprocess.run([sys.executable, FIXTURES / "make_fsdp.py", tmp_path, case], check=True, timeout=600)
    assert_same(open_moments(tmp_path / case / STATE), load_file(tmp_path / case / "expected.safetensors"))
