"""What boto3 raises, as one StorageError in words: which server, bucket and key, how often and how long it was asked, what to do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from botocore import exceptions as boto_errors
from botocore.parsers import ResponseParserError

from ota_core.addresses import without_secrets
from ota_core.errors import StorageError, StorageReason

# What leaves a broken connection in the middle of a body; botocore retries requests, not the reading of their bodies.
BODY_ERRORS = (boto_errors.IncompleteReadError, boto_errors.HTTPClientError, OSError)

MISSING = {"NoSuchKey", "404", "NotFound"}
CHANGED = {"PreconditionFailed", "412"}
_DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_BUSY = {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded",
    "TooManyRequests", "TooManyRequestsException", "BandwidthLimitExceeded", "OperationAborted",
}  # fmt: skip


class StrangeAnswer(boto_errors.BotoCoreError):  # type: ignore[misc]  # botocore has no types
    """The server's status says that all is well, but its answer is none of S3's: a proxy's page, a part of an answer."""

    fmt = "{what}"


class Asked:
    """How often a server was asked, and for how long: for messages."""

    def __init__(self) -> None:
        self.times, self._began = 0, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def note(self, error: Exception | None = None) -> None:
        """One more time, and those that botocore asked again by itself."""
        self.times += 1 + (_again(error) if isinstance(error, boto_errors.ClientError) else 0)

    def __str__(self) -> str:
        return f"asked {self.times} times within {self.seconds:.0f} s" if self.times > 1 else ""


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key or prefix) of ``s3://bucket/key``. Raises StorageError on anything else."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise StorageError(
            f"{without_secrets(uri)} held a key before the bucket; give keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in a profile (AWS_PROFILE)"
        )
    if not uri.startswith("s3://") or not bucket:
        raise StorageError(f"{uri!r} is not an S3 address; expected s3://bucket/prefix")
    return bucket, key


def error_code(error: boto_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def is_busy(error: boto_errors.ClientError) -> bool:
    """Whether the server may well answer the same question a moment later."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error_code(error) in _BUSY or status == 429 or status >= 500


def _again(error: boto_errors.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


@contextmanager
def s3_errors(action: str, uri: str, s3: Any, asked: Asked | None = None) -> Iterator[None]:
    """Turn what boto3 raises into a StorageError that names the endpoint, the bucket and the key, and says what to do.

    ``asked``: who counts the attempts; without it one question is counted, with those of botocore's own that follow it.
    """
    counted = asked or Asked()
    try:
        try:
            yield
        except (RecursionError, TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, boto_errors.BotoCoreError) or not by_library(error):
                raise
            said = f"the answer is none of S3's: {type(error).__name__} in the client's library; does a proxy stand between?"
            raise StrangeAnswer(what=said) from error
    except boto_errors.ClientError as error:
        if asked is None:
            counted.note(error)
        raise _explained(error, action, uri, s3, counted) from error
    except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise StorageError(
            f"{_where(action, uri, s3)}: no complete S3 credentials were found ({error}); {hint}", reason="unavailable"
        ) from error
    except (boto_errors.HTTPClientError, boto_errors.BotoCoreError, ResponseParserError) as error:
        hint = "check that the server runs and that AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) is its address"
        reason: StorageReason = "unavailable"
        if isinstance(error, boto_errors.ParamValidationError):
            hint, reason = "check the spelling of the bucket and key", "content"
        said = " ".join(without_secrets(str(error)).split())[:500]
        times = f" ({counted})" if str(counted) else ""
        raise StorageError(f"{_where(action, uri, s3)}: {said}{times}; {hint}", reason=reason) from error


def by_library(error: BaseException) -> bool:
    """Whether an exception comes from within botocore, of an answer that it was not written for, and not from this package."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    theirs = max((i for i, name in enumerate(names) if name.startswith(("botocore.", "boto3.", "urllib3."))), default=-1)
    return theirs > max((i for i, name in enumerate(names) if name.startswith(("tasks.", "ota_core."))), default=-1)


def _where(action: str, uri: str, s3: Any) -> str:
    bucket, key = split_uri(uri)
    return f"cannot {action} {uri} (endpoint {without_secrets(s3.meta.endpoint_url)}, bucket {bucket!r}, key {key!r})"


def _explained(error: boto_errors.ClientError, action: str, uri: str, s3: Any, asked: Asked) -> StorageError:
    code, where = error_code(error), _where(action, uri, s3)
    bucket, _ = split_uri(uri)
    if code == "NoSuchBucket":
        hint = "check the name and the endpoint"
        return StorageError(f"{where}: there is no bucket {bucket!r} there; {hint}", reason="unavailable")
    if code in MISSING and action != "list":  # a listing that is not there is an empty one: this is no answer of S3
        return StorageError(f"{where}: there is no such key; check the spelling, or list the bucket", reason="missing")
    if code in _DENIED:
        return StorageError(f"{where}: access denied; check that AWS_ACCESS_KEY_ID may do this on the bucket", reason="denied")
    if code in _BAD_CREDENTIALS:
        hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(f"{where}: access denied, the credentials were refused ({code}); {hint}", reason="unavailable")
    if code in CHANGED:
        seen = "the object was replaced meanwhile (its ETag is no longer the one listed)"
        return StorageError(f"{where}: {seen}; run again to read the new one", reason="changed")
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:300]
    times = f" ({asked})" if str(asked) else ""
    answer = f"{where}: the server answered {code} {message}".rstrip()
    return StorageError(f"{answer}{times}; see the server's log or try again later", reason="unavailable")
