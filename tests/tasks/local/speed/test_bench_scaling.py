"""The paper exercise follows from its constants; bytes are counted, the slowest resource sets the time."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ota_core.errors import OtaError
from tasks.local.speed import scaling as bench_scaling
from tasks.local.speed.machine import machine
from tasks.local.speed.measure import Run
from tasks.local.speed.results import Bench, CaseResult, Combination
from tasks.local.speed.scaling import Constants, Hardware, passes, resident, time_of

GIB = 2**30


def case(name: str, seconds: float, *, cached: bool = True) -> CaseResult:
    run = Run(
        seconds=seconds + 2, user_seconds=1, system_seconds=1, peak_bytes=GIB, call_read_bytes=0, call_written_bytes=0, disk_read_bytes=0,
        disk_written_bytes=0, stage_seconds={"merge": seconds},
    )  # fmt: skip
    return CaseResult(name=name, what=name, parameters=10**9, experts=2, runs=[run], in_page_cache=cached)


def bench(*cases: CaseResult) -> Bench:
    combination = Combination(billions=1, parameters=10**9, experts=2, build_seconds=1, cases=list(cases), floor_rounds=[])
    here = machine().model_copy(update={"cores": 4})
    return Bench(machine=here, floor_definition="", notes=[], combinations=[combination])


MEASURED = bench(case("ota-threshold", 4.0), case("ota-density", 7.0), case("compress", 0.5))


def test_constants_are_core_seconds_of_an_element_and_expert() -> None:
    found = Constants.of(MEASURED)
    assert (found.merge, found.ranking, found.compress) == pytest.approx((4 * 4 / 2e9, 3 * 4 / 2e9, 0.5 * 4 / 1e9))
    assert (found.resident, found.threads) == (GIB, 4)


def test_what_was_not_in_the_page_cache_gives_no_constants() -> None:
    with pytest.raises(OtaError, match="ota-threshold, ota-density and compress"):
        Constants.of(bench(case("ota-threshold", 4.0, cached=False), case("ota-density", 7.0), case("compress", 0.5)))


def test_bytes_of_the_passes() -> None:
    constants = Constants.of(MEASURED)
    full = passes(1e9, constants, compressed=False)
    assert [(one.what, one.read, one.written) for one in full] == [("thresholds", 32e9, 0), ("merge", 32e9, 2e9)]
    compressed = passes(1e9, constants, compressed=True)
    assert passes(1e9, constants, compressed=False, rounds=2)[0].read == 64e9
    assert [(one.what, one.read) for one in compressed] == [("compress", 20e9), ("thresholds", 12e9), ("merge", 12e9)]


def test_the_slowest_resource_sets_the_time() -> None:
    step = passes(1e9, Constants.of(MEASURED), compressed=False)[1]  # 32 GB read, 2 GB written, 5e9 × 8 ns = 40 core-seconds
    slow_disk = Hardware(name="", cores=8, read=2.0, write=100.0, source="disk")
    few_cores = Hardware(name="", cores=1, read=100.0, write=100.0, source="disk")
    slow_writes = Hardware(name="", cores=100, hosts=20, read=100.0, write=0.1, source="disk")
    assert time_of(step, slow_disk) == (pytest.approx(16.0), "disk")
    assert time_of(step, few_cores) == (pytest.approx(40.0), "processors")
    assert time_of(step, slow_writes) == (pytest.approx(20.0), "writing")


def test_a_merge_takes_eight_threads_on_each_machine() -> None:
    assert Hardware(name="", cores=64, read=1.0, write=1.0, source="disk").threads == 8
    assert Hardware(name="", cores=64, read=1.0, write=1.0, source="network", hosts=4).threads == 32
    assert Hardware(name="", cores=6, read=1.0, write=1.0, source="network", hosts=3).threads == 6


def test_memory_grows_with_threads_and_with_factors_only() -> None:
    constants = Constants.of(MEASURED)
    small = Hardware(name="", cores=2, read=1.0, write=1.0, source="disk")
    large = Hardware(name="", cores=64, read=1.0, write=1.0, source="disk")
    assert resident(constants, small, 8, compressed=False) == resident(constants, small, 405, compressed=False) == GIB
    assert resident(constants, large, 8, compressed=False) > GIB
    factors = resident(constants, small, 405, compressed=True) - GIB
    assert factors == pytest.approx(5 * 405e9 * 8 / 16384)


def test_the_command_prints_both_tables(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(MEASURED.model_dump_json())
    import typer

    app = typer.Typer()
    app.command()(bench_scaling.main)
    shown = CliRunner().invoke(app, [str(tmp_path / "bench.json")])
    assert shown.exit_code == 0
    assert shown.output.count("| 405 B |") == 6 and "rank1 second moments" in shown.output
