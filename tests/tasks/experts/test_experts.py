"""Which experts a prefix holds, which are the newest, and which are broken, against a real S3 server and in folders."""

import json
import pickle
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ota_core.errors import CheckpointError, StorageError
from tasks.experts import find as experts
from tasks.experts.check import check
from tasks.experts.find import ExpertFound, find_experts, identity_of_lineup, lineup
from tasks.settings import Places, places
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, fetch, upload_folder
from tasks.storage.streaming.streams import Streams
from tasks.storage.watch import identity_of_source
from tests.checkpoints import random_base, random_expert, write_checkpoint, write_expert
from tests.servers import S3Test

BASE = random_base()
BASE_URI = "s3://models/base"
LAST = "model.norm.weight"


def make(folder: Path, seed: int = 1, *, base_model: str = BASE_URI, trained_at: Any = "2026-11-20", **expert: Any) -> Path:
    """A small complete expert's folder; its capability is the folder's parent."""
    write_expert(folder, random_expert(BASE, seed, **expert))
    write_expert_json(folder, capability=folder.parent.name, base_model=base_model, trained_at=trained_at)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / EXPERT_JSON
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(folder: Path) -> None:
    """One bit of the last weight changes."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return places(tmp_path / "home")


@pytest.fixture(params=["s3", "folder"])
def publish(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Puts everything below ``tmp_path / "experts"`` where experts lie, and gives the prefix."""
    root = tmp_path / "experts"
    if request.param == "folder":
        return lambda: str(root)
    server = request.getfixturevalue("s3_server")

    def upload() -> str:
        upload_folder(root, f"{server.uri}/experts")
        return f"{server.uri}/experts"

    return upload


def test_the_newest_of_every_capability(tmp_path: Path, publish: Callable[[], str]) -> None:
    root = tmp_path / "experts"
    for name, trained_at in [("b", "2026-11-20"), ("a", "2026-11-20T00:00:01"), ("c", "2026-11-20T02:00:00+02:00")]:
        make(root / "math" / name, trained_at=trained_at)
    make(root / "code" / "z", base_model=BASE_URI + "/")
    (make(root / "code" / "under-way") / EXPERT_JSON).unlink()
    make(root / "math" / "deeper" / "one")  # three levels: no expert of this layout
    prefix = publish()
    found, problems = find_experts(prefix + "/", base_model=BASE_URI)
    assert problems == []
    assert [(one.capability, one.name) for one in found] == [("code", "z"), ("math", "a"), ("math", "b"), ("math", "c")]
    # c is as old as b: two hours east of Greenwich. Of equals the later name is the newer one.
    assert found[2].trained_at == found[3].trained_at == datetime(2026, 11, 20, tzinfo=UTC)
    chosen = lineup(found)
    assert list(chosen) == ["code", "math"] and [one.name for one in chosen["math"]] == ["a", "c", "b"]
    assert lineup(found, ["math", "if"]) == {"math": chosen["math"], "if": []}
    assert lineup(found[::-1]) == chosen
    for one in found:
        assert one.uri == f"{prefix}/{one.capability}/{one.name}" and one.identity == identity_of_source(one.uri)


def test_every_kind_of_broken_expert_is_named_and_the_others_are_found(tmp_path: Path, publish: Callable[[], str]) -> None:
    root = tmp_path / "experts" / "math"
    make(root / "good")
    expected = {}

    def broken(name: str, text: str, **options: Any) -> Path:
        expected[name] = text
        return make(root / name, **options)

    (broken("no-json", "is not JSON") / EXPERT_JSON).write_text("{")
    (broken("no-keys", "lacks capability, base_model, trained_at") / EXPERT_JSON).write_text("[]")
    edit(broken("capability", "says capability 'code', but the folder lies below 'math'"), capability="code")
    broken("base", f"says base_model 's3://models/other', '{BASE_URI}' was expected", base_model="s3://models/other")
    edit(broken("no-base", "says base_model None"), base_model=None)
    edit(broken("time", "trained_at is 'yesterday', expected a date or time"), trained_at="yesterday")
    edit(broken("number", "trained_at is 20261120, expected"), trained_at=20261120)
    (broken("lost", "exp_avg_sq.safetensors is missing; push") / "exp_avg_sq.safetensors").unlink()
    cut = broken("cut", "bytes instead of") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    edit(broken("sum", "expected a sha256 of 64 hex digits"), files={"config.json": "12"})
    bare = broken("bare", "holds no weights (only config.json, exp_avg_sq.safetensors)")
    (bare / "model.safetensors").unlink()
    write_expert_json(bare, capability="math", base_model=BASE_URI, trained_at="2026-11-20")
    empty = broken("empty", "holds no model files")
    edit(empty, files={})
    for path in [path for path in empty.iterdir() if path.name != EXPERT_JSON]:
        path.rename(path.with_name(f"note-{path.stem}.txt"))
    prefix = publish()
    found, problems = find_experts(prefix, base_model=BASE_URI)
    assert [one.name for one in found] == ["good"]
    assert {one.name for one in problems} == set(expected) and len(problems) == len(expected)
    for one in problems:
        assert expected[one.name] in one.problem and one.uri == f"{prefix}/math/{one.name}" and one.capability == "math", one


def test_all_problems_of_one_expert(tmp_path: Path) -> None:
    folder = make(tmp_path / "math" / "a", base_model="s3://models/other")
    edit(folder, capability="code", trained_at="")
    (folder / "config.json").unlink()
    found, problems = find_experts(str(tmp_path), base_model=BASE_URI)
    assert found == [] and len(problems) == 4


def test_one_listing_and_no_weights(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        upload_folder(make(tmp_path / "math" / name), f"{s3_server.uri}/math/{name}", last=EXPERT_JSON)
    listed: list[str] = []
    read: list[str] = []
    real_list, real_read = s3.list_objects, s3.read_bytes
    monkeypatch.setattr(storage, "list_objects", lambda uri: listed.append(uri) or real_list(uri))
    monkeypatch.setattr(storage, "read_bytes", lambda uri, **options: read.append(uri) or real_read(uri, **options))
    assert len(find_experts(s3_server.uri, base_model=BASE_URI)[0]) == 3
    assert listed == [s3_server.uri] and sorted(read) == [f"{s3_server.uri}/math/{name}/{EXPERT_JSON}" for name in "abc"]


def test_a_place_that_cannot_be_read_condemns_nobody(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_experts(f"{s3_server.uri}/nothing", base_model=BASE_URI) == ([], [])
    with pytest.raises(StorageError, match="does not exist; expected s3://"):
        find_experts(str(tmp_path / "nothing"), base_model=BASE_URI)
    with pytest.raises(StorageError, match="no bucket"):
        find_experts("s3://no-such-bucket/experts", base_model=BASE_URI)
    for name in "ab":
        upload_folder(make(tmp_path / "math" / name), f"{s3_server.uri}/math/{name}", last=EXPERT_JSON)
    real = s3.read_bytes

    def refuse(*names: str) -> None:
        def read(uri: str, **options: Any) -> bytes:
            if uri.split("/")[-2] in names:
                raise StorageError(f"cannot read {uri}: access denied", reason="denied")
            return real(uri, **options)

        monkeypatch.setattr(storage, "read_bytes", read)

    refuse("a")
    found, problems = find_experts(s3_server.uri, base_model=BASE_URI)
    assert [one.name for one in found] == ["b"] and [one.name for one in problems] == ["a"]
    refuse("a", "b")
    with pytest.raises(StorageError, match="access denied"):
        find_experts(s3_server.uri, base_model=BASE_URI)
    monkeypatch.setattr(storage, "read_bytes", real)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="check that the server runs"):
        find_experts(s3_server.uri, base_model=BASE_URI)


def test_an_expert_that_is_deleted_or_replaced_meanwhile(
    s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "new", "same"):
        upload_folder(make(tmp_path / "math" / name), f"{s3_server.uri}/math/{name}", last=EXPERT_JSON)
    listed = s3.list_objects(s3_server.uri)
    s3.delete_prefix(f"{s3_server.uri}/math/gone")
    s3.write_bytes(f"{s3_server.uri}/math/new/{EXPERT_JSON}", b"{}")
    monkeypatch.setattr(storage, "list_objects", lambda uri: listed)
    found, problems = find_experts(s3_server.uri, base_model=BASE_URI)
    assert [one.name for one in found] == ["same"]
    assert [(one.name, "was replaced meanwhile" in one.problem) for one in problems] == [("new", True)]


def test_the_identity_of_a_lineup(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", BASE)
    for name in ("math/a", "math/b", "code/a"):
        make(tmp_path / "experts" / name)
    base = str(tmp_path / "base")

    def look() -> dict[str, ExpertFound]:
        return {one.uri[-6:]: one for one in find_experts(str(tmp_path / "experts"), base_model=BASE_URI)[0]}

    found = look()
    first = identity_of_lineup(base, {"math": found["math/a"], "code": found["code/a"]})
    assert identity_of_lineup(base + "/", {"code": found["code/a"], "math": found["math/a"]}) == first
    others = [
        identity_of_lineup(base, {"math": found["math/b"], "code": found["code/a"]}),
        identity_of_lineup(base, {"math": found["math/a"]}),
    ]
    edit(tmp_path / "experts" / "code" / "a", step=5)
    others.append(identity_of_lineup(base, {"math": found["math/a"], "code": look()["code/a"]}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    others.append(identity_of_lineup(base, {"math": found["math/a"], "code": found["code/a"]}))
    assert len({first, *others}) == 5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", BASE)


def nan_expert(folder: Path) -> Path:
    expert = random_expert(BASE, 1)
    expert.weights[LAST][-1] = np.nan
    write_expert(folder, expert)
    write_expert_json(folder, capability="math", base_model=BASE_URI, trained_at="2026-11-20")
    return folder


def test_a_verdict_is_kept_and_names_no_place(tmp_path: Path, base: Path, where: Places, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder, uri = nan_expert(tmp_path / "math" / "a"), f"{s3_server.uri}/math/a"
    upload_folder(folder, uri, last=EXPERT_JSON)
    expected = [f"weights are not finite: '{LAST}' (1 NaN of 7)"]
    assert [text.split(";")[0] for text in check(where, uri, str(base))] == expected
    fetched = fetch(uri, cache=where.cache), fetch(str(base), cache=where.cache)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.experts.check.check_expert", lambda *a, **k: pytest.fail("read again"))
        again = check(where, uri, str(base))
        assert again == check(where, *fetched) and [text.split(";")[0] for text in again] == expected
        # The same content under another name is the same expert.
        upload_folder(folder, f"{s3_server.uri}/math/b", last=EXPERT_JSON)
        assert check(where, f"{s3_server.uri}/math/b", str(base)) == again
        # Another question, another base or other facts about the optimizer are looked into anew.
        for change in ({"needs_moments": False}, {"missing_curvature": "mean"}):
            with pytest.raises(BaseException, match="read again"):
                check(where, uri, str(base), **change)
    assert str(tmp_path) not in "".join(again)
    [artifact] = {path.parent for path in Path(where.artifacts).glob("checks/*/problems.json")}
    assert json.loads((artifact / "problems.json").read_text()) == again


def test_of_a_streamed_model_everything_is_read(tmp_path: Path, base: Path, where: Places, s3_server: S3Test) -> None:
    """Outlines hold zeros where the weights are: checked as they are, every expert would equal the base."""
    upload_folder(make(tmp_path / "math" / "a"), f"{s3_server.uri}/math/a", last=EXPERT_JSON)
    upload_folder(base, f"{s3_server.uri}/base")
    with Streams(cache=where.cache, memory=64 << 20) as streams:
        expert, start = streams.model(f"{s3_server.uri}/math/a"), streams.model(f"{s3_server.uri}/base")
        assert check(where, expert, start) == []


def test_what_cannot_be_fetched_or_opened_is_its_experts_problem_and_no_verdict(
    tmp_path: Path, base: Path, where: Places, s3_server: S3Test
) -> None:
    def publish(name: str, damage: Callable[[Path], object], *, before: bool = False) -> list[str]:
        folder = make(tmp_path / "math" / name)
        if before:
            damage(folder)
            write_expert_json(folder, capability="math", base_model=BASE_URI, trained_at="2026-11-20")
        uri = f"{s3_server.uri}/math/{name}"
        upload_folder(folder, uri, last=EXPERT_JSON)
        if not before:
            other = folder.parent / "damaged"
            shutil.rmtree(other, ignore_errors=True)
            shutil.copytree(folder, other)
            damage(other)
            upload_folder(other, uri, last=EXPERT_JSON)
        return check(where, uri, str(base))

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])

    [truncated] = publish("cut", cut, before=True)
    assert truncated.startswith("model.safetensors is truncated: ")
    [flipped] = publish("flip", flip)
    assert "model.safetensors is damaged or was replaced: its manifest expert.json says sha256" in flipped
    [gone] = check(where, f"{s3_server.uri}/math/gone", str(base))
    assert "there is no such key or prefix" in gone
    [two] = publish("two", lambda folder: (folder / "optimizer.pt").write_bytes(b"other"), before=True)
    assert "holds several second moments" in two
    assert not list(Path(where.artifacts).glob("checks/*/problems.json"))


def test_a_local_expert_is_compared_with_its_checksums(tmp_path: Path, base: Path, where: Places) -> None:
    folder = make(tmp_path / "math" / "a")
    assert check(where, str(folder), str(base)) == []
    flip(folder)
    [problem] = check(where, str(folder), str(base))
    assert problem.startswith("model.safetensors is damaged or was replaced: expert.json says sha256 ")


def test_a_fault_of_the_place_or_of_the_base_is_raised(
    tmp_path: Path, base: Path, where: Places, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_server.uri}/math/a"
    upload_folder(make(tmp_path / "math" / "a"), uri, last=EXPERT_JSON)
    with pytest.raises(StorageError, match="no such key or prefix"):
        check(where, uri, f"{s3_server.uri}/no-base")
    broken = write_checkpoint(tmp_path / "broken", BASE)
    (broken / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"broken/model\.safetensors"):
        check(where, uri, str(broken))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")  # HEAD and GET are refused alike, whosever the objects are
    with pytest.raises(StorageError, match="access denied"):
        check(where, uri, str(base))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="check that the server runs"):
        check(where, uri, str(base))


def test_a_file_that_is_denied_where_the_manifest_is_not(
    tmp_path: Path, base: Path, where: Places, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_server.uri}/math/a"
    upload_folder(make(tmp_path / "math" / "a"), uri, last=EXPERT_JSON)
    real = s3.head

    def head(address: str) -> Any:
        if address.endswith(".safetensors"):
            raise StorageError(f"cannot look at {address}: access denied", reason="denied")
        return real(address)

    monkeypatch.setattr(s3, "head", head)
    [problem] = check(where, uri, str(base))
    assert "access denied" in problem
    monkeypatch.setattr(
        experts.storage, "read_bytes", lambda uri, **_: (_ for _ in ()).throw(StorageError("no", reason="denied"))
    )
    with pytest.raises(StorageError):
        check(where, uri, str(base))


def test_whose_fault_it_is_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StorageError("no", reason="denied")))
    assert (str(error), error.reason) == ("no", "denied")
