"""What the benchmark measures is what happened: time, memory of the child alone, bytes, floors and ratios."""

import sys
from pathlib import Path

import pytest

from ota_core.errors import OtaError
from tasks.local.speed.cases import STAGES, chosen
from tasks.local.speed.machine import machine
from tasks.local.speed.measure import CHUNK, Floor, FloorRound, Run, floor_of, measure_floor, run_command
from tasks.local.speed.report import findings
from tasks.local.speed.results import Bench, CaseResult, Combination, Target

MIB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_run_is_measured(tmp_path: Path) -> None:
    code = f"import time, json; time.sleep(0.3); open({str(tmp_path / 'out')!r}, 'wb').write(bytes(5_000_000)); print('x'); print(json.dumps({{'seconds': {{'merge': 0.25}}}}))"
    run = run_command(python(code), logs=tmp_path / "logs")
    assert 0.3 < run.seconds < 30
    assert run.user_seconds + run.system_seconds < run.seconds
    assert run.stage_seconds == {"merge": 0.25}


def test_memory_is_that_of_the_child_alone(tmp_path: Path) -> None:
    ballast = bytearray(300 * MIB)  # of the process that measures
    ballast[::4096] = b"x" * len(ballast[::4096])
    small = run_command(python("pass"), logs=tmp_path / "small")
    large = run_command(python(f"x = bytearray({200 * MIB}); x[::4096] = b'x' * len(x[::4096])"), logs=tmp_path / "large")
    assert small.peak_bytes < 100 * MIB
    assert 190 * MIB <= large.peak_bytes - small.peak_bytes < 260 * MIB  # the two interpreters differ by a few pages


def test_mapped_pages_count_as_memory(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"x" * (100 * MIB))
    code = f"import mmap; f = open({str(tmp_path / 'mapped')!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[i] for i in range(0, len(m), 4096))"
    assert run_command(python(code), logs=tmp_path / "logs").peak_bytes > 100 * MIB


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(OtaError, match=r"ended with code 3(?s:.*)no luck"):
        run_command(python("import sys; print('no luck', file=sys.stderr); sys.exit(3)"), logs=tmp_path)
    with pytest.raises(OtaError, match="ended with code"):
        run_command(["/no/such/program"], logs=tmp_path)


def test_the_environment_of_the_user_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://example.invalid")
    monkeypatch.setenv("OTA_HOME", "/nowhere")
    code = "import os; assert 'PREFECT_API_URL' not in os.environ and os.environ['OTA_HOME'] == '/given'"
    run_command(python(code), logs=tmp_path, environment={"OTA_HOME": "/given"})


def test_the_floor_reads_every_file_and_writes_every_size(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"x" * (3 * CHUNK + 5))
    files[1].write_bytes(b"")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = measure_floor(files, [0, CHUNK + 1], scratch)
    assert set(found.read_seconds) == {str(file) for file in files}
    assert found.read_seconds[str(files[0])] > found.read_seconds[str(files[1])] > 0
    assert set(found.write_seconds) == set(found.fsync_seconds) == {0, CHUNK + 1}
    assert found.write_seconds[CHUNK + 1] > found.write_seconds[0]
    assert list(scratch.iterdir()) == []


def rounds() -> list[FloorRound]:
    return [
        FloorRound(read_seconds={"/a": a, "/b": 2.0}, write_seconds={10: 1.0, 20: w}, fsync_seconds={10: 0.5, 20: 4.0})
        for a, w in ((1.0, 2.0), (9.0, 2.5), (2.0, 9.0))
    ]


def test_the_floor_of_a_case_is_the_median_over_the_rounds() -> None:
    floor = floor_of(rounds(), [Path("/a"), Path("/b")], 20)
    assert (floor.read, floor.write, floor.fsync) == (4.0, 2.5, 4.0)
    assert floor.total == 10.5
    assert floor_of(rounds(), [Path("/b")], 10) == Floor(read=2.0, write=1.0, fsync=0.5)


def run(seconds: float, stage: float | None = None, peak: int = 100 * MIB) -> Run:
    return Run(
        seconds=seconds, user_seconds=seconds, system_seconds=1.0, peak_bytes=peak,
        stage_seconds={} if stage is None else {"prepare": 1.0, "merge": stage - 1.0},
    )  # fmt: skip


def case(name: str = "linear", **more: object) -> CaseResult:
    known = {"name": name, "what": STAGES[name], "parameters": 450_000_000, "experts": 3}
    return CaseResult.model_validate({**known, **more})


def test_ratios() -> None:
    floor = Floor(read=1.0, write=2.0, fsync=1.0)
    result = case(runs=[run(9, 6), run(8, 5), run(30, 25)], floor=floor, target=Target(kind="ratio", limit=2.0))
    assert (result.seconds, result.stage_seconds, result.cpu_seconds, result.peak_bytes) == (9, 6, 10, 100 * MIB)
    assert result.command_ratio == 9 / 4
    assert (result.stage_ratio, result.stage_ratio_without_fsync) == (1.5, 2.0)
    assert result.met is False
    assert result.model_copy(update={"target": Target(kind="ratio", limit=2.25)}).met is True
    assert result.model_copy(update={"target": None}).met is None  # at another size nothing is promised
    stored = result.model_dump()
    assert {"command_ratio", "stage_ratio", "met", "seconds", "peak_bytes"} <= stored.keys()


def test_overhead_of_a_flow() -> None:
    result = case("staged", runs=[run(20)], stages_sum=11.0, target=Target(kind="overhead", limit=10))
    assert result.overhead_seconds == 9.0
    assert result.met is True
    assert result.command_ratio is None


def test_nothing_is_said_of_what_did_not_run() -> None:
    result = case(target=Target(kind="ratio", limit=2.0), skipped="not installed")
    assert (result.seconds, result.command_ratio, result.met, result.peak_bytes) == (None, None, None, None)


def test_findings_compare_memory_with_its_target_over_the_sizes() -> None:
    results = [
        case(parameters=450_000_000, runs=[run(5, 4, 500 * MIB)]),
        case(parameters=1_800_000_000, runs=[run(20, 16, 900 * MIB)]),
    ]
    combinations = [
        Combination(billions=1, parameters=r.parameters, experts=3, build_seconds=1, cases=[r], floor_rounds=[]) for r in results
    ]
    bench = Bench(machine=machine(), floor_definition="", notes=[], combinations=combinations)
    text = "\n".join(findings(bench))
    assert "at most 900 MiB (linear, 1.80 B × 3); target 1024 MiB: met" in text


def test_stages_are_chosen_by_name() -> None:
    assert chosen(["ties", "linear"], flow=True, mergekit=False) == ["linear", "ties"]
    assert "mergekit-ties" not in chosen(None, flow=False, mergekit=False)
    assert not any(name.startswith("flow") for name in chosen(None, flow=False, mergekit=True))
    assert chosen(["flow-fresh-server"], flow=True, mergekit=False) == ["staged", "flow-fresh-server"]
    with pytest.raises(OtaError, match="stages: got tise; expected some of compress"):
        chosen(["tise"], flow=True, mergekit=False)
