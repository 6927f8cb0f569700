"""Pushing an expert and listing experts as a person types it, and the event that a real Prefect server then knows."""

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.errors import OtaError
from tasks.experts.check import check
from tasks.experts.find import find_experts
from tasks.orchestration.events import EXPERT_ARRIVED, expert_arrived
from tasks.settings import places
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.models import EXPERT_JSON, fetch, upload_folder
from tests.checkpoints import SHAPES, random_base, random_expert, write_checkpoint, write_expert
from tests.flows.cli.typed import ota, refused
from tests.ota_core.files.tiny_adapters import tiny_base, write_adapter
from tests.servers import S3Test, wait_until

BASE = "s3://models/base"
TIME = 1_764_009_005  # 2025-11-24T18:30:05 UTC
EXPERT = random_expert(random_base(), 1, step=100, beta2=0.99)


def push(folder: Path, prefix: object, *options: str, base: str = BASE, run: Callable[..., Any] = ota) -> Any:
    return run("push", folder, prefix, "--capability", "math", "--base-model", base, *options)


no_push = partial(push, run=refused)


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What a training run leaves, written at a known time."""
    folder = write_expert(tmp_path / "trained", EXPERT)
    (folder / "trainer_state.json").write_text('{"global_step": 120}')
    (folder / "training_args.bin").write_bytes(b"not the model's")
    for path in folder.iterdir():
        os.utime(path, (TIME, TIME))
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def manifest_of(uri: str) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(f"{uri}/{EXPERT_JSON}")))


@pytest.fixture
def no_server() -> Iterator[None]:
    """No Prefect server is configured, whatever other tests of the session have started."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def test_push_and_list(
    trained: Path, tmp_path: Path, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch, no_server: None
) -> None:
    sent: list[str] = []
    real = s3.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, content, **options: sent.extend([one.uri for one in s3.list_objects(s3_server.uri)]) or real(uri, content, **options))  # fmt: skip
    before = state(trained)
    result = push(trained, f"{s3_server.uri}/experts/", base=BASE + "/")
    uri = f"{s3_server.uri}/experts/math/2025-11-24T18-30-05"
    assert f"{uri}: pushed" in result.stdout and "PREFECT_API_URL names no server" in result.stdout
    assert state(trained) == before, "the user's folder was written to"
    # Everything else was there when the manifest was written, and nothing but the model's files.
    assert sorted(sent) == [f"{uri}/{name}" for name in ("config.json", "exp_avg_sq.safetensors", "model.safetensors")]
    manifest = manifest_of(uri)
    assert {key: manifest[key] for key in ("capability", "base_model", "trained_at", "step", "beta2")} == {
        "capability": "math", "base_model": BASE, "trained_at": "2025-11-24T18:30:05+00:00", "step": 100, "beta2": 0.99,
    }  # fmt: skip
    assert fetch(uri, cache=tmp_path / "cache", require_expert_json=True).expert == manifest
    push(trained, f"{s3_server.uri}/experts", "--trained-at", "2025-11-25", "--name", "late")
    s3.write_bytes(f"{s3_server.uri}/experts/code/bad/{EXPERT_JSON}", b"{}")
    result = ota("experts", f"{s3_server.uri}/experts", "--base-model", BASE)
    rows = {name: line for line in result.stdout.splitlines() for name in ("late", "2025-11-24T18-30-05") if f" {name} " in line}
    assert "newest" in rows["late"] and "2025-11-25 00:00:00" in rows["late"] and "newest" not in rows["2025-11-24T18-30-05"]
    assert "problem: code/bad: " in result.stdout and "lacks capability, base_model, trained_at" in result.stdout
    result = ota("experts", f"{s3_server.uri}/else", "--base-model", BASE)
    assert f"no complete expert of {BASE}; expected {s3_server.uri}/else/<capability>/<name>/expert.json" in result.stdout


def test_a_complete_expert_is_never_replaced(trained: Path, s3_server: S3Test) -> None:
    push(trained, s3_server.uri, "--name", "a")
    before = s3.list_objects(s3_server.uri)
    result = push(trained, s3_server.uri, "--name", "a")
    assert "was there already, with the same content" in result.stdout
    # Of an option that is given twice the last counts.
    for change in (["--trained-at", "2020-01-01"], ["--base-model", "s3://models/other"]):
        text = no_push(trained, s3_server.uri, "--name", "a", *change)
        assert "holds a complete expert already, with other content" in text
    write_checkpoint(trained, random_expert(random_base(), 2).weights)
    text = no_push(trained, s3_server.uri, "--name", "a", "--trained-at", "2025-11-24T18:30:05")
    assert "with other content (model.safetensors); experts are never replaced" in text
    assert s3.list_objects(s3_server.uri) == before


def test_an_upload_that_broke_off_is_continued(trained: Path, s3_server: S3Test) -> None:
    upload_folder(trained, f"{s3_server.uri}/math/a", files={"config.json": storage.sha256_file(trained / "config.json")})
    push(trained, s3_server.uri, "--name", "a")
    s3.write_bytes(f"{s3_server.uri}/math/b/model-00002-of-00002.safetensors", b"another model's")
    text = no_push(trained, s3_server.uri, "--name", "b")
    assert "files of another model" in text and "model-00002-of-00002" in text
    assert not storage.exists(f"{s3_server.uri}/math/b/{EXPERT_JSON}")


def test_two_pushes_at_once(trained: Path, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of the other one appears while this one uploads: the first wins."""
    monkeypatch.setattr(storage, "write_bytes", lambda uri, content, **options: _after(uri, content, options))
    theirs: dict[str, bytes] = {}

    def _after(uri: str, content: bytes, options: Any) -> bool:
        s3.write_bytes(uri, theirs.get("content", content))
        return s3.write_bytes(uri, content, **options)

    result = push(trained, s3_server.uri, "--name", "same")
    assert "was there already" in result.stdout
    theirs["content"] = json.dumps(manifest_of(f"{s3_server.uri}/math/same") | {"trained_at": "2020-01-01"}).encode()
    assert "with other content (trained_at)" in no_push(trained, s3_server.uri, "--name", "other")


def test_a_local_prefix(trained: Path, tmp_path: Path) -> None:
    push(trained, tmp_path / "experts")
    [one], problems = find_experts(str(tmp_path / "experts"), base_model=BASE)
    assert problems == [] and one.name == "2025-11-24T18-30-05" and one.trained_at.timestamp() == TIME
    assert "was there already" in push(trained, tmp_path / "experts").stdout
    text = no_push(trained, tmp_path / "experts", "--name", one.name, "--trained-at", "2020-01-01")
    assert "with other content (trained_at)" in text
    assert [path.name for path in (tmp_path / "experts" / "math").iterdir()] == [one.name]


def test_what_training_wrote_beside_the_weights(trained: Path, tmp_path: Path) -> None:
    """The optimizer's own count is believed before the trainer's, either before none; an old expert.json comes last."""
    (trained / "exp_avg_sq.safetensors").unlink()
    state = {name: {"exp_avg_sq": torch.tensor(EXPERT.v[name]), "step": torch.tensor(90.0)} for name in SHAPES}
    torch.save({"state": state, "param_groups": [{"params": list(SHAPES), "betas": (0.9, 0.95)}]}, trained / "optimizer.pt")

    def facts(name: str) -> dict[str, Any]:
        push(trained, tmp_path / "experts", "--name", name, "--without-moments")
        manifest = json.loads((tmp_path / "experts" / "math" / name / EXPERT_JSON).read_text())
        return {key: manifest[key] for key in ("step", "beta2", "optimizer") if key in manifest}

    assert facts("a") == {"step": 90, "beta2": 0.95}
    (trained / "optimizer.pt").unlink()
    assert facts("b") == {"step": 120}
    (trained / "training.json").write_text('{"step": 110, "beta2": 0.9, "optimizer": "adamw_torch"}')
    assert facts("c") == {"step": 110, "beta2": 0.9, "optimizer": "adamw_torch"}
    (trained / EXPERT_JSON).write_text(
        '{"capability": "math", "base_model": "s3://models/base", "trained_at": "2025-01-01", "step": 7}'
    )
    assert facts("d") == {"step": 110, "beta2": 0.9, "optimizer": "adamw_torch"}
    assert json.loads((tmp_path / "experts/math/d" / EXPERT_JSON).read_text())["trained_at"] == "2025-01-01T00:00:00+00:00"


def test_wrong_input_is_refused_with_all_problems_and_nothing_is_written(
    trained: Path, tmp_path: Path, s3_server: S3Test
) -> None:
    (trained / "exp_avg_sq.safetensors").unlink()
    (trained / EXPERT_JSON).write_text('{"capability": "code", "base_model": "s3://models/base"}')
    (trained / "model.safetensors").write_bytes(b"short")
    text = no_push(trained, s3_server.uri, "--name", "a/b")
    wrong = (
        "name 'a/b' cannot be part of an address",
        "is truncated",
        "holds no second moments",
        "says capability 'code', but 'math'",
    )
    assert all(one in text for one in wrong), text
    assert "does not exist; expected a checkpoint folder" in no_push(tmp_path / "nothing", s3_server.uri)
    write_expert(trained, EXPERT)
    (trained / EXPERT_JSON).unlink()
    assert "trained_at is 'yesterday', expected a date or time" in no_push(trained, s3_server.uri, "--trained-at", "yesterday")
    (trained / "config.json").unlink()
    assert "holds no config.json" in no_push(trained, s3_server.uri)
    assert s3.list_objects(s3_server.uri) == []


def test_a_server_that_is_away_does_not_hide_that_the_expert_is_there(trained: Path, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        started = time.monotonic()
        result = push(trained, tmp_path / "experts")
        assert ": pushed" in result.stdout
        assert (
            "event ota.expert.arrived not sent: the Prefect server at http://127.0.0.1:9/api did not take the event"
            in result.stdout
        )
        assert time.monotonic() - started < 15
        with pytest.raises(OtaError, match="check PREFECT_API_URL"):
            expert_arrived("s3://b/math/a", "math", "a")


@pytest.mark.usefixtures("prefect_server")
def test_the_event_arrives(trained: Path, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    result = push(trained, tmp_path / "experts", "--name", "a")
    assert "event ota.expert.arrived sent" in result.stdout, (result.output, result.exception)
    uri = str(tmp_path / "experts" / "math" / "a")

    def arrived(client: Any) -> list[Any]:  # other tests of the session send such events, too
        query = {"filter": {"event": {"name": [EXPERT_ARRIVED]}}}
        found = client._client.post("/events/filter", json=query).json()["events"]
        return [event for event in found if event["payload"]["uri"] == uri]

    with get_client(sync_client=True) as client:  # the server writes events down every few seconds
        events = wait_until(lambda: arrived(client), seconds=60)
    assert events[0]["resource"]["prefect.resource.id"] == "ota.expert.math.a"
    assert events[0]["payload"] == {"uri": uri, "capability": "math"}


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "s3"])
def test_an_adapter_is_pushed_and_checked_on_its_base(tmp_path: Path, s3_server: S3Test, remote: bool) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    torch.save({}, adapter / "optimizer.pt")  # of the factors
    where, prefix = str(base), str(tmp_path / "experts")
    if remote:
        where, prefix = f"{s3_server.uri}/base", f"{s3_server.uri}/experts"
        upload_folder(base, where)
    assert "is a LoRA adapter, and holds no second moments of the weights" in no_push(adapter, prefix, base=where)
    push(adapter, prefix, "--without-moments", "--name", "one", base=where)
    uri = f"{prefix}/math/one"
    (found,), problems = find_experts(prefix, base_model=where)
    assert not problems and found.uri == uri
    assert not remote or "adapter_model.safetensors" in manifest_of(uri)["files"]
    home = places(tmp_path / "home")
    assert check(home, uri, where, needs_moments=False) == []
    assert any("exp_avg_sq" in problem for problem in check(home, uri, where))
    # One that another base was meant for, and one whose factors are damaged.
    other = tiny_base(tmp_path / "other", "llama", hidden=64)
    assert "does not fit its base" in no_push(adapter, prefix, "--without-moments", base=str(other))
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[next(iter(factors))][0, 0] = float("nan")
    save_file(factors, adapter / "adapter_model.safetensors")
    push(adapter, prefix, "--without-moments", "--name", "two", base=where)
    (problem,) = check(home, f"{prefix}/math/two", where, needs_moments=False)
    assert "weights are not finite" in problem
