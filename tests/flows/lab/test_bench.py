"""``ota bench`` from end to end on a tiny model: every column in the JSON, a picture, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.lab.speed import Options, run_bench
from ota_core.errors import OtaError
from tasks.local.speed.cases import FLOW_STAGES, STAGES

ROOT = Path(__file__).parents[3]
COLUMNS = {
    "name", "what", "parameters", "experts", "command", "input_bytes", "output_bytes", "planned_read_bytes", "in_page_cache",
    "runs", "floor", "target", "stages_sum", "skipped", "seconds", "cpu_seconds", "stage_seconds", "peak_bytes",
    "command_ratio", "stage_ratio", "stage_ratio_without_fsync",
    "overhead_seconds", "one_file_seconds", "one_file_ratio", "met",
}  # fmt: skip


def options(out: Path, **changes: object) -> Options:
    known = {
        "sizes": (0.001,), "experts": (2,), "runs": 1, "out": out, "keep": False, "device": "cpu",
        "stages": None, "flow": False, "mergekit": False,
    }  # fmt: skip
    return Options(**{**known, **changes})  # type: ignore[arg-type]


def bench(out: Path, *arguments: str) -> tuple[str, dict[str, object]]:
    command = [sys.executable, "-m", "flows.cli", "bench", "--sizes", "0.001", "--experts", "2", "--runs", "1", "--out", str(out)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "bench.json").read_text())


def check(found: dict[str, object], out: Path) -> dict[str, dict[str, object]]:
    """What holds for every benchmark. Returns the cases by name."""
    (combination,) = found["combinations"]  # type: ignore[misc]
    cases = {one["name"]: one for one in combination["cases"]}
    assert all(set(one) == COLUMNS for one in cases.values())
    for one in cases.values():
        assert len(one["runs"]) == 1
        assert one["seconds"] > 0 and one["peak_bytes"] > 5e6
        if one["floor"]:
            total = sum(one["floor"].values())
            assert one["command_ratio"] == pytest.approx(one["seconds"] / total)
            assert one["command_ratio"] > 1
            assert one["output_bytes"] > 0
        if one["stage_seconds"]:
            assert one["stage_seconds"] < one["seconds"]
    assert len(combination["floor_rounds"]) == 2
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} <= {"bench.json", "bench.png", "models", "prefect-server", "prefect-temp"}
    assert list((out / "models").iterdir()) == []  # not kept
    return cases


def test_a_tiny_benchmark(tmp_path: Path) -> None:
    text, found = bench(tmp_path, "--no-flow", "--stages", "compress,ota-density")
    cases = check(found, tmp_path)
    assert list(cases) == ["compress", "ota-density"]
    model = cases["ota-density"]["parameters"] * 2  # type: ignore[operator]
    assert cases["ota-density"]["input_bytes"] == pytest.approx(3 * model + 2 * 2 * model, rel=0.02)
    assert cases["ota-density"]["planned_read_bytes"] > cases["ota-density"]["input_bytes"]  # type: ignore[operator]
    assert cases["compress"]["output_bytes"] < model / 4
    assert cases["ota-density"]["output_bytes"] >= model  # type: ignore[operator]
    assert all(one["met"] is None for one in cases.values())  # targets hold for the reference size
    assert all(one["stage_seconds"] for one in cases.values())
    for word in ("compress", "ota-density", "The floor", "wall", "peak memory"):
        assert word in text
    table = [line for line in text.splitlines() if line.startswith(("case", "compress ", "ota-density "))]
    assert len(table) == 3
    assert max(map(len, table)) <= 120 and "…" not in "".join(table)


@pytest.mark.slow
def test_every_case_of_a_tiny_benchmark(tmp_path: Path) -> None:
    text, found = bench(tmp_path)
    cases = check(found, tmp_path)
    assert list(cases) == [name for name in {**STAGES, **FLOW_STAGES} if not name.startswith("mergekit")]
    # A target in seconds holds for every size; whether it is met is the machine's affair.
    assert cases["help"]["met"] is (cases["help"]["seconds"] <= 0.5)  # type: ignore[operator]
    for kind in ("temp", "server"):
        assert cases[f"flow-cached-{kind}"]["seconds"] < cases[f"flow-fresh-{kind}"]["seconds"]  # type: ignore[operator]
        assert cases[f"flow-fresh-{kind}"]["overhead_seconds"] is not None
    assert set(cases["staged"]["runs"][0]["stage_seconds"]) == {"fetch", "compress", "mask", "merge"}  # type: ignore[index]
    assert "flow-cached-server" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": (1e6,)}, r"GB free; needed are 1e\+06 B × 2: .* GB"),
        ({"experts": (1,)}, "experts: got 1, expected at least 2"),
        ({"runs": 0}, "runs: at least one"),
        ({"sizes": ()}, "at least one of each"),
        ({"stages": ("tise",)}, "stages: got tise"),
        ({"sizes": (0.0001,)}, "size: got 0.0001"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(OtaError, match=message):
        list(run_bench(options(out, **changes), lambda *_: None))
    assert not (out / "models").exists()


def test_a_word_for_a_number(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "bench", "--sizes", "big", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--sizes: got 'big'" in done.stderr and "Traceback" not in done.stderr
