"""The local cache against a real S3 server: what was not used goes, what is in use stays, and everything can be had again."""

import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ota_core.artifact import ArtifactRef
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.evaluation.subject import whole_model
from tasks.registry.retention.cache import collect_cache, plan_cache
from tasks.registry.retention.plan import Plan
from tasks.settings import places
from tasks.storage import download as storage_download
from tasks.storage import models as storage
from tasks.storage import watch
from tasks.storage.cache import digest_file, note_use
from tasks.storage.streaming.streams import Streams
from tests.ota_core.files.tiny_gguf import tiny, write_gguf
from tests.servers import S3Test

WEEK = timedelta(days=7)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def upload(server: S3Test, folder: Path, name: str, content: bytes) -> str:
    """A checkpoint of one weight file and a tokenizer that all have in common."""
    (folder / name).mkdir(parents=True)
    for file, text in {"config.json": b"{}" + name.encode(), "model.bin": content, "tokenizer.json": b'{"shared": true}'}.items():
        (folder / name / file).write_bytes(text)
    storage.upload_folder(folder / name, f"{server.uri}/{name}")
    return f"{server.uri}/{name}"


def age(cache: Path, days: float = 30) -> None:
    """Nothing in the cache has been used for so long."""
    when = time.time() - days * 86400
    for path in sorted(cache.rglob("*"), reverse=True):
        os.utime(path, (when, when))


def plan(cache: Path) -> Plan:
    return plan_cache(cache, datetime.now(UTC) - WEEK)


def kinds(items: object) -> list[str]:
    return sorted(one.stored.kind for one in items)  # type: ignore[attr-defined]


def test_what_was_not_used_goes_and_shared_files_stay(s3_server: S3Test, cache: Path, tmp_path: Path) -> None:
    old, new = (upload(s3_server, tmp_path, name, name.encode() * 5000) for name in ("old", "new"))
    fetched = {uri: storage.fetch(uri, cache=cache) for uri in (old, new)}
    assert not plan(cache).going
    age(cache)
    storage.fetch(new, cache=cache)
    found = plan(cache)
    assert kinds(found.going) == ["checkpoint", "download", "download"]
    assert [(one.stored.kind, one.what, one.stored.uri) for one in found.listed] == [("checkpoint", old, str(fetched[old].path))]
    outcome = collect_cache(found)
    assert len(outcome.deleted) == 3 and not outcome.spared
    # The tokenizer's blob is the new one's as well, and so not given back.
    own = 15000 + len(b"{}old")
    assert outcome.frees == found.frees == own < found.listed[0].stored.size
    assert not fetched[old].path.exists()
    assert (fetched[new].path / "model.bin").read_bytes() == b"new" * 5000
    assert sorted(path.stat().st_nlink for path in (cache / "blobs").rglob("*") if path.is_file()) == [2, 2, 2]
    assert not list(cache.rglob("*.trash"))

    again = storage.fetch(old, cache=cache)
    assert again == fetched[old] and (again.path / "model.bin").read_bytes() == b"old" * 5000


def test_each_way_to_use_something_counts(s3_server: S3Test, cache: Path, tmp_path: Path) -> None:
    uri = upload(s3_server, tmp_path, "model", b"m" * 5000)
    fetched = storage.fetch(uri, cache=cache)
    uses: list[Callable[[], object]] = [
        lambda: storage.fetch(uri, cache=cache),
        lambda: watch.is_intact(fetched),  # a fetch whose result Prefect had
        lambda: storage.download_folder(uri, cache=cache, names=["config.json", "model.bin", "tokenizer.json"]),
    ]
    for use in uses:
        age(cache)
        assert plan(cache).going
        use()
        assert not plan(cache).going


def test_use_does_not_make_files_look_changed(
    s3_server: S3Test, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests are remembered by time of change; they must not be computed again because somebody used the files."""
    fetched = storage.fetch(upload(s3_server, tmp_path, "model", b"m" * 5000), cache=cache)
    when = (fetched.path / "model.bin").stat().st_mtime_ns
    for folder in (fetched.path, *(cache / "objects").rglob("*.json")):
        os.utime(folder, (1, 1))
    assert storage.fetch(fetched.source, cache=cache) == fetched
    assert fetched.path.stat().st_mtime > 1 and (fetched.path / "model.bin").stat().st_mtime_ns == when
    monkeypatch.setattr("tasks.storage.cache.hash_file", lambda *_, **__: pytest.fail("it was read again"))
    assert digest_file(fetched.path / "model.bin", cache=cache) == fetched.files["model.bin"].digest


def test_what_is_used_after_the_listing_stays_whole(s3_server: S3Test, cache: Path, tmp_path: Path) -> None:
    uri = upload(s3_server, tmp_path, "model", b"m" * 5000)
    fetched = storage.fetch(uri, cache=cache)
    age(cache)
    found = plan(cache)
    assert watch.is_intact(fetched)
    outcome = collect_cache(found)
    assert not outcome.deleted and kinds(outcome.spared) == ["checkpoint", "download", "download", "download"]
    assert watch.is_intact(fetched)

    age(cache)
    found = plan(cache)
    storage.download_folder(uri, cache=cache, names=["model.bin"])  # a folder of its own, of a blob that was to go
    outcome = collect_cache(found)
    assert kinds(outcome.spared) == ["download"] and kinds(outcome.deleted) == ["checkpoint", "download", "download"]


def test_a_use_between_look_and_removal_is_seen(cache: Path, tmp_path: Path) -> None:
    """The folder has left its place when the second look sees that somebody came: it goes back."""
    from tasks.storage.cache import remove_tree

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    looks: list[Path] = []

    def used(place: Path) -> bool:
        looks.append(place)
        return len(looks) == 2

    assert not remove_tree(folder, unless=used)
    assert looks[0] == folder and looks[1] != folder and looks[1].name.endswith(".trash")
    assert (folder / "file").read_text() == "x" and not looks[1].exists()
    assert remove_tree(folder, unless=lambda _: False) and not folder.exists()


def test_interrupted_downloads(s3_server: S3Test, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = upload(s3_server, tmp_path, "model", os.urandom(300_000))
    breaks = iter([False, False])
    real = storage_download._download_part

    def part(*args: object) -> str:
        if not next(breaks, True):
            return real(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage_download, "_download_part", part)
        with pytest.raises(KeyboardInterrupt):
            storage.fetch(uri, cache=cache, part_size=100_000, threads=1)
    partial = list((cache / "partial").iterdir())
    assert any(path.suffix == ".part" for path in partial)
    assert "partial" not in kinds(plan(cache).going)
    age(cache)
    found = plan(cache)
    assert "partial" in kinds(found.going)

    # Somebody resumes it: the lock is held, and it stays.
    place = partial[0].name.partition("-")[0]
    from tasks.storage.cache import locked

    with locked(cache, storage_download.object_lock(place)):
        outcome = collect_cache(found)
    assert "partial" in kinds(outcome.spared) and all(path.exists() for path in partial if path.name.startswith(place))
    collect_cache(plan(cache))
    assert not list((cache / "partial").iterdir())
    assert (storage.fetch(uri, cache=cache).path / "model.bin").stat().st_size == 300_000


def test_outlines_take_what_they_hold_not_what_they_stand_for(s3_server: S3Test, cache: Path, tmp_path: Path) -> None:
    from tests.tiny_models import write_tiny_llama

    storage.upload_folder(write_tiny_llama(tmp_path / "llama", hidden=64, layers=4), f"{s3_server.uri}/llama")
    with Streams(cache=cache, memory=2**26) as streams:
        streams.model(f"{s3_server.uri}/llama")
    age(cache)
    (one,) = plan(cache).going
    folder = Path(one.stored.uri)
    whole = sum(path.stat().st_size for path in folder.rglob("*"))
    assert one.stored.kind == "outline" and one.stored.size < whole
    with Streams(cache=cache, memory=2**26) as streams:
        streams.model(f"{s3_server.uri}/llama")
    assert not plan(cache).going
    age(cache)
    collect_cache(plan(cache))
    assert not folder.exists()


def test_copies_of_what_was_made_here_and_leftovers(s3_server: S3Test, cache: Path) -> None:
    store = ArtifactStore(f"{s3_server.uri}/artifacts", cache)

    def build(folder: Path) -> BuildResult:
        (folder / "m.bin").write_bytes(b"m" * 1000)
        return BuildResult()

    ref: ArtifactRef = store.produce("moments", "a" * 32, config={}, inputs={}, build=build)
    copy = store.local_path(ref)
    assert copy.is_relative_to(cache / "artifacts")
    dead = copy.parent / f".{'b' * 32}.{os.uname().nodename}.999999999.0.1.tmp"
    dead.mkdir()
    age(cache)
    store.local_path(ref)
    assert not [one for one in plan(cache).going if one.stored.kind == "copy"]
    age(cache)
    found = plan_cache(cache, datetime.now(UTC) + WEEK)
    assert {one.stored.uri for one in found.going} == {str(copy), str(dead)}
    assert kinds(plan(cache).going) == ["copy", "leftover"], "whose maker is dead goes at once"
    collect_cache(found)
    assert not copy.exists() and not dead.exists()
    assert (store.local_path(ref) / "m.bin").read_bytes() == b"m" * 1000, "it is downloaded again"


def test_equal_content_that_comes_anew_keeps_its_blob(s3_server: S3Test, cache: Path, tmp_path: Path) -> None:
    """A download ends in a blob that is there already, of an entry that was not there when the deletion began."""
    old = upload(s3_server, tmp_path, "old", b"same" * 5000)
    storage.fetch(old, cache=cache)
    age(cache)
    found = plan(cache)
    for path in (cache / "objects").rglob("*.json"):  # so that nothing tells beforehand that the content is known
        path.unlink()
    new = upload(s3_server, tmp_path, "new", b"other" * 5000)
    brought: list[storage.Fetched] = []

    def progress(_: str, done: int, __: int) -> None:
        if done == 2:  # the folder and the largest blob are gone
            brought.append(storage.fetch(new, cache=cache))

    outcome = collect_cache(found, progress)
    (tokenizer,) = [one for one in found.going if one.stored.kind == "download" and one.stored.size == len(b'{"shared": true}')]
    assert outcome.spared == [tokenizer]
    assert watch.is_intact(brought[0]) and storage.fetch(new, cache=cache) == brought[0]


def test_an_empty_cache(cache: Path) -> None:
    found = plan(cache)
    assert not found.going and not found.kept
    assert collect_cache(found).frees == 0


def test_use_of_what_nobody_may_touch_is_only_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    os.utime(tmp_path, (1, 1))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    note_use(tmp_path)
    assert "cannot note that" in caplog.text and "Operation not permitted" in caplog.text


def test_every_folder_that_is_made_in_the_cache_is_swept(cache: Path, tmp_path: Path) -> None:
    """Links to GGUF files and what they hold themselves, models written to be scored, interrupted estimates: not the user's own files."""
    tiny("llama").save_pretrained(tmp_path / "m")
    write_gguf(tmp_path / "one.gguf", tmp_path / "m", "llama", "F16")
    fetched = storage.fetch(str(tmp_path / "one.gguf"), cache=cache)
    where = places(tmp_path / "home").model_copy(update={"cache": cache})
    written = whole_model(fetched.path, None, fetched.digest, where)
    (cache / "estimates").mkdir()
    (cache / "estimates" / "half.safetensors").write_bytes(b"x" * 5000)
    for folder in ("written", "gguf-companions", "gguf", "estimates"):
        (cache / folder / ".left.0123.tmp").mkdir()
    made = {"written", "companions", "gguf", "estimate"}
    assert not [one for one in plan(cache).going if one.stored.kind in made]
    age(cache)
    for path in (fetched.path, written):  # what is used again is not touched
        note_use(path)
    assert [kind for kind in kinds(plan(cache).going) if kind in made] == ["companions", "estimate"]
    age(cache)
    found = plan_cache(cache, datetime.now(UTC) + timedelta(hours=1))  # what is left over is as old as its last renaming
    assert made <= set(kinds(found.going)) and kinds(found.going).count("leftover") == 4
    outcome = collect_cache(found)
    assert not outcome.spared and not written.exists() and not fetched.path.exists()
    assert [
        path.name for folder in ("written", "gguf-companions", "gguf", "estimates") for path in (cache / folder).iterdir()
    ] == []
    assert (tmp_path / "one.gguf").is_file()
    again = storage.fetch(str(tmp_path / "one.gguf"), cache=cache)
    assert again == fetched and (whole_model(again.path, None, again.digest, where) / "model.safetensors").is_file()


def test_nothing_else_is_made_in_the_cache() -> None:
    """A folder that the code makes below the cache is known to its sweep, or holds locks, entries and digests that stay."""
    from tasks.registry.retention.cache import _PLACES

    made = set()
    for file in (Path(__file__).parents[4] / "tasks").rglob("*.py"):
        made |= set(re.findall(r"cache / (?:\"([\w.-]+)\"|WRITTEN)", file.read_text())) | (
            {"written"} if "/ WRITTEN" in file.read_text() else set()
        )
    known = {pattern.split("/")[0] for pattern in _PLACES.values()} | {"locks", "objects", "digests.sqlite"}
    assert made - {""} <= known and len(made) > 8
