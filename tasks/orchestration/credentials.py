"""Credentials from a Prefect block, so that no machine has to hold them: ``OTA_AWS_BLOCK`` names it.

The block (type AWS Credentials, of prefect-aws) is read from the Prefect server when a flow starts, and handed to this tool's S3
client for as long as the flow runs (``tasks.storage.s3.use_credentials``). The environment stays as it is, also that of processes
started meanwhile; only while MLflow stores or reads its own artifacts, its client finds them there (``s3.environment``). Nothing is
written to disk or logged.

The block wins over the environment, because somebody named it; what it is used instead of is logged by name. Key id, secret and
session token go together: a token that belongs to other keys would make them invalid. What the block leaves empty comes from the
environment.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger

from ota_core.errors import OtaError
from tasks.storage import s3

if TYPE_CHECKING:
    from prefect_aws import AwsCredentials

VARIABLE = "OTA_AWS_BLOCK"
BLOCK_TYPE = "aws-credentials"


@contextmanager
def block_credentials() -> Iterator[None]:
    """Within this, S3 is spoken to with the credentials of the block named by ``OTA_AWS_BLOCK``, where one is named.

    Flows are given it by ``tasks.orchestration.run_log.for_users``; a task that may run in another process asks for it itself. Within
    another one, nothing is loaded again. Raises OtaError when the name is of another type of block, prefect-aws is missing, or the block
    is missing, unreadable, incomplete, or says what cannot be handed on.
    """
    reference = os.environ.get(VARIABLE, "").strip()
    if not reference or s3.has_credentials():
        yield
        return
    credentials = _credentials(_load(reference), reference)
    replaced = [name for name, value in credentials.variables().items() if (os.environ.get(name) or value) != value]
    if replaced:
        log = get_run_logger() if FlowRunContext.get() else get_logger("ota.blocks")
        log.warning("%s: the block '%s' is used instead of %s of the environment", VARIABLE, reference, ", ".join(replaced))
    with s3.use_credentials(credentials):
        yield


def _load(reference: str) -> "AwsCredentials":
    block_type, _, name = reference.rpartition("/")
    if block_type not in {"", BLOCK_TYPE} or not name:
        raise OtaError(f"{VARIABLE}: got '{reference}', expected the name of a block, or {BLOCK_TYPE}/<name>")
    try:
        from prefect_aws import AwsCredentials
    except ModuleNotFoundError as error:
        raise OtaError(
            f"{VARIABLE}: '{reference}' is asked for, but {error.name} is not installed; pip install prefect-aws"
        ) from None
    try:
        return AwsCredentials.load(name, _sync=True)  # type: ignore[call-arg, return-value]  # untyped: Prefect makes the sync one
    except ValueError:
        raise OtaError(
            f"{VARIABLE}: the Prefect server has no block {BLOCK_TYPE}/{name}; make it in the UI under Blocks (AWS Credentials), "
            f"or unset {VARIABLE} to use the environment"
        ) from None
    except RuntimeError:  # without its cause: pydantic quotes the values that it does not like
        raise OtaError(f"{VARIABLE}: the block '{reference}' does not fit this version of prefect-aws; save it again") from None


def _credentials(block: "AwsCredentials", reference: str) -> s3.Credentials:
    key, secret = block.aws_access_key_id, block.aws_secret_access_key
    if bool(key) != bool(secret and secret.get_secret_value()):
        raise OtaError(f"{VARIABLE}: the block '{reference}' holds one of key id and secret; give both or none")
    if block.assume_role_arn:
        raise OtaError(
            f"{VARIABLE}: the block '{reference}' assumes a role, whose credentials would expire during a long merge; give keys in the "
            "block, or let the machine assume the role (AWS_PROFILE, a service account) without a block"
        )
    parameters = block.aws_client_parameters
    unheard = sorted(parameters.model_dump(exclude_defaults=True, exclude={"endpoint_url"}))
    if unheard:
        raise OtaError(
            f"{VARIABLE}: the block '{reference}' sets {', '.join(unheard)} of the client, which cannot be handed on; clear them"
        )
    return s3.Credentials(
        access_key=key or None,
        secret_key=secret.get_secret_value() if key and secret else None,
        session_token=(key and block.aws_session_token) or None,
        profile=block.profile_name or None,
        region=block.region_name or None,
        endpoint=parameters.endpoint_url or None,
    )
