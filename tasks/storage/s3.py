"""S3 through boto3: the client, one call per function, and errors in words. boto3 is imported here and nowhere else.

The endpoint, region and credentials come from the environment or the AWS profile, as for every AWS tool, or from ``use_credentials``.
"""

import base64
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from typing import IO, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors
from pydantic import BaseModel, ConfigDict

from ota_core.errors import StorageError
from ota_core.names import why_unsafe
from ota_core.reading import MAX_BYTES
from tasks.settings import exchanged
from tasks.storage.s3_answers import answered, check_listing, check_range, judge_answers
from tasks.storage.s3_errors import BODY_ERRORS as BODY_ERRORS
from tasks.storage.s3_errors import CHANGED, MISSING
from tasks.storage.s3_errors import StrangeAnswer as StrangeAnswer
from tasks.storage.s3_errors import error_code as error_code
from tasks.storage.s3_errors import s3_errors as s3_errors
from tasks.storage.s3_errors import split_uri as split_uri

MIB = 1024 * 1024
POOL_CONNECTIONS = 64
_client_lock = threading.Lock()

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Credentials:
    """Who asks, and whom. What is left out comes from the environment; key id, secret and token only together."""

    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    """Counts with the two keys alone: a token of the environment belongs to other keys."""
    profile: str | None = None
    """Of the AWS configuration; preferred to keys of the environment, as keys are to it."""
    region: str | None = None
    endpoint: str | None = None

    def variables(self) -> dict[str, str | None]:
        """The environment variables that say the same; None where one has to go."""
        keys = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": self.session_token if self.access_key else None,
        }
        given = {"AWS_PROFILE": self.profile, "AWS_DEFAULT_REGION": self.region, "AWS_ENDPOINT_URL_S3": self.endpoint}
        # A profile without keys: boto3 would prefer keys of the environment to one that the environment names.
        return (keys if self.access_key or self.profile else {}) | {name: value for name, value in given.items() if value}


_handed: ContextVar[Credentials | None] = ContextVar("s3_credentials", default=None)


@contextmanager
def use_credentials(credentials: Credentials | None) -> Iterator[None]:
    """Within this, every client of this module speaks with these credentials; None stands for the environment's.

    Holds for this thread, the ``Threads`` and coroutines started in it, and no longer than the block; the environment stays as it is.
    """
    token = _handed.set(credentials)
    try:
        yield
    finally:
        _handed.reset(token)


def has_credentials() -> bool:
    """Whether credentials are handed on here."""
    return _handed.get() is not None


@contextmanager
def environment() -> Iterator[None]:
    """The credentials in use as environment variables, for somebody else's client, which reads them there.

    The environment is the whole process's: it is restored when the last thread leaves.
    """
    credentials = _handed.get()
    if credentials is None:
        yield
        return
    with _lent_lock:
        _lent.append(exchanged(credentials.variables()))
    try:
        yield
    finally:
        with _lent_lock:
            before = _lent[0]
            _lent.pop()
            if not _lent:
                exchanged(before)


_lent_lock = threading.Lock()
_lent: list[dict[str, str | None]] = []
"""What the environment held before each thread came that is within ``environment``."""


class Threads(ThreadPoolExecutor):
    """A pool whose threads work with the credentials of who hands them the work."""

    def submit(self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        context = copy_context()
        return super().submit(lambda: context.run(fn, *args, **kwargs))


class S3Object(BaseModel):
    """One object of a listing."""

    model_config = ConfigDict(frozen=True)

    uri: str
    size: int
    etag: str
    """As the server gives it, without the quotes."""
    modified: datetime | None = None
    """When it was written, by the server's clock; None where it is not from a listing."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *names: str) -> str:
    """An address below another; pathlib would swallow one of the two slashes of ``s3://``."""
    return "/".join([uri.rstrip("/"), *names])


def client(*, patient: bool = False) -> Any:
    """The S3 client for the credentials in use and the environment as it is now; shared by all threads of the process.

    ``patient`` is for transfers: many retries. The other one answers within about 15 seconds when nobody is at the endpoint.
    Raises StorageError for a profile that the AWS configuration does not have.
    """
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _client_lock:  # boto3 sessions are not thread safe, clients are; a forked child needs connections of its own
        try:
            return _cached_client(_handed.get() or Credentials(), settings, os.getpid(), patient)
        except boto_errors.ProfileNotFound as error:
            raise StorageError(
                f"no S3 credentials: {error}; check AWS_PROFILE and the files ~/.aws/config and ~/.aws/credentials"
            ) from error


@lru_cache(maxsize=32)
def _cached_client(credentials: Credentials, settings: tuple[tuple[str, str], ...], pid: int, patient: bool) -> Any:
    return new_client(credentials, patient=patient)


def new_client(credentials: Credentials | None = None, *, patient: bool = False) -> Any:
    """A client of its own."""
    import boto3  # here: a merge of local folders does not wait for it
    from botocore.config import Config

    known = credentials or Credentials()
    session = boto3.Session(
        aws_access_key_id=known.access_key, aws_secret_access_key=known.secret_key, aws_session_token=known.session_token,
        profile_name=known.profile, region_name=known.region,
    )  # fmt: skip
    region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    attempts, connect, read = (10, 5.0, 60) if patient else (3, 3.0, 20)
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": attempts},
        connect_timeout=connect,
        read_timeout=read,
        max_pool_connections=POOL_CONNECTIONS,
        tcp_keepalive=True,
    )
    made = session.client("s3", region_name=region, endpoint_url=known.endpoint, config=config)
    if _is_aws(made.meta.endpoint_url):
        return judge_answers(made)
    # Servers other than AWS: bucket names are no host names there, and not all of them know the trailing checksums.
    custom = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return judge_answers(session.client("s3", region_name=region, endpoint_url=known.endpoint, config=config.merge(custom)))


def _is_aws(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def objects_below(uri: str) -> dict[str, S3Object]:
    """Every object below a prefix by its name relative to that, which may be joined to a folder.

    Raises StorageError as ``list_objects``, and for a key whose name would lead out of a folder.
    """
    found = {}
    for one in list_objects(uri):
        name = one.uri.removeprefix(uri.rstrip("/") + "/")
        if why := why_unsafe(name):
            raise StorageError(f"{uri} holds the key {name[:80]!r}, which is refused: {why}; remove that object")
        found[name] = one
    return found


def list_objects(uri: str) -> list[S3Object]:
    """Every object at or below a prefix, in the order of their names. ``s3://b/math`` does not match ``s3://b/math2``.

    Raises StorageError when there is no such bucket, no access, nobody at the endpoint, or no whole answer. An empty prefix gives an
    empty list.
    """
    s3, (bucket, key) = client(), split_uri(uri)
    prefix = key.rstrip("/") + "/" if key.strip("/") else ""
    found: list[S3Object] = []

    def page(more: dict[str, str]) -> dict[str, Any]:
        one: dict[str, Any] = s3.list_objects_v2(Bucket=bucket, Prefix=prefix, **more)
        check_listing(one, bucket, prefix)
        return one

    more: dict[str, str] | None = {}
    while more is not None:
        one = answered("list", uri, s3, partial(page, more))
        for item in one.get("Contents", []):
            if not item["Key"].endswith("/"):  # consoles make empty objects that stand for folders
                uri_of, etag = f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"')
                found.append(S3Object(uri=uri_of, size=item["Size"], etag=etag, modified=item["LastModified"]))
        more = {"ContinuationToken": one["NextContinuationToken"]} if one["IsTruncated"] else None
    return sorted(found, key=lambda one: one.uri)


def head(uri: str) -> dict[str, Any] | None:
    """What the server tells about an object (boto3's head_object with checksums), None when there is none."""
    s3, (bucket, key) = client(), split_uri(uri)

    def ask() -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        except boto_errors.ClientError as error:
            if error_code(error) in MISSING:
                return None
            raise
        return answer

    return answered("look at", uri, s3, ask)


def exists(uri: str) -> bool:
    """Whether there is an object of exactly this name."""
    return head(uri) is not None


def read_bytes(uri: str, *, etag: str | None = None) -> bytes:
    """A whole small object; with ``etag`` only if it is still that one. Raises StorageError when it is not there, not what was stored, or
    larger than any file that is read at once (``reading.MAX_BYTES``)."""
    s3, (bucket, key) = client(), split_uri(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}

    def ask() -> bytes:
        answer = s3.get_object(Bucket=bucket, Key=key, **condition)
        if (size := int(answer.get("ContentLength", 0))) > MAX_BYTES:
            raise StorageError(f"{uri} has {size} bytes, at most {MAX_BYTES} are read of such a file")
        content = bytes(answer["Body"].read())
        for kind, stated in expected_checksums(answer).items():
            seen = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
            if seen != stated:
                raise StrangeAnswer(what=f"the content has {kind} {seen}, it was stored with {stated}: it is damaged")
        return content

    return answered("read", uri, s3, ask)


def write_bytes(uri: str, content: bytes, *, only_if_absent: bool = False) -> bool:
    """Write a small object in one step. With ``only_if_absent`` return False, writing nothing, where one is there already."""
    s3, (bucket, key) = client(), split_uri(uri)
    condition = {"IfNoneMatch": "*"} if only_if_absent else {}
    metadata = {"sha256": hashlib.sha256(content).hexdigest()}

    def ask() -> bool:
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata, **condition)
        except boto_errors.ClientError as error:
            # 409: another conditional write of the same key is under way; it wins.
            if only_if_absent and error_code(error) in CHANGED | {"ConditionalRequestConflict"}:
                return False
            raise
        return True

    return answered("write", uri, s3, ask)


def read_range(s3: Any, one: S3Object, start: int, stop: int) -> IO[bytes]:
    """The bytes [start, stop) as a stream, provided that the object is still the listed one. ``s3`` is a client."""
    bucket, key = split_uri(one.uri)
    answer = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{one.etag}"')
    seen = answer["ETag"].strip('"')
    if seen != one.etag:  # a server that ignores IfMatch
        raise StorageError(
            f"{one.uri} was replaced meanwhile: its ETag is {seen}, it was listed as {one.etag}; run again to read it",
            reason="changed",
        )
    check_range(answer, start, stop, one.size)
    body: IO[bytes] = answer["Body"]
    return body


def delete_prefix(uri: str, *, first: str | None = None) -> int:
    """Delete every object below a prefix, the one named ``first`` (a completion marker) before the others. Returns how many."""
    s3, (bucket, _) = client(), split_uri(uri)
    found = list_objects(uri)
    marker = join(uri, first) if first else None
    keys = [split_uri(one.uri)[1] for one in sorted(found, key=lambda one: one.uri != marker)]
    with s3_errors("delete", uri, s3):
        for key in keys[:1]:
            s3.delete_object(Bucket=bucket, Key=key)
        for start in range(1, len(keys), 1000):
            batch = [{"Key": key} for key in keys[start : start + 1000]]
            failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True}).get("Errors", [])
            if failed:
                raise StorageError(f"could not delete {len(failed)} objects below {uri}; the first: {failed[0]}")
    return len(keys)


def create_bucket(uri: str) -> str:
    """Create a bucket of one's own; one that exists already is fine. Returns its address."""
    s3, (bucket, _) = client(), split_uri(uri)
    with s3_errors("create", uri, s3):
        try:
            s3.create_bucket(Bucket=bucket)
        except boto_errors.ClientError as error:
            if error_code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
    return f"s3://{bucket}"


def expected_checksums(answer: dict[str, Any]) -> dict[str, str]:
    """What a head answer says about the content: ``sha256`` and ``md5`` in hex, each only where the server's words mean that.

    A multipart ETag (with "-") and one under KMS or customer keys are no MD5; a composite SHA256 (with "-") is not of the whole.
    """
    known = {}
    checksum = answer.get("ChecksumSHA256", "")
    if re.fullmatch(r"[A-Za-z0-9+/]{43}=", checksum):
        known["sha256"] = base64.b64decode(checksum).hex()
    elif re.fullmatch(r"[0-9a-fA-F]{64}", answer.get("Metadata", {}).get("sha256", "")):
        known["sha256"] = answer["Metadata"]["sha256"].lower()
    etag = answer.get("ETag", "").strip('"')
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    if len(etag) == 32 and not set(etag) - set("0123456789abcdef") and not encrypted:
        known["md5"] = etag
    return known


def part_size(one: S3Object, told: dict[str, Any], s3: Any) -> int | None:
    """Bytes of each part of an upload in parts, but the last; ``told``: what ``head`` says. None where its ETag is not made of the parts."""
    digits, _, count = one.etag.partition("-")
    encrypted = told.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in told
    if len(digits) != 32 or not count.isdecimal() or encrypted:
        return None
    if count == "1":
        return one.size
    bucket, key = split_uri(one.uri)
    try:
        size = int(s3.head_object(Bucket=bucket, Key=key, PartNumber=1)["ContentLength"])
    except (boto_errors.ClientError, StrangeAnswer):  # servers that do not know parts any more
        return None
    return size if size and -(-one.size // size) == int(count) else None
