"""S3 through boto3: the client, one call per function, and errors in words. boto3 is imported here and nowhere else.

The endpoint, region and credentials come from the environment or the AWS profile, as for every AWS tool, or from ``use_credentials``.
"""

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors
from pydantic import BaseModel, ConfigDict

from ota_core.errors import StorageError, StorageReason
from ota_core.names import why_unsafe
from tasks.settings import exchanged

MIB = 1024 * 1024
POOL_CONNECTIONS = 64
# What leaves a broken connection in the middle of a body; botocore retries requests, not the reading of their bodies.
BODY_ERRORS = (boto_errors.IncompleteReadError, boto_errors.HTTPClientError, OSError)

_MISSING = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_CHANGED = {"PreconditionFailed", "412"}
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


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key or prefix) of ``s3://bucket/key``. Raises StorageError on anything else."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not is_s3(uri) or not bucket:
        raise StorageError(f"{uri!r} is not an S3 address; expected s3://bucket/prefix")
    return bucket, key


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
        return made
    # Servers other than AWS: bucket names are no host names there, and not all of them know the trailing checksums.
    custom = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", region_name=region, endpoint_url=known.endpoint, config=config.merge(custom))


def _is_aws(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


@contextmanager
def s3_errors(action: str, uri: str, s3: Any) -> Iterator[None]:
    """Turn what boto3 raises into a StorageError that names the endpoint, the bucket and the key, and says what to do."""
    try:
        yield
    except boto_errors.ClientError as error:
        raise _explained(error, action, uri, s3) from error
    except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise StorageError(
            f"{_where(action, uri, s3)}: no complete S3 credentials were found ({error}); {hint}", reason="unavailable"
        ) from error
    except (boto_errors.HTTPClientError, boto_errors.BotoCoreError) as error:
        hint = "check that the server runs and that AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) is its address"
        reason: StorageReason = "unavailable"
        if isinstance(error, boto_errors.ParamValidationError):
            hint, reason = "check the spelling of the bucket and key", "content"
        raise StorageError(f"{_where(action, uri, s3)}: {' '.join(str(error).split())}; {hint}", reason=reason) from error


def _where(action: str, uri: str, s3: Any) -> str:
    bucket, key = split_uri(uri)
    return f"cannot {action} {uri} (endpoint {s3.meta.endpoint_url}, bucket {bucket!r}, key {key!r})"


def error_code(error: boto_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _explained(error: boto_errors.ClientError, action: str, uri: str, s3: Any) -> StorageError:
    code, where = error_code(error), _where(action, uri, s3)
    bucket, _ = split_uri(uri)
    if code == "NoSuchBucket":
        hint = "check the name and the endpoint"
        return StorageError(f"{where}: there is no bucket {bucket!r} there; {hint}", reason="unavailable")
    if code in _MISSING:
        return StorageError(f"{where}: there is no such key; check the spelling, or list the bucket", reason="missing")
    if code in _DENIED:
        return StorageError(f"{where}: access denied; check that AWS_ACCESS_KEY_ID may do this on the bucket", reason="denied")
    if code in _BAD_CREDENTIALS:
        hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(f"{where}: access denied, the credentials were refused ({code}); {hint}", reason="unavailable")
    if code in _CHANGED:
        seen = "the object was replaced meanwhile (its ETag is no longer the one listed)"
        return StorageError(f"{where}: {seen}; run again to read the new one", reason="changed")
    message = error.response.get("Error", {}).get("Message", "")
    answer = f"{where}: the server answered {code} {message}".rstrip()
    return StorageError(f"{answer}; see the server's log or try again later", reason="unavailable")


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

    Raises StorageError when there is no such bucket, no access, or nobody at the endpoint. An empty prefix gives an empty list.
    """
    s3, (bucket, key) = client(), split_uri(uri)
    prefix = key.rstrip("/") + "/" if key.strip("/") else ""
    found = []
    with s3_errors("list", uri, s3):
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # consoles make empty objects that stand for folders
                    uri_of, etag = f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"')
                    found.append(S3Object(uri=uri_of, size=item["Size"], etag=etag, modified=item["LastModified"]))
    return sorted(found, key=lambda one: one.uri)


def head(uri: str) -> dict[str, Any] | None:
    """What the server tells about an object (boto3's head_object with checksums), None when there is none."""
    s3, (bucket, key) = client(), split_uri(uri)
    with s3_errors("look at", uri, s3):
        try:
            answer: dict[str, Any] = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        except boto_errors.ClientError as error:
            if error_code(error) in _MISSING:
                return None
            raise
    return answer


def exists(uri: str) -> bool:
    """Whether there is an object of exactly this name."""
    return head(uri) is not None


def read_bytes(uri: str, *, etag: str | None = None) -> bytes:
    """A whole small object; with ``etag`` only if it is still that one. Raises StorageError when it is not there."""
    s3, (bucket, key) = client(), split_uri(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    with s3_errors("read", uri, s3):
        return bytes(s3.get_object(Bucket=bucket, Key=key, **condition)["Body"].read())


def write_bytes(uri: str, content: bytes, *, only_if_absent: bool = False) -> bool:
    """Write a small object in one step. With ``only_if_absent`` return False, writing nothing, where one is there already."""
    s3, (bucket, key) = client(), split_uri(uri)
    condition = {"IfNoneMatch": "*"} if only_if_absent else {}
    metadata = {"sha256": hashlib.sha256(content).hexdigest()}
    with s3_errors("write", uri, s3):
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata, **condition)
        except boto_errors.ClientError as error:
            # 409: another conditional write of the same key is under way; it wins.
            if only_if_absent and error_code(error) in _CHANGED | {"ConditionalRequestConflict"}:
                return False
            raise
    return True


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
    if checksum and "-" not in checksum:
        known["sha256"] = base64.b64decode(checksum).hex()
    elif "sha256" in answer.get("Metadata", {}):
        known["sha256"] = answer["Metadata"]["sha256"].lower()
    etag = answer.get("ETag", "").strip('"')
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    if len(etag) == 32 and not set(etag) - set("0123456789abcdef") and not encrypted:
        known["md5"] = etag
    return known
