"""Uploads and copies within S3 through boto3's transfer manager: several objects at once, large ones in parts."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ota_core.errors import StorageError
from tasks.storage import s3

log = logging.getLogger(__name__)

ABANDONED = timedelta(days=1)
"""No upload of one file lasts so long."""

# One request copies objects up to this size; larger ones are copied in ranges.
_COPY_AT_ONCE, _COPY_RANGE = 5 * 10**9, 10**9


def upload_files(
    files: Iterable[tuple[Path, str, str]], *, part_size: int, threads: int, callback: Callable[[int], None] | None = None
) -> None:
    """Upload files, each with its address and its SHA-256 in hex, which is kept as metadata: several at once, large ones in parts.

    ``files`` is taken from while the first of them are under way. ``callback`` is told bytes. Raises StorageError.
    """
    from boto3.s3.transfer import ProgressCallbackInvoker

    def start(manager: Any) -> Iterator[tuple[str, Any]]:
        for path, uri, sha256 in files:
            (bucket, key), told = s3.split_uri(uri), [ProgressCallbackInvoker(callback)] if callback else None
            yield uri, manager.upload(str(path), bucket, key, {"Metadata": {"sha256": sha256}}, told)

    _transfer("upload", start, threads, multipart_threshold=part_size, multipart_chunksize=part_size)


def copy_objects(pairs: Mapping[str, str], *, threads: int = 8) -> None:
    """Copy objects, source → target, within the server, none of their bytes through this machine; metadata come along.

    One request each up to 5 GB, S3's limit; copies of ranges above. Raises StorageError.
    """
    client = s3.client(patient=True)

    def start(manager: Any) -> Iterator[tuple[str, Any]]:
        for source, target in pairs.items():
            (from_bucket, from_key), (bucket, key) = s3.split_uri(source), s3.split_uri(target)
            with s3.s3_errors("copy", source, client):
                # Copies of ranges make a new object, without the metadata of the old one unless they are given.
                held = client.head_object(Bucket=from_bucket, Key=from_key).get("Metadata", {})
            metadata = {"Metadata": held, "MetadataDirective": "REPLACE"}
            yield source, manager.copy({"Bucket": from_bucket, "Key": from_key}, bucket, key, metadata)

    _transfer("copy", start, threads, multipart_threshold=_COPY_AT_ONCE, multipart_chunksize=_COPY_RANGE)


def end_unfinished(uri: str, *, before: datetime) -> int:
    """End uploads in parts below a prefix that began before then and were never finished: their parts take room, and no listing shows them.

    Returns how many. Where these may not be listed or ended, none; a rule of the bucket can do the same (AbortIncompleteMultipartUpload).
    """
    client, (bucket, key), ended = s3.client(), s3.split_uri(uri), 0
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    try:
        with s3.s3_errors("list unfinished uploads", uri, client):
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
                for one in page.get("Uploads", []):
                    if one["Initiated"] < before:
                        client.abort_multipart_upload(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
                        ended += 1
    except StorageError as error:
        log.info("unfinished uploads stay: %s", error)
    return ended


def _transfer(action: str, start: Callable[[Any], Iterator[tuple[str, Any]]], threads: int, **sizes: int) -> None:
    """Have boto3's transfer manager do what ``start`` asks of it; the first that fails ends the others."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    client = s3.client(patient=True)
    config = TransferConfig(max_concurrency=threads, preferred_transfer_client="classic", **sizes)
    with create_transfer_manager(client, config) as manager:
        for uri, future in list(start(manager)):
            with s3.s3_errors(action, uri, client):
                future.result()
