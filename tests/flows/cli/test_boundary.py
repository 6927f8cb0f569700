"""Every command ends what nobody has foreseen, and an interruption, in order; a flow's state says what the command said."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ota_core.errors import OtaError
from tests.flows.cli.typed import invoke

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "merge": (["merge", "RECIPE", "OUT"], "ota_core.engine.engine.merge"),
    "plan": (["plan", "RECIPE"], "tasks.merging.stages.read_stages"),
    "compress": (["compress", "expert0", "OUT"], "tasks.storage.models.fetch"),
    "push": (
        ["push", "expert0", "PREFIX", "--capability", "math", "--base-model", "base"],
        "tasks.experts.push.push_expert",
    ),
}
FLOWS = {
    "run": (["run", "RECIPE", "--suite", "none"], "flows.merge.fetch_models", "merge"),
    "search": (["search", "RECIPE", "OUT", "--suite", "demo-validation"], "flows.search.Benchmark.of", "search"),
    "tune": (["tune", "RECIPE", "OUT", "--suite", "demo-validation"], "flows.tune.Benchmark.of", "tune"),
    "study": (["study", str(ROOT / "deployments" / "studies" / "demo.yaml")], "flows.study.resolve_store", "study"),
}
FAULT = "LookupError: what nobody has foreseen (this is a fault of the program"


def arguments(template: list[str], recipe: Path) -> list[str]:
    places = {"RECIPE": str(recipe), "OUT": str(recipe.parent / "out"), "PREFIX": str(recipe.parent / "prefix")}
    return [places.get(part, part) for part in template]


def broken(error: Exception) -> Any:
    def breaks(*_: Any, **__: Any) -> None:
        raise error

    return breaks


def check_fault(done: Any, home: Path) -> None:
    assert done.exit_code == 2 and FAULT in done.stderr and "Traceback" not in done.stderr, (done.output, done.exception)
    log = Path(re.search(r"the details are in (\S+\.log)", done.stderr)[1])  # type: ignore[index]
    assert log.parent == home / "logs" and "in breaks" in log.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    template, target = COMMANDS[name]
    monkeypatch.setattr(target, broken(LookupError("what nobody has foreseen")))
    check_fault(invoke(*arguments(template, recipe)), tmp_path / "home")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("foreseen", [False, True], ids=["fault", "mistake"])
def test_a_flow(
    name: str, foreseen: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: None
) -> None:
    template, target, flow = FLOWS[name]
    error = OtaError(f"{tmp_path} says \x1b[31mred") if foreseen else LookupError("what nobody has foreseen")
    monkeypatch.setattr(target, broken(error))
    done = invoke(*arguments(template, recipe))
    state = newest_state(flow)
    assert state.is_failed()
    if foreseen:
        assert done.exit_code == 2 and f"Error: {tmp_path} says \\x1b[31mred\n" in done.stderr, (done.output, done.exception)
        assert f"{tmp_path} says \\x1b[31mred" in state.message and not (tmp_path / "home" / "logs").exists()
    else:
        check_fault(done, tmp_path / "home")
        assert "what nobody has foreseen" in state.message


def newest_state(flow: str) -> Any:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), sort=FlowRunSort.START_TIME_DESC, limit=1
        )
    return run.state


def test_a_mistake_in_what_is_imported_is_a_fault(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands import what they need when they are called."""
    monkeypatch.setitem(sys.modules, "tasks.merging.stages", None)
    done = invoke("plan", recipe)
    assert done.exit_code == 2 and "this is a fault of the program" in done.stderr and done.exception.__class__ is SystemExit


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_an_interruption_ends_in_order(sent: signal.Signals, code: int | None, recipe: Path, tmp_path: Path) -> None:
    """In the middle of writing: no output, no temporaries, no traceback."""
    script = (
        "import os, signal, sys, time\nfrom ota_core.files.writer import SafetensorsWriter\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"def stop(*_):\n    os.kill(os.getpid(), {int(sent)}); time.sleep(1)\n"
        "SafetensorsWriter.write_rows = stop\nfrom flows.cli.app import app\nsys.argv = ['ota', *sys.argv[1:]]\napp()"
    )
    before = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", script, "merge", str(recipe), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OTA_HOME": str(tmp_path / "home")}, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, 2) and (code is None or done.returncode == code) and "Traceback" not in done.stderr, done
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == before - {"home"}


def test_who_reads_the_output_may_go(recipe: Path, tmp_path: Path) -> None:
    """``ota plan recipe.yaml | head -1``: no message, and no file of a fault."""
    script = "import sys\nfrom flows.cli.app import app\nsys.argv = ['ota', *sys.argv[1:]]\napp()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, "plan", str(recipe)], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OTA_HOME": str(tmp_path / "home")}, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 1 and "fault" not in done.stderr and not (tmp_path / "home" / "logs").exists(), done


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("~nouser-of-this-machine/x", "home"),
        ("x" * 300, "File name too long"),
        ("LOOP", ""),
        ("a\x1b[31mb", "\\x1b[31m"),
        ("\udcff", ""),
    ],
    ids=["nouser", "long", "loop", "escape", "bytes"],
)
@pytest.mark.parametrize("command", ["inspect", "merge", "plan", "compress"])
def test_paths_that_are_none(command: str, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / "loop") if source == "LOOP" else source
    done = invoke(command, path, *([tmp_path / "out"] if command in ("merge", "compress") else []))
    assert done.exit_code == 2 and "fault of the program" not in done.stderr and "\x1b" not in done.stderr, done.stderr
    assert 0 < len(done.stderr) < 4096 and isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("model", ["~nouser-of-this-machine/x", "x" * 300, "loop", "loop/x", "a'b"])
@pytest.mark.parametrize("key", ["base_model", "model", "preconditioner_path", "scales"])
def test_paths_in_a_recipe_that_are_none(model: str, key: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    raw: dict[str, Any] = {"merge_method": "ota", "base_model": "base", "models": [{"model": "expert0"}, {"model": "expert1"}]}
    if key in ("model", "preconditioner_path"):
        raw["models"][0] |= {"model": model} if key == "model" else {"parameters": {"preconditioner_path": model}}
    else:
        raw[key] = model
    recipe.write_text(json.dumps(raw))
    for command in (["plan", recipe], ["merge", recipe, tmp_path / "out"]):
        done = invoke(*command)
        assert done.exit_code == 2 and "fault of the program" not in done.stderr and len(done.stderr) < 4096, done.stderr
    assert not (tmp_path / "out").exists()
