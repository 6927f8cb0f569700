"""Files of torch.save are read without torch, and nothing in their pickles can run, allocate without bounds, or change this process."""

import collections
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import Refused, SavedTensor, unpickle

FIXTURES = Path(__file__).parents[2] / "fixtures"

WITHOUT_TORCH = """
import sys
from pathlib import Path
from ota_core.moments import ParameterLayout, open_moments
moments = open_moments(Path(sys.argv[1]), layout=ParameterLayout(shapes={}, decayed=frozenset()))
for name, shape in moments.shapes().items():
    moments.read(name, 0, shape[0])
    moments.step(name)
print("torch" in sys.modules, len(moments.shapes()))
"""


@pytest.mark.parametrize("case", ["deepspeed/zero3", "deepspeed/zero2", "deepspeed/universal", "fsdp/fsdp2"])
def test_shards_are_read_without_torch(case: str) -> None:
    folder = FIXTURES / "trainers" / case
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert run.stdout.startswith("False"), run.stdout + run.stderr


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_every_type_and_stride_reads_as_torch_loads_it(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    whole = torch.arange(60).reshape(5, 12).to(dtype)
    saved = {
        "whole": whole, "turned": whole.T, "part": whole[1:4, 3:9], "row": whole[2], "scalar": whole[3, 4], "empty": whole[:0],
        "parameter": torch.nn.Parameter(whole, requires_grad=False),
    }  # fmt: skip
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    file = TorchFile(tmp_path / "a.pt")
    for name, tensor in saved.items():
        own = file.saved[name]
        assert isinstance(own, SavedTensor) and own.shape == tuple(tensor.shape) and own.contiguous == tensor.is_contiguous()
        rows = tensor.shape[0] if tensor.ndim else 1
        read = file.read_rows(own, 0, rows).tensor()
        assert read.dtype == dtype and torch.equal(read.reshape(tensor.shape), tensor.detach())
    assert file.number(file.saved["scalar"]) == float(whole[3, 4])


class Calls:
    """A pickle that calls a function by its name."""

    def __init__(self, module: str, name: str, *arguments: Any, state: Any = None) -> None:
        self.written = b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R"
        if state is not None:
            self.written += pickle.dumps(state, 2)[2:-1] + b"b"
        self.written += b"."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch", "hub"), ("functools", "partial"),
        ("numpy.core.multiarray", "_reconstruct"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_hostile"),
        ("torch.nn.parameter", "os"), ("operator", "attrgetter"), ("deepspeed", "Settings"),
    ],
)  # fmt: skip
def test_names_that_are_not_known_are_refused(module: str, name: str) -> None:
    with pytest.raises(Refused) as caught:
        unpickle(Calls(module, name, "x").written)
    assert caught.value.name == f"{module}.{name}"


def test_what_is_known_cannot_be_changed_or_made_to_allocate() -> None:
    before = dict(vars(collections.Counter))
    # BUILD with a pair sets attributes of whatever lies on the stack, also of functions and classes.
    for module, name in (
        ("collections", "Counter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._tensor", "_rebuild_from_type_v2"),
    ):
        changing = b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((None, {"update": 1}), 2)[2:-1] + b"b."
        with pytest.raises(pickle.UnpicklingError, match="would change"):
            unpickle(changing)
    assert dict(vars(collections.Counter)) == before
    with pytest.raises(pickle.UnpicklingError, match="bytes are described"):
        unpickle(Calls("builtins", "bytearray", 1 << 60).written)


def test_a_tensor_cannot_be_given_other_strides_once_it_is_made(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4, 7)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                at = content.rindex(b"R") + 1
                content = content[:at] + pickle.dumps({"stride": (-1 << 40, 1)}, 2)[2:-1] + b"b" + content[at:]
            new.writestr(info.filename, content)
    with pytest.raises(pickle.UnpicklingError, match="would change a SavedTensor"):
        TorchFile(tmp_path / "b.pt")


def test_a_negative_stride_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="begins at"):
        from ota_core.files.pickled.unpickle import _Storage, _tensor

        _tensor(_Storage("float32", "0", 28), 0, (4, 7), (-7, 1))


def test_types_that_are_not_read_are_said(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.pt")
    file = TorchFile(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"numbers of the type \w*[cC]omplex\w*, which is not read"):
        file.check(file.saved.values())


def test_an_old_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": np.float64(3).item()}, 2))
    with pytest.raises(ValueError, match=r"does not begin as torch\.save begins a file"):
        TorchFile(tmp_path / "a.pt")
    torch.save({"w": torch.ones(300)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    os.truncate(tmp_path / "b.pt", (tmp_path / "b.pt").stat().st_size - 5)
    with pytest.raises(ValueError, match=r"its storage \d+ ends at byte \d+, the file has \d+ bytes"):
        TorchFile(tmp_path / "b.pt")
