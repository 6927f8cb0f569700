"""Second moments from checkpoints of DeepSpeed: equal to the live optimizer's, and one clear message for what is wrong."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ota_core.errors import MomentsError
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import Record
from ota_core.moments import find_moments, moments_files, open_moments
from ota_core.moments.deepspeed.saved import open_saved
from tests.ota_core.moments.sharded_fixture import FIXTURES, LAYOUT, assert_same, copied, expected

CASES = sorted(path.name for path in (FIXTURES / "deepspeed").iterdir() if path.is_dir())
STEP = "global_step3"
RANK1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def open_(folder: Path):
    return open_moments(folder, layout=LAYOUT)


@pytest.mark.parametrize("case", CASES)
def test_v_is_the_live_optimizer_s(tmp_path, case):
    folder = copied(f"deepspeed/{case}", tmp_path)
    moments = open_(folder)
    assert_same(moments, expected(f"deepspeed/{case}"))
    assert {moments.step(name) for name in moments.shapes()} == {3}
    assert moments.beta2 == (None if "elastic" in case else 0.95)  # no settings of DeepSpeed made this optimizer
    moments.close()


def test_all_stages_are_among_the_cases():
    assert len(CASES) == 10 and {"zero0", "zero1", "zero2", "zero3", "universal"} <= set(CASES)


def test_what_is_found_and_what_a_digest_covers(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    step = folder / STEP
    assert find_moments(folder) == find_moments(step) == step
    assert [file.name for file in moments_files(folder)] == [
        "zero_pp_rank_0_mp_rank_00_optim_states.pt", RANK1, "mp_rank_00_model_states.pt"
    ]  # fmt: skip
    assert find_moments(tmp_path) is None
    folder.rename(tmp_path / "checkpoint-3")  # as the Trainer calls it
    assert find_moments(tmp_path) == tmp_path / "checkpoint-3" / STEP


def test_latest_says_which_step(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    shutil.copytree(folder / STEP, folder / "global_step1")
    assert find_moments(folder) == folder / STEP
    (folder / "latest").unlink()
    with pytest.raises(MomentsError, match="holds several second moments: global_step1, global_step3"):
        find_moments(folder)
    (folder / "latest").write_text("global_step7")
    with pytest.raises(MomentsError, match=r"latest names 'global_step7', and .* is no folder of DeepSpeed's"):
        find_moments(folder)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(MomentsError, match="the name of a folder beside it was expected"):
        find_moments(folder)


def refused(folder: Path) -> str:
    with pytest.raises(MomentsError) as caught:
        open_(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_a_missing_rank(tmp_path, case):
    folder = copied(f"deepspeed/{case}", tmp_path)
    (folder / STEP / RANK1).rename(tmp_path / "rank1")
    assert re.search(r"is of a run with 2 ranks, .* holds the files of 1: fetch the files of all ranks", refused(folder))
    (tmp_path / "rank1").rename(folder / STEP / RANK1)
    (folder / STEP / RANK1.replace("rank_1", "rank_0")).unlink()
    assert re.search(r"lacks the optimizer states of rank 0; fetch them", refused(folder))


def test_a_wrong_world_size(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    shutil.copy(folder / STEP / RANK1, folder / STEP / RANK1.replace("rank_1", "rank_2"))
    assert "is of a run with 2 ranks" in refused(folder)


@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_a_truncated_rank_file(tmp_path, case):
    path = copied(f"deepspeed/{case}", tmp_path) / STEP / RANK1
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert re.match(rf"{re.escape(str(path))} \(\d+ bytes\) cannot be read: .* Fetch it again", refused(path.parent))


@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_padding_that_is_not_zero(tmp_path, case):
    path = copied(f"deepspeed/{case}", tmp_path) / STEP / RANK1
    file = open_saved(path, None)
    base = file.saved["optimizer_state_dict"]
    base = base.get("base_optimizer_state") or base["optimizer_state_dict"]
    v = base["state"][0]["exp_avg_sq"]
    # Under ZeRO 3 the first parameter has an odd number of elements, its part on rank 1 ends with one zero.
    place = v.numel - 1 if case == "zero2" else -(-37 * 15 // 2) - 1
    assert file.read_flat(v, place, place + 1) == 0
    offset = file.place(v) + 4 * place
    file.close()
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(np.float32(1e-9).tobytes())
    assert re.search(r"numbers at the end of .* are padding and were expected to be zero", refused(path.parent))


@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_states_of_another_run(tmp_path, case):
    folder, other = (
        copied(f"deepspeed/{case}", tmp_path),
        FIXTURES / "deepspeed" / f"{case}_{'frozen' if case == 'zero2' else 'subgroups'}",
    )
    shutil.copy(other / STEP / RANK1, folder / STEP / RANK1)
    assert re.search("of another run|of different runs", refused(folder))


def test_parts_that_are_not_read(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    assert "holds the part of one rank; name the folder" in refused(folder / STEP / RANK1)
    (folder / STEP / "mp_rank_00_model_states.pt").rename(tmp_path / "model")
    assert "which has the parameters' names and shapes: fetch it" in refused(folder)
    (tmp_path / "model").rename(folder / STEP / "mp_rank_00_model_states.pt")
    (folder / STEP / RANK1).rename(folder / STEP / RANK1.replace("mp_rank_00", "mp_rank_01"))
    assert "part 1 of a model cut by layers or rows" in refused(folder) and "ds_to_universal.py" in refused(folder)


def test_a_checkpoint_without_optimizer(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    for file in (folder / STEP).glob("*optim_states.pt"):
        file.unlink()
    assert "holds no optimizer state, and no *_optim_states.pt of the ranks lie beside it" in refused(folder)


def test_another_optimizer_is_said(tmp_path):
    folder = copied("deepspeed/zero2", tmp_path)
    for file in (folder / STEP).glob("*optim_states.pt"):
        states = {
            "zero_stage": 2,
            "partition_count": 2,
            "base_optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": []},
        }
        torch.save({"optimizer_state_dict": states}, file)
    assert "holds no flat exp_avg_sq (it holds: momentum_buffer)" in refused(folder)


def test_an_elastic_checkpoint_has_its_beta2_in_the_settings_of_deepspeed(tmp_path):
    v = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}
    flat = torch.cat([v["a"].reshape(-1), v["b"]])
    for rank, part in enumerate(flat.split(5)):
        states = {"zero_stage": 2, "partition_count": [2], "base_optimizer_state": [{"step": 7, "exp_avg_sq": part.clone()}]}
        made = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.97]}}}
        torch.save({"optimizer_state_dict": states, "ds_config": made}, tmp_path / RANK1.replace("rank_1", f"rank_{rank}"))
    torch.save({"param_shapes": [{name: one.shape for name, one in v.items()}]}, tmp_path / "mp_rank_00_model_states.pt")
    moments = open_(tmp_path)
    assert_same(moments, v)
    assert moments.beta2 == 0.97 and moments.step("a") == 7


def test_a_universal_checkpoint_lacks_a_parameter(tmp_path):
    folder = copied("deepspeed/universal", tmp_path)
    (folder / f"{STEP}_universal/zero/model.norm.weight/exp_avg_sq.pt").unlink()
    assert "lacks exp_avg_sq.pt of 1 parameters, such as model.norm.weight" in refused(folder)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", [RANK1, "mp_rank_00_model_states.pt"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name):
    folder = copied("deepspeed/zero2", tmp_path)
    torch.save({"optimizer_state_dict": Hostile(tmp_path / "ran")}, folder / STEP / name)
    assert "which is refused because loading it could run code" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_records_do_not_run_the_class(tmp_path, monkeypatch):
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Settings:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import deepspeed

    assert Path(deepspeed.__file__).parent == package
    torch.save(deepspeed.Settings(), tmp_path / "settings.pt")
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(sys.modules, "deepspeed")
    made = TorchFile(tmp_path / "settings.pt", None, ["deepspeed."]).saved
    assert isinstance(made, Record) and type(made).__module__ != "deepspeed" and not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: the extra 'trainers' has it"
)
@pytest.mark.parametrize("case", ["zero2", "zero3"])
def test_with_the_real_library(tmp_path, case):
    script = FIXTURES / "make_deepspeed.py"
    subprocess.run([sys.executable, script, tmp_path, case], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, timeout=600)
    from safetensors.torch import load_file

    v = load_file(tmp_path / case / "expected.safetensors")
    (tmp_path / case / "expected.safetensors").unlink()
    assert_same(open_(tmp_path / case), v)
