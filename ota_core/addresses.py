"""Addresses that hold a secret: a user name and a password before the host, or a signature or token behind it. They are refused where a person
gives one, because parameters are kept, and never repeated in a message."""

import re
from collections.abc import Iterator
from typing import Any

# The part between :// and the first of / ? #. An @ in a path, such as that of a database's file, is none of it.
_LOGIN = re.compile(r"(?<=://)[^/?#\s\"']*@")
_KEYS = (
    r"x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid|signature|sig|policy|key-pair-id|(?:access_?|auth_?|id_?)?token|"
    r"(?:api_?)?key|(?:client_?)?secret|pass(?:word|wd)?|pwd"
)
_SIGNED = re.compile(rf"([?&;](?:{_KEYS})=)(?!…)[^&;#\s\"'<>]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with the addresses in it without their user names, passwords, signatures and tokens."""
    return _SIGNED.sub(r"\1…", _LOGIN.sub("", text))


def holds_secret(address: str) -> bool:
    """Whether an address names a user, a password, a signature or a token."""
    return "://" in address and without_secrets(address) != address


def places_of_secrets(value: Any, place: str = "") -> Iterator[str]:
    """Where a nested value, such as a recipe's, holds an address with a secret, as the keys that lead there."""
    if isinstance(value, str) and holds_secret(value):
        yield place
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from places_of_secrets(one, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from places_of_secrets(one, f"{place}[{i}]")
