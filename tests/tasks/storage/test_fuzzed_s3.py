"""Whatever a server answers ends with what it holds, or with a StorageError: never with another exception, and never with other bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ota_core.errors import StorageError
from tasks.experts.find import find_experts
from tasks.storage import models as storage
from tasks.storage import s3, s3_answers, s3_body
from tests.servers import S3Test
from tests.tasks.storage.s3_proxy import HTML, Answer, Proxy

CONFIG = b'{"model_type": "llama"}'
MANIFEST = {"capability": "math", "base_model": "s3://models/base", "trained_at": "2026-01-01"}
HEADERS = [
    "etag", "content-type", "content-range", "last-modified", "x-amz-meta-sha256", "x-amz-checksum-sha256", "x-amz-checksum-crc32",
    "x-amz-server-side-encryption", "x-amz-mp-parts-count", "content-encoding", "x-amz-version-id", "x-amz-request-id",
]  # fmt: skip
VALUES = [
    "",
    "x",
    '""',
    '"0"',
    "-1",
    "9" * 40,
    "bytes 0-9/*",
    "bytes x",
    "!!!",
    "a" * 3000,
    "gzip",
    "aws:kms",
    "\u00ff",
    "yesterday",
    "AAAA",
    "text/html",
]
FIELDS = [
    "Size",
    "ETag",
    "LastModified",
    "Key",
    "KeyCount",
    "IsTruncated",
    "NextContinuationToken",
    "Name",
    "Prefix",
    "MaxKeys",
    "Contents",
]
TEXTS = [
    "",
    "x",
    "-1",
    "9" * 40,
    "../../etc/passwd",
    "/abs",
    "a\\b",
    "true",
    "&lt;",
    "a" * 3000,
    "1e5",
    "\u202e",
    "&amp;#27;[31m",
]
BODIES = [
    b"", HTML, b"\xff\xfe", b"{}", b"<a>" * 5000, b"<?xml version='1.0'?><ListBucketResult/>", b"<Error><Code>NoSuchKey</Code></Error>",
    b"<!DOCTYPE a [<!ENTITY b 'xxxxxxxxxx'>" + b"".join(b"<!ENTITY b%d '%s'>" % (i, b"&b%s;" % (str(i - 1).encode() if i else b"") * 10) for i in range(9))
    + b"]><a>&b8;</a>",
]  # fmt: skip

Change = tuple[str, Any]
# A server that is too busy is left out: botocore then asks more and more slowly (test_s3_answers.py).
changes: st.SearchStrategy[Change] = st.one_of(
    st.tuples(st.just("status"), st.sampled_from([200, 204, 206, 301, 302, 304, 400, 403, 404, 409, 412, 416, 500])),
    st.tuples(st.just("header"), st.tuples(st.sampled_from(HEADERS), st.none() | st.sampled_from(VALUES))),
    st.tuples(st.just("body"), st.sampled_from(BODIES)),
    st.tuples(st.just("cut"), st.integers(0, 4000)),
    st.tuples(st.just("short"), st.integers(1, 50)),
    st.tuples(st.just("field"), st.tuples(st.sampled_from(FIELDS), st.none() | st.sampled_from(TEXTS))),
    st.tuples(st.just("flip"), st.integers(0, 4000)),
)
WHICH = ["list", "head", "get", "all"]


def made(kind: str, what: Any) -> Callable[[Answer], None]:
    """What changes an answer so."""

    def change(answer: Answer) -> None:
        if kind == "status":
            answer.status = what
        elif kind == "header" and what[1] is None:
            answer.headers.pop(what[0], None)
        elif kind == "header":
            answer.headers[what[0]] = what[1].encode().decode("latin-1")
        elif kind == "body":
            answer.body = what
        elif kind == "cut":
            answer.body = answer.body[:what]
        elif kind == "short":
            answer.short = min(what, len(answer.body))
        elif kind == "flip" and answer.body:
            at = what % len(answer.body)
            answer.body = answer.body[:at] + bytes([answer.body[at] ^ 1]) + answer.body[at + 1 :]
        elif kind == "field":
            name, text = what
            opening, closing = f"<{name}>".encode(), f"</{name}>".encode()
            start, stop = answer.body.find(opening), answer.body.find(closing)
            if 0 <= start < stop:
                inside = b"" if text is None else opening + text.encode() + closing
                answer.body = answer.body[:start] + inside + answer.body[stop + len(closing) :]

    return change


@pytest.fixture
def prefix(s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> str:
    """An expert below a prefix, and shorter waits: it is counted, not how long."""
    monkeypatch.setattr(s3_answers, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(s3_answers, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(s3_body.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    uri = f"{s3_server.uri}/fuzzed"
    s3.write_bytes(f"{uri}/math/one/config.json", CONFIG)
    s3.write_bytes(f"{uri}/math/one/model.safetensors", b"\x02\0\0\0\0\0\0\0{}" + bytes(500))
    s3.write_bytes(f"{uri}/math/one/expert.json", json.dumps(MANIFEST).encode())
    return uri


def check(proxy: Proxy, prefix: str, cache: Path, which: str, change: Change) -> None:
    """Everything that is asked of S3, while its answers are changed so."""
    kept = made(*change)

    def damage(answer: Answer) -> None:
        kind = "list" if answer.lists else answer.method.lower()
        if which in (kind, "all"):
            kept(answer)

    model = f"{prefix}/math/one"
    # A listing carries no sum: a key in it may be another one, though never one outside the prefix.
    questions: list[tuple[Callable[[], Any], Callable[[Any], bool]]] = [
        (lambda: storage.list_objects(prefix), lambda found: all(one.uri.startswith(f"{prefix}/") for one in found)),
        (lambda: storage.head(f"{model}/config.json"), lambda found: found is None or isinstance(found, dict)),
        (lambda: s3.read_bytes(f"{model}/config.json"), lambda found: found == CONFIG or kept_nothing(change)),
        (lambda: find_experts(prefix, base_model="s3://models/base"), lambda found: isinstance(found, tuple)),
        (lambda: storage.fetch(model, cache=cache), lambda found: holds(found.path) or kept_nothing(change)),
    ]
    proxy.change = damage
    try:
        for ask, right in questions:
            try:
                found = ask()
            except StorageError as error:
                assert len(str(error)) < 4096 and "\x1b" not in str(error)
            else:
                assert right(found), (which, change, found)
    finally:
        proxy.change = lambda answer: None


def holds(folder: Path) -> bool:
    file = folder / "config.json"
    return not file.exists() or file.read_bytes() == CONFIG


def kept_nothing(change: Change) -> bool:
    """Whether the change took away what the bytes could be held against."""
    return change[0] == "header" and change[1][0] in {"etag", "x-amz-meta-sha256", "x-amz-checksum-sha256"}


slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=slow)
@given(st.sampled_from(WHICH), changes)
@example("head", ("status", 301))
@example("list", ("status", 301))
@example("head", ("header", ("x-amz-checksum-sha256", "!!!")))
@example("list", ("field", ("Size", "-1")))
def test_answers(proxy: Proxy, prefix: str, tmp_path_factory: pytest.TempPathFactory, which: str, change: Change) -> None:
    check(proxy, prefix, tmp_path_factory.mktemp("cache"), which, change)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=slow)
@given(st.sampled_from(WHICH), changes)
def test_many_answers(proxy: Proxy, prefix: str, tmp_path_factory: pytest.TempPathFactory, which: str, change: Change) -> None:
    check(proxy, prefix, tmp_path_factory.mktemp("cache"), which, change)
