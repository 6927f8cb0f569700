"""Every answer of S3 is judged: what a proxy, a broken connection or a busy server answers never passes for what the server holds."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ota_core.errors import StorageError
from tasks.storage import models as storage
from tasks.storage import s3, s3_answers
from tasks.storage.models import fetch, upload_folder
from tests.s3_proxy import HTML, SLOW_DOWN, Answer, Proxy
from tests.servers import S3Test


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits: it is counted, not how long."""
    monkeypatch.setattr(s3_answers, "LONGEST_WAIT", 0.02)


@pytest.fixture
def model(s3_server: S3Test, tmp_path: Path) -> str:
    """A prefix with a few objects."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(5000))
    upload_folder(folder, f"{s3_server.uri}/m")
    return f"{s3_server.uri}/m"


def cut(answer: Answer) -> None:
    answer.body = answer.body[: len(answer.body) // 2]


def page(answer: Answer) -> None:
    answer.replace(200, HTML, "text/html")


def short(answer: Answer) -> None:
    answer.short = 7


def other_bucket(answer: Answer) -> None:
    answer.body = answer.body.replace(b"<Name>test-", b"<Name>best-")


def fewer(answer: Answer) -> None:
    start, stop = answer.body.index(b"<Contents>"), answer.body.index(b"</Contents>") + len(b"</Contents>")
    answer.body = answer.body[:start] + answer.body[stop:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [(page, "none of S3's"), (cut, "Unable to parse"), (short, ""), (other_bucket, "it lists 'best-"), (fewer, "announces 2 objects and lists 1")],
)  # fmt: skip
def test_a_damaged_listing_is_asked_again_and_then_said(
    proxy: Proxy, model: str, damage: Callable[[Answer], None], said: str
) -> None:
    def once(answer: Answer) -> None:
        if answer.lists and sum(one.endswith("?list") for one in proxy.seen) == 1:
            damage(answer)

    proxy.change = once
    assert len(storage.list_objects(model)) == 2
    proxy.change = lambda answer: damage(answer) if answer.lists else None
    with pytest.raises(StorageError, match="cannot list") as seen:
        storage.list_objects(model)
    assert said in str(seen.value) and "times within" in str(seen.value) and "no such key" not in str(seen.value)
    assert seen.value.reason == "unavailable"
    with pytest.raises(StorageError, match="cannot list"):
        fetch(model, cache=Path(model.rsplit("/", 1)[-1]))


def test_a_listing_of_many_pages_is_whole_or_an_error(proxy: Proxy, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        s3.write_bytes(f"{s3_server.uri}/many/{i}", b"x")
    client = s3.client()
    real = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **asked: real(MaxKeys=2, **asked))
    assert [one.uri[-1] for one in storage.list_objects(f"{s3_server.uri}/many")] == list("01234")

    def forget(answer: Answer) -> None:
        start, stop = answer.body.find(b"<NextContinuationToken>"), answer.body.find(b"</NextContinuationToken>")
        answer.body = answer.body[:start] + answer.body[stop + 24 :] if start > 0 else answer.body

    proxy.change = forget
    with pytest.raises(StorageError, match="does not say whether, and how, it goes on"):
        storage.list_objects(f"{s3_server.uri}/many")


@pytest.mark.parametrize("what", ["list", "head", "get"])
def test_a_busy_server_is_asked_again_and_how_often_is_said(proxy: Proxy, model: str, what: str) -> None:
    ask = {
        "list": lambda: storage.list_objects(model), "head": lambda: storage.head(f"{model}/config.json"),
        "get": lambda: storage.read_bytes(f"{model}/config.json"),
    }[what]  # fmt: skip
    busy = 7

    def slow_down(answer: Answer) -> None:
        if len(proxy.seen) <= busy:
            answer.replace(503, b"" if answer.method == "HEAD" else SLOW_DOWN, "application/xml")

    proxy.change = slow_down
    assert ask()
    assert len(proxy.seen) == busy + 1
    proxy.seen.clear()
    busy = 10**6
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"asked 2\d times within \d+ s.*try again later") as seen:
        ask()
    assert len(proxy.seen) == 3 * s3_answers.BUSY_ATTEMPTS and time.monotonic() - began < 60
    assert seen.value.reason == "unavailable"


def test_a_page_instead_of_an_object_or_of_what_is_told_of_it(proxy: Proxy, model: str, s3_server: S3Test) -> None:
    proxy.change = page
    with pytest.raises(StorageError, match=r"cannot read .*GetObject .*content type text/html.* is none of S3's"):
        storage.read_bytes(f"{model}/config.json")
    with pytest.raises(StorageError, match=r"cannot look at .*is none of S3's"):
        storage.head(f"{model}/config.json")
    with pytest.raises(StorageError, match=r"cannot write .*is none of S3's"):
        storage.write_bytes(f"{s3_server.uri}/new", b"x")


def test_an_upload_that_a_proxy_swallowed_is_no_upload(proxy: Proxy, s3_server: S3Test, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "config.json").write_text("{}")

    def swallow(answer: Answer) -> None:
        if answer.method in {"PUT", "POST"}:
            page(answer)

    proxy.change = swallow
    with pytest.raises(StorageError, match=r"cannot upload .*PutObject.*is none of S3's"):
        upload_folder(tmp_path / "up", f"{s3_server.uri}/up")


@pytest.mark.parametrize("damage", [short, page])
def test_a_small_object_comes_whole_or_not_at_all(proxy: Proxy, model: str, damage: Callable[[Answer], None]) -> None:
    proxy.change = lambda answer: damage(answer) if len(proxy.seen) < 3 else None
    assert storage.read_bytes(f"{model}/config.json") == b'{"model_type": "llama"}'
    proxy.change = damage
    with pytest.raises(StorageError, match="cannot read"):
        storage.read_bytes(f"{model}/config.json")


def test_a_flipped_byte_of_a_small_object_is_seen(proxy: Proxy, model: str) -> None:
    def flip(answer: Answer) -> None:
        answer.body = answer.body.replace(b"llama", b"lloma")

    proxy.change = flip
    with pytest.raises(StorageError, match="it is damaged"):
        storage.read_bytes(f"{model}/config.json")


def test_a_range_that_is_none(proxy: Proxy, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers and caches that ignore Range, or answer with another one."""
    from tasks.storage import s3_body

    monkeypatch.setattr(s3_body.time, "sleep", lambda seconds: None)
    (one,) = [one for one in storage.list_objects(model) if one.uri.endswith(".safetensors")]
    client = s3.client(patient=True)

    def shifted(answer: Answer) -> None:
        if "content-range" in answer.headers:
            answer.headers["content-range"] = "bytes 5-14/5010"

    proxy.change = shifted
    with pytest.raises(StorageError, match=r"bytes 0-9/5010 were asked for, it brings bytes 5-14/5010"):
        s3_body.read_exactly(client, one, 0, 10)
    proxy.change = lambda answer: None
    assert bytes(s3_body.read_exactly(client, one, 0, 10)) == b"\x02\0\0\0\0\0\0\0{}"
