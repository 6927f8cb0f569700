"""optimizer.pt outside the Trainer's usual path: names, frozen parameters, other optimizers, damage, hostile files."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.errors import MomentsError
from ota_core.moments import ParameterLayout, open_moments

SHAPES = {"embed": (6, 4), "q": (4, 4), "norm": (4,), "o": (4, 4), "norm2": (4,)}
LAYOUT = ParameterLayout(shapes=SHAPES, decayed=frozenset({"embed", "q", "o"}))
TRAINER_ORDER = ["embed", "q", "o", "norm", "norm2"]


def v_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(list(SHAPES).index(name))
    return torch.rand(SHAPES[name], generator=generator) * 1e-12


def state_dict(groups: list[list[str]] | None = None, *, named: bool = False, **options: Any) -> dict[str, Any]:
    groups = groups or [TRAINER_ORDER[:3], TRAINER_ORDER[3:]]
    keys: dict[str, Any] = {name: name if named else i for i, name in enumerate(n for group in groups for n in group)}
    state = {key: {"step": torch.tensor(7.0), "exp_avg": -v_of(n), "exp_avg_sq": v_of(n)} for n, key in keys.items()}
    decay = [0.1, 0.0] if len(groups) == 2 else [0.1] * len(groups)
    made = [
        {"params": [keys[n] for n in group], "betas": (0.9, 0.999), "weight_decay": wd, **options}
        for group, wd in zip(groups, decay, strict=True)
    ]
    return {"state": state, "param_groups": made}


def save(folder: Path, saved: Any, **options: Any) -> Path:
    torch.save(saved, folder / "optimizer.pt", **options)
    return folder / "optimizer.pt"


def opened(folder: Path, saved: Any, layout: ParameterLayout | None = LAYOUT, **options: Any) -> Any:
    return open_moments(save(folder, saved, **options), layout=layout)


def assert_reads(moments: Any, names: list[str]) -> None:
    assert moments.shapes() == {name: SHAPES[name] for name in names}
    for name, shape in SHAPES.items():
        if name in names:
            assert torch.equal(torch.from_numpy(moments.read(name, 0, shape[0])), v_of(name).reshape(shape[0], -1))
            assert torch.equal(torch.from_numpy(moments.read(name, 1, 3)), v_of(name).reshape(shape[0], -1)[1:3])
            assert moments.step(name) == 7
    assert moments.beta2 == 0.999


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_follow_the_groups_in_new_and_legacy_files(tmp_path, zipped):
    assert_reads(opened(tmp_path, state_dict(), _use_new_zipfile_serialization=zipped), TRAINER_ORDER)


def test_one_group_follows_the_layouts_order(tmp_path):
    assert_reads(opened(tmp_path, state_dict([list(SHAPES)])), list(SHAPES))


def test_names_in_the_file_are_used_directly(tmp_path):
    assert_reads(opened(tmp_path, state_dict(named=True), layout=None), TRAINER_ORDER)


def test_param_names_that_torch_saves_for_named_parameters_are_used(tmp_path):
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    optimizer = torch.optim.AdamW(list(reversed(parameters.items())))
    sum((i * p.square()).sum() for i, p in enumerate(parameters.values(), 1)).backward()
    optimizer.step()
    moments = opened(tmp_path, optimizer.state_dict(), layout=None)
    assert moments.shapes().keys() == SHAPES.keys()
    for name, parameter in parameters.items():
        read = moments.read(name, 0, SHAPES[name][0])
        assert np.array_equal(read.reshape(SHAPES[name]), optimizer.state[parameter]["exp_avg_sq"])


def test_parameters_without_state_are_absent(tmp_path):
    saved = state_dict()
    del saved["state"][1]  # q
    saved["state"][3] = {}  # norm
    assert_reads(opened(tmp_path, saved), ["embed", "o", "norm2"])


def test_storage_types_come_out_as_float32_and_strides_are_respected(tmp_path):
    saved = state_dict()
    saved["state"][0]["exp_avg_sq"] = v_of("embed").bfloat16()
    saved["state"][1]["exp_avg_sq"] = v_of("q").T.contiguous().T
    saved["state"][1]["step"] = 7
    moments = opened(tmp_path, saved)
    assert torch.equal(torch.from_numpy(moments.read("embed", 0, 6)), v_of("embed").bfloat16().float())
    assert torch.equal(torch.from_numpy(moments.read("q", 1, 4)), v_of("q")[1:4])
    assert moments.step("q") == 7


def test_blocks_read_before_pages_are_returned_keep_their_values(tmp_path, monkeypatch):
    monkeypatch.setattr("ota_core.moments.trainer.moments.DROP_BYTES", 0)
    moments = opened(tmp_path, state_dict())
    blocks = {name: moments.read(name, 0, SHAPES[name][0]) for name in [*SHAPES, *SHAPES]}
    assert all(np.array_equal(block.reshape(SHAPES[name]), v_of(name)) for name, block in blocks.items())


def test_tensors_saved_on_a_gpu_are_mapped_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = save(tmp_path, state_dict())
    assert b"cuda:0" in path.read_bytes()
    assert_reads(open_moments(path, layout=LAYOUT), TRAINER_ORDER)


def test_a_missing_layout_says_how_to_get_it(tmp_path):
    with pytest.raises(MomentsError, match=r"optimizer\.pt numbers its parameters \(0 to 4\).*config\.json into its folder"):
        opened(tmp_path, state_dict(), layout=None)


def groups_of(count: int) -> dict[str, Any]:
    return state_dict([[name] for name in TRAINER_ORDER[:count]])


def edited(**changes: Any) -> dict[str, Any]:
    saved = state_dict()
    for entry in saved["state"].values():
        del entry["exp_avg_sq"]
        entry.update(changes)
    return saved


def swapped_decay() -> dict[str, Any]:
    saved = state_dict()
    saved["param_groups"][0]["weight_decay"], saved["param_groups"][1]["weight_decay"] = 0.0, 0.1
    return saved


def two_betas() -> dict[str, Any]:
    saved = state_dict()
    saved["param_groups"][1]["betas"] = (0.9, 0.95)
    return saved


def doubled() -> dict[str, Any]:
    saved = state_dict()
    saved["param_groups"][1]["params"] = [0, 1]
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (groups_of(3), "3 parameter groups; one or two were expected"),
        (state_dict([["q", "embed", "o"], ["norm", "norm2"]]), r"parameter 0 \(group 0\) has .*\[4, 4\], embed has \[6, 4\]"),
        (state_dict([["embed", "norm", "o"], ["q", "norm2"]]), r"parameter 1 .*\[4\], q has \[4, 4\]; parameter 3"),
        (state_dict([["embed", "q", "o", "norm"], ["norm2"]]), "group 0 holds 4 parameters, the model has 3"),
        (
            state_dict([["embed", "q"], ["norm", "norm2"]]),
            "some parameters were frozen, and by its shape parameter 1 may be q or o.*name the base model",
        ),
        (state_dict([["q", "embed"], ["norm", "norm2"]]), "shapes do not fit in that order"),
        (
            swapped_decay(),
            "group 0 holds 3 parameters, the model has 2 for it.*other ways in which trainers group parameters fit no better",
        ),
        (two_betas(), "different β₂"),
        (doubled(), "do not fit together"),
        (edited(state1=1, state2=1, qmap2=1), "state of parameter 0 has state2 as a int.*4 more parameters.*ota estimate"),
        (edited(exp_avg_sq_row=1, exp_avg_sq_col=1), "exp_avg_sq_row and exp_avg_sq_col of the shapes int and int"),
        (edited(momentum_buffer=1), "has the keys 'exp_avg', 'momentum_buffer', 'step'; exp_avg_sq, or one"),
        (edited(exp_avg_sq=torch.zeros(2, dtype=torch.uint8)), "not a dense float tensor"),
        ({"state": {}, "param_groups": []}, "holds no second moments: it was saved before the first step"),
        ({"model": 1}, "holds the keys 'model'; an optimizer's state_dict with state and param_groups was expected"),
        ([1], "holds a list"),
        ({"state": [1], "param_groups": [{}]}, "not built as torch builds them"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(tmp_path, saved, message):
    with pytest.raises(MomentsError, match=rf"(?s)optimizer\.pt.*{message}"):
        opened(tmp_path, saved)


def test_a_parameter_without_state_may_stand_for_any_frozen_one(tmp_path):
    saved = state_dict([["embed", "o"], ["norm", "norm2"]])
    del saved["state"][1]  # whether number 1 is q or o does not matter: it has no v
    assert opened(tmp_path, saved).shapes().keys() == {"embed", "norm", "norm2"}


@pytest.mark.parametrize("value", [-1e-30, float("nan"), float("inf")])
def test_bad_entries_name_file_tensor_and_index(tmp_path, value):
    saved = state_dict()
    saved["state"][2]["exp_avg_sq"][2, 3] = value
    moments = opened(tmp_path, saved)
    assert torch.equal(torch.from_numpy(moments.read("o", 0, 2)), v_of("o")[:2])
    message = rf"optimizer\.pt: the second moment of 'o' is {re.escape(str(value)[:2])}.* at index \[2, 3\]"
    with pytest.raises(MomentsError, match=message):
        moments.read("o", 1, 4)
    unchecked = moments.read("o", 1, 4, check=False)
    assert np.array_equal(unchecked, saved["state"][2]["exp_avg_sq"][1:4], equal_nan=True)


def test_bad_steps_are_refused(tmp_path):
    saved = state_dict()
    saved["state"][0]["step"] = torch.tensor(0.0)
    with pytest.raises(MomentsError, match=r"the step of 'embed' is 0\.0, a whole number of at least 1"):
        opened(tmp_path, saved).step("embed")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_hostile_file_is_refused_and_nothing_runs(tmp_path, how):
    saved = state_dict() | {"extra": Hostile(tmp_path / "ran")}
    path = tmp_path / "optimizer.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(saved["extra"], protocol=2))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(MomentsError, match=r"optimizer\.pt .*refused because loading it could run code"):
        open_moments(path, layout=LAYOUT)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, zipped, share):
    path = save(tmp_path, state_dict(), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(MomentsError, match=rf"optimizer\.pt \({path.stat().st_size} bytes\) cannot be read.*truncated"):
        open_moments(path, layout=LAYOUT)


STREAMING = """
import sys, torch
from pathlib import Path
from ota_core.moments import open_moments
def peak():  # the high-water mark, KiB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
import ota_core.moments.trainer.moments
ota_core.moments.trainer.moments.DROP_BYTES = 16 << 20
moments = open_moments(Path(sys.argv[1]))
moments.read("w", 0, 1)
before = peak()
for start in range(0, 256, 8):
    moments.read("w", start, start + 8)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_does_not_follow_the_file(tmp_path):
    w = torch.zeros(256, 1 << 17)  # 128 MiB in blocks of 4 MiB; pages are returned every 16 MiB
    saved = {"state": {"w": {"exp_avg_sq": w}}, "param_groups": [{"params": ["w"], "betas": (0.9, 0.999)}]}
    path = save(tmp_path, saved)
    run = subprocess.run([sys.executable, "-c", STREAMING, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40 * 1024
