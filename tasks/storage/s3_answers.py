"""Whether what a server answered is an answer of S3, and asking again where it is not, or where the server is too busy.

Between a client and S3 stand proxies, gateways and load balancers, which answer 200 with a page of their own; connections end in the
middle of an answer. An empty listing, a short body or a missing header must never pass for what the server holds.
"""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from botocore import exceptions as boto_errors
from botocore.parsers import ResponseParserError

from tasks.storage.s3_errors import BODY_ERRORS, Asked, StrangeAnswer, is_busy, s3_errors

T = TypeVar("T")

BUSY_ATTEMPTS = 8
"""Questions to a server that says that it is too busy; botocore asks each of them three times. About half a minute in all."""
STRANGE_ATTEMPTS = 3
"""Questions whose answer is none of S3's, or breaks off."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds

# What an answer of S3 to these questions always holds.
_HOLDS = {
    "ListObjectsV2": "Name", "HeadObject": "ETag", "GetObject": "ETag", "PutObject": "ETag", "CopyObject": "CopyObjectResult",
    "CreateMultipartUpload": "UploadId", "UploadPart": "ETag", "UploadPartCopy": "CopyPartResult", "CompleteMultipartUpload": "ETag",
}  # fmt: skip


def judge_answers(client: Any) -> Any:
    """Let a client of boto3 raise StrangeAnswer for what is no answer of S3; returns it."""
    for operation in _HOLDS:
        client.meta.events.register(f"after-call.s3.{operation}", _judge)
    return client


def _judge(http_response: Any, parsed: dict[str, Any], model: Any, **_: Any) -> None:
    if http_response.status_code < 300 and _HOLDS[model.name] not in parsed:
        raise strange(model.name, parsed, f"without {_HOLDS[model.name]}")


def strange(operation: str, parsed: dict[str, Any], what: str) -> StrangeAnswer:
    """The error for an answer of which ``what`` says how it differs from S3's."""
    told = parsed.get("ResponseMetadata", {})
    kind = told.get("HTTPHeaders", {}).get("content-type", "none")
    return StrangeAnswer(
        what=f"the answer to {operation} (status {told.get('HTTPStatusCode')}, content type {kind}) is none of S3's: {what}; "
        "does a proxy or a login page stand between?"
    )


def check_listing(page: dict[str, Any], bucket: str, prefix: str) -> None:
    """Raise StrangeAnswer for a page of a listing that is not of this bucket and prefix, or not whole."""
    listed, problem = page.get("Contents", []), ""
    count = page.get("KeyCount")
    if page["Name"] != bucket or page.get("Prefix", prefix) != prefix:
        problem = f"it lists {page['Name']!r}, prefix {page.get('Prefix')!r}"
    elif any(not {"Key", "Size", "ETag", "LastModified"} <= set(one) or not one["Key"].startswith(prefix) for one in listed):
        problem = "it lists objects without name, size, ETag or time, or of another prefix"
    elif any(not 0 <= one["Size"] < 2**63 for one in listed):
        problem = "it lists objects of an impossible size"
    elif count is not None and count != len(listed) + len(page.get("CommonPrefixes", [])):
        problem = f"it announces {count} objects and lists {len(listed)}"
    elif "IsTruncated" not in page or (page["IsTruncated"] and not page.get("NextContinuationToken")):
        problem = "it does not say whether, and how, it goes on"
    if problem:
        raise strange("ListObjectsV2", page, problem)


def check_range(answer: dict[str, Any], start: int, stop: int, size: int) -> None:
    """Raise StrangeAnswer unless a GET brings the bytes [start, stop) of an object of ``size`` bytes."""
    status, told = answer["ResponseMetadata"]["HTTPStatusCode"], answer.get("ContentRange", "")
    whole = status == 200 and (start, stop) == (0, size) and answer.get("ContentLength") == size
    if not whole and (status != 206 or told.replace("/*", f"/{size}") != f"bytes {start}-{stop - 1}/{size}"):
        raise strange("GetObject", answer, f"bytes {start}-{stop - 1}/{size} were asked for, it brings {told or 'all of them'}")


def answered(action: str, uri: str, client: Any, ask: Callable[[], T]) -> T:
    """What ``ask`` returns, asked again while the server is too busy or its answer is damaged.

    Raises StorageError, which says how often and how long the server was asked. A server that nobody reaches is not asked again.
    """
    asked, strange_ones = Asked(), 0
    with s3_errors(action, uri, client, asked):
        while True:
            try:
                found = ask()
            except boto_errors.ClientError as error:
                asked.note(error)
                if not is_busy(error) or asked.times >= BUSY_ATTEMPTS * 3 or asked.seconds > 60:
                    raise
            except (
                StrangeAnswer,
                ResponseParserError,
                boto_errors.IncompleteReadError,
                boto_errors.ResponseStreamingError,
            ) as error:
                asked.note(error)
                strange_ones += 1
                if strange_ones == STRANGE_ATTEMPTS:
                    raise
            else:
                return found
            wait(asked.times)


def wait(times: int) -> None:
    """Longer with every time, up to ``LONGEST_WAIT``; by chance, so that machines that were refused together do not come again together."""
    time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(times, 16)) * random.uniform(0.5, 1.0))


__all__ = [
    "BODY_ERRORS",
    "Asked",
    "StrangeAnswer",
    "answered",
    "check_listing",
    "check_range",
    "judge_answers",
    "strange",
    "wait",
]
