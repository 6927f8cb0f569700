"""Second moments kept by trainings in two processes: each parameter's v as the live optimizer's, gathered by another road."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ota_core.moments import open_moments
from ota_core.moments.compression import compression_of
from tests.ota_core.capture.test_capture import read_all
from tests.servers import free_port

ROOT = Path(__file__).parents[3]
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (extra 'trainers')")


def run(kind: str, folder: Path, method: str, processes: int = 2) -> dict[str, torch.Tensor]:
    """Train, capture into the folder, and give back v as process 0 saw it in the live optimizer."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.ota_core.capture.training", kind, str(folder), method]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    live: dict[str, torch.Tensor] = torch.load(folder / "live.pt")
    (folder / "live.pt").unlink()
    return live


@pytest.mark.parametrize(
    "kind",
    ["ddp", "fsdp1", "fsdp2", *(pytest.param(f"zero{stage}", marks=deepspeed) for stage in (1, 2, 3))],
)
def test_every_process_writes_its_part(tmp_path: Path, kind: str) -> None:
    live = run(kind, tmp_path / "out", "none")
    found = read_all(tmp_path / "out")
    assert len(live) == 20 and found.keys() == live.keys()
    assert all(torch.equal(found[name], v) and v.any() for name, v in live.items())
    moments = open_moments(tmp_path / "out")
    assert {moments.step(name) for name in live} == {3} and moments.beta2 == 0.999
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    if kind == "ddp":
        assert names == ["exp_avg_sq.safetensors"], "every process holds the same"
        return
    assert names == [*(f"exp_avg_sq-0000{i}-of-00002.safetensors" for i in (1, 2)), "exp_avg_sq.safetensors.index.json"]
    sizes = [(tmp_path / "out" / name).stat().st_size for name in names[:2]]
    assert max(sizes) < 1.1 * min(sizes), "the processes write about as much each"
    placed = json.loads((tmp_path / "out" / names[2]).read_text())["weight_map"]
    assert placed.keys() == live.keys() and set(placed.values()) == set(names[:2])


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=deepspeed)])
def test_rank1_is_one_small_file(tmp_path: Path, kind: str) -> None:
    live = run(kind, tmp_path / "out", "rank1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["exp_avg_sq.safetensors"]
    moments = open_moments(tmp_path / "out")
    assert compression_of(moments) == "rank1" and moments.shapes().keys() == live.keys()
    for name, v in read_all(tmp_path / "out").items():
        wanted = live[name]
        if wanted.ndim == 2:
            wanted = wanted.sum(1, keepdim=True).double() / wanted.double().sum() * wanted.double().sum(0)
        torch.testing.assert_close(v, wanted.float(), rtol=1e-5, atol=0)
