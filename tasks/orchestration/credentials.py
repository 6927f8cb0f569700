"""Credentials from a Prefect block, so that no machine has to hold them: ``OTA_AWS_BLOCK`` names it.

The block (type AWS Credentials, of prefect-aws) is read from the Prefect server when a flow starts, and what it holds is put into
this process's environment, where boto3 and the processes started from here find it. Nothing is written to disk or logged.

The block wins over the environment, because somebody named it; what it replaces is logged by name. Key id, secret and session token
are replaced together: a token that belongs to other keys would make them invalid. What the block leaves empty stays as it was.
"""

import os
from typing import TYPE_CHECKING

from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger

from ota_core.errors import OtaError

if TYPE_CHECKING:
    from prefect_aws import AwsCredentials

VARIABLE = "OTA_AWS_BLOCK"
BLOCK_TYPE = "aws-credentials"


def use_blocks() -> None:
    """Put the credentials of the block named by ``OTA_AWS_BLOCK`` into the environment; do nothing where none is named.

    Call it at the start of every flow, before the first access to S3. Raises OtaError when the name is of another type of block,
    prefect-aws is missing, or the block is missing, unreadable, incomplete, or says what an environment cannot.
    """
    reference = os.environ.get(VARIABLE, "").strip()
    if not reference:
        return
    wanted = _variables(_load(reference), reference)
    replaced = [name for name, value in wanted.items() if (os.environ.get(name) or value) != value]
    if replaced:
        log = get_run_logger() if FlowRunContext.get() else get_logger("ota.blocks")
        log.warning("%s: the block '%s' replaces %s of the environment", VARIABLE, reference, ", ".join(replaced))
    for name, value in wanted.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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


def _variables(block: "AwsCredentials", reference: str) -> dict[str, str | None]:
    """Environment variables to their values; None where a variable has to go."""
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
            f"{VARIABLE}: the block '{reference}' sets {', '.join(unheard)} of the client, which the environment cannot say; clear them"
        )
    keys: dict[str, str | None] = {
        "AWS_ACCESS_KEY_ID": key or None,
        "AWS_SECRET_ACCESS_KEY": secret.get_secret_value() if key and secret else None,
        "AWS_SESSION_TOKEN": (key and block.aws_session_token) or None,
    }
    given = {
        "AWS_PROFILE": block.profile_name,
        "AWS_DEFAULT_REGION": block.region_name,
        "AWS_ENDPOINT_URL_S3": parameters.endpoint_url,
    }
    # A profile without keys: boto3 would prefer keys of the environment to it.
    return (keys if key or block.profile_name else {}) | {name: value for name, value in given.items() if value}
