"""Checkpoints from S3, from a folder and from a Hugging Face hub; uploads; the manifest of an expert."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ota_core.errors import StorageError
from tasks.storage import cache as storage_cache
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import Fetched, fetch, upload_folder
from tasks.storage.streaming.streams import Streams
from tests.s3_requests import requests
from tests.servers import S3Test

ROOT = Path(__file__).parents[3]
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "optimizer.pt",
}


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """A folder with all sorts of files; only some make the model."""
    folder = tmp_path / "expert"
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / ".git").mkdir()
    model = dict.fromkeys(MODEL_FILES, b"{}") | {
        "tokenizer.json": b"[1]",
        "model-00001-of-00002.safetensors": os.urandom(3000),
        "model-00002-of-00002.safetensors": os.urandom(2000),
        "optimizer.pt": os.urandom(500),
    }
    others = ["README.md", "training_args.bin", "checkpoint-10/model.safetensors", ".git/config", "record.json"]
    contents = model | dict.fromkeys(others, b"other")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_expert_json(folder, capability="math", base_model="s3://models/base", trained_at="2026-11-20", step=234, beta2=0.999)
    return folder


def test_manifest_lists_the_model_with_independent_sums(expert: Path) -> None:
    manifest = json.loads((expert / "expert.json").read_text())
    assert (manifest["capability"], manifest["step"], manifest["beta2"]) == ("math", 234, 0.999)
    assert "optimizer" not in manifest
    assert set(manifest["files"]) == MODEL_FILES
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((expert / name).read_bytes()).hexdigest()


def test_folder_and_its_copy_in_s3_are_the_same_model(expert: Path, s3_server: S3Test, tmp_path: Path) -> None:
    uri = f"{s3_server.uri}/experts/math/a"
    upload_folder(expert, uri, last="expert.json")
    here = fetch(str(expert), cache=tmp_path / "cache")
    there = fetch(uri + "/", cache=tmp_path / "cache", require_expert_json=True)

    assert here.digest == there.digest
    assert here.files == there.files
    assert set(here.files) == MODEL_FILES
    assert here.path == expert and here.resolved == str(expert)
    assert there.resolved == uri and there.path.parent == tmp_path / "cache" / "checkpoints"
    assert here.expert == there.expert and there.expert is not None and there.expert["step"] == 234
    for name in MODEL_FILES:
        assert (there.path / name).read_bytes() == (expert / name).read_bytes()
    assert {path.name for path in there.path.iterdir()} == MODEL_FILES | {"expert.json", "README.md"}, (
        "the card comes along, for its licence"
    )
    assert Fetched.model_validate_json(there.model_dump_json()) == there


def test_digest_is_the_models_only(expert: Path, tmp_path: Path) -> None:
    before = fetch(str(expert), cache=tmp_path / "cache").digest
    (expert / "README.md").write_text("changed")
    write_expert_json(expert, capability="code", base_model="other", trained_at="2026-11-21")
    assert fetch(str(expert), cache=tmp_path / "cache").digest == before
    (expert / "tokenizer.json").rename(expert / "tokenizer_2.json")
    assert fetch(str(expert), cache=tmp_path / "cache").digest != before


def test_another_manifest_gives_another_folder_of_the_same_digest(expert: Path, s3_server: S3Test, tmp_path: Path) -> None:
    upload_folder(expert, s3_server.uri + "/a", last="expert.json")
    first = fetch(s3_server.uri + "/a", cache=tmp_path / "cache")
    write_expert_json(expert, capability="math", base_model="b", trained_at="2026-11-21", step=999)
    upload_folder(expert, s3_server.uri + "/a", last="expert.json")
    second = fetch(s3_server.uri + "/a", cache=tmp_path / "cache")
    assert first.digest == second.digest
    assert json.loads((first.path / "expert.json").read_text())["step"] == 234
    assert json.loads((second.path / "expert.json").read_text())["step"] == 999


def test_second_fetch_reads_no_weights_and_mends_the_folder(
    expert: Path, s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(expert, s3_server.uri + "/a")
    first = fetch(s3_server.uri + "/a", cache=tmp_path / "cache")
    (first.path / "config.json").unlink()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("downloaded or hashed again")

    monkeypatch.setattr(s3, "read_range", forbidden)
    monkeypatch.setattr(storage_cache, "hash_file", forbidden)
    second = fetch(s3_server.uri + "/a", cache=tmp_path / "cache")
    assert second == first
    assert (second.path / "config.json").read_bytes() == b"{}"
    # The memory of digests knows the linked files, too.
    assert storage.digest_folder(second.path, cache=tmp_path / "cache")[0] == first.digest


def test_prefix_is_not_a_beginning_of_a_name(s3_server: S3Test, expert: Path, tmp_path: Path) -> None:
    upload_folder(expert, s3_server.uri + "/math")
    s3.write_bytes(s3_server.uri + "/math2/config.json", b"other")
    assert set(fetch(s3_server.uri + "/math", cache=tmp_path / "cache").files) == MODEL_FILES


def test_threads_and_processes_at_once(s3_server: S3Test, expert: Path, tmp_path: Path) -> None:
    uri, cache = s3_server.uri + "/a", tmp_path / "cache"
    upload_folder(expert, uri, last="expert.json")
    script = f"from pathlib import Path\nfrom tasks.storage import models as storage\nprint(storage.fetch({uri!r}, cache=Path({str(cache)!r})).digest)"
    others = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: fetch(uri, cache=cache), range(3)))
    digests = {one.digest for one in found} | {(other.communicate()[0] or "").strip() for other in others}
    assert len(digests) == 1
    assert len(list((cache / "checkpoints").iterdir())) == 1


def test_upload_puts_the_last_file_last_and_skips_what_is_there(expert: Path, s3_server: S3Test) -> None:
    ticks: list[tuple[int, int]] = []
    with requests("PutObject") as order:
        sent = upload_folder(
            expert, s3_server.uri + "/a", last="expert.json", progress=lambda done, total: ticks.append((done, total))
        )
    assert order[-1].key == "a/expert.json" and len(order) == len(sent) == 13
    assert ticks[-1][0] == ticks[-1][1]
    assert upload_folder(expert, s3_server.uri + "/a", last="expert.json") == []
    (expert / "tokenizer.json").write_text("[3]")  # the same size
    assert upload_folder(expert, s3_server.uri + "/a", last="expert.json") == ["tokenizer.json"]
    assert storage.read_bytes(s3_server.uri + "/a/tokenizer.json") == b"[3]"
    with pytest.raises(StorageError, match=r"holds no nothing\.json"):
        upload_folder(expert, s3_server.uri + "/b", last="nothing.json")
    assert not storage.list_objects(s3_server.uri + "/b")


def test_uploads_that_nobody_finished_are_ended_after_a_day(s3_server: S3Test, tmp_path: Path) -> None:
    """Younger ones may be under way on another machine."""
    client = s3_server.client
    for key in ("m/model.safetensors", "m2/model.safetensors"):
        begun = client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)
        part = {"Bucket": s3_server.bucket, "Key": key, "UploadId": begun["UploadId"], "PartNumber": 1}
        client.upload_part(**part, Body=b"half")

    def unfinished() -> list[str]:
        return [one["Key"] for one in client.list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads", [])]

    (tmp_path / "model.safetensors").write_bytes(b"whole")
    storage.upload_folder(tmp_path, f"{s3_server.uri}/m")
    assert len(unfinished()) == 2
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert storage.end_unfinished(f"{s3_server.uri}/m", before=tomorrow) == 1 and unfinished() == ["m2/model.safetensors"]
    assert storage.end_unfinished("s3://no-such-bucket-here/m", before=tomorrow) == 0, "where it may not look, it goes on"
    assert storage.end_unfinished(s3_server.uri, before=tomorrow) == 1 and unfinished() == []


def test_small_objects(s3_server: S3Test) -> None:
    uri = s3_server.uri + "/x/record.json"
    assert storage.write_bytes(uri, b"1", only_if_absent=True)
    assert not storage.write_bytes(uri, b"2", only_if_absent=True)
    assert storage.read_bytes(uri) == b"1"
    assert storage.write_bytes(uri, b"2") and storage.read_bytes(uri) == b"2"
    assert storage.exists(uri) and not storage.exists(uri + "2")
    for name in ("a", "b", "c/d"):
        storage.write_bytes(s3_server.uri + "/x/" + name, b"")
    assert storage.delete_prefix(s3_server.uri + "/x", first="record.json") == 4
    assert storage.list_objects(s3_server.uri) == []
    assert storage.delete_prefix(s3_server.uri + "/x") == 0


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot needs."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    files: ClassVar = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickled",
        "README.md": b"hello",
    }

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if self.path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in self.files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif self.path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "org/name", "sha": self.commit, "siblings": siblings}).encode()
            self.answer(200, body)
        elif self.path.startswith("/org/name/resolve/") and name in self.files:
            etag = f'"{hashlib.sha1(self.files[name]).hexdigest()}"'
            self.answer(200, self.files[name], {"X-Repo-Commit": self.commit, "ETag": etag})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_hugging_face_id(tmp_path: Path) -> None:
    """The hub's address is read when its library is imported, hence processes of their own."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environ = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    environ |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def run(source: str) -> subprocess.CompletedProcess[str]:
        script = (
            "import sys\nfrom pathlib import Path\nfrom ota_core.errors import StorageError\nfrom tasks.storage import models as storage\n"
            f"try: print(storage.fetch({source!r}, cache=Path({str(tmp_path / 'cache')!r})).model_dump_json())\n"
            "except StorageError as error: print('ERROR', error)"
        )
        return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, check=True, capture_output=True, text=True)

    def fetched(source: str) -> str:
        done = run(source)
        assert "cache is used" not in done.stderr
        return done.stdout

    first = Fetched.model_validate_json(fetched("org/name@v1"))
    assert first.resolved == f"org/name@{FakeHub.commit}"
    assert set(first.files) == {"config.json", "model.safetensors"}
    assert (first.path / "model.safetensors").read_bytes() == b"weights"
    local = tmp_path / "local"
    local.mkdir()
    for name in first.files:
        (local / name).write_bytes(FakeHub.files[name])
    assert fetch(str(local), cache=tmp_path / "cache").digest == first.digest
    assert "RepositoryNotFoundError" in fetched("org/other")
    hub.shutdown()
    hub.server_close()
    refs = tmp_path / "hf" / "hub" / "models--org--name" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "v1").write_text(FakeHub.commit)  # as a tool leaves it that asks for the tag
    offline = run("org/name@v1")
    assert Fetched.model_validate_json(offline.stdout) == first, "without a network, from the cache"
    assert re.search(
        rf"org/name@v1: the hub does not answer \(ConnectError: .+\); the snapshot {FakeHub.commit} in the local cache is used",
        offline.stderr,
    ), offline.stderr
    assert Fetched.model_validate_json(run(f"org/name@{FakeHub.commit}").stdout).digest == first.digest
    assert "ERROR 'org/else@main' is no folder here, and as a Hugging Face id (org/else, revision main)" in fetched(
        "org/else@main"
    )


def test_code_of_a_model_is_brought_and_is_no_part_of_its_digest(expert: Path, s3_server: S3Test, tmp_path: Path) -> None:
    """What ``auto_map`` names must lie beside the weights wherever they go; it never decided what a merge computes."""
    before = fetch(str(expert), cache=tmp_path / "cache").digest
    (expert / "modeling_mine.py").write_text("raise SystemExit\n")
    uri = f"{s3_server.uri}/experts/math/coded"
    upload_folder(expert, uri, last="expert.json")
    there = fetch(uri, cache=tmp_path / "cache")
    assert (there.path / "modeling_mine.py").read_text() == "raise SystemExit\n"
    assert there.digest == fetch(str(expert), cache=tmp_path / "cache").digest == before
    with Streams(cache=tmp_path / "outlines", memory=1 << 26) as streams:
        outlined = streams.model(uri)
        assert (
            outlined.path / "modeling_mine.py"
        ).read_text() == "raise SystemExit\n" and "modeling_mine.py" not in outlined.files
