"""The credentials of the stack's S3 server: the user's, or random ones that never leave this machine."""

import os
import secrets
from pathlib import Path

from tasks.local.stack.layout import Stack, StackError, folder_of


def credentials(home: Path) -> tuple[str, str]:
    """Access key and secret key for a new S3 server: those of the environment, else random ones made at the first start.

    The random ones lie in a file that only its owner can read; those of the environment are written nowhere.
    Raises StackError when the environment holds half of a pair.
    """
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if bool(key) != bool(secret):
        raise StackError("only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set; set both, or neither for random ones")
    if key and secret:
        return key, secret
    if generated(home) is None:
        write_private(_credentials_file(home), f"ota-{secrets.token_hex(6)}\n{secrets.token_urlsafe(32)}\n")
    found = generated(home)
    assert found is not None
    return found


def secret_of(stack: Stack) -> str:
    """The secret key of a stack that runs already. Raises StackError when neither its file nor the environment holds it."""
    around = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    for key, secret in (generated(stack.home) or around, around):
        if key == stack.access_key and secret:
            return secret
    raise StackError(
        f"the stack was started with the AWS credentials of its shell (access key {stack.access_key}); "
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the same, or stop it first with `ota stack down`"
    )


def generated(home: Path) -> tuple[str, str] | None:
    """The pair that the stack made for itself, None where it made none."""
    file = _credentials_file(home)
    if not file.is_file():
        return None
    key, secret = file.read_text(encoding="utf-8").split()
    return key, secret


def _credentials_file(home: Path) -> Path:
    return folder_of(home) / "credentials"


def write_private(file: Path, text: str) -> None:
    """Replace a file in one step by one that only its owner can read."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(temporary, file)
