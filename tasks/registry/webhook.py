"""MLflow's webhooks on the aliases: whoever serves the champion is told when it changes, instead of asking.

MLflow tells every webhook of every alias of every registered model. So the receiver looks at ``name`` and ``alias`` of what it is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.store import clear_errors, connect, pages, resolve_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.webhook import Webhook

SECRET = "OTA_WEBHOOK_SECRET"
"""Environment variable with the secret that deliveries are signed with."""
EVENT: Final = "model_version_alias.created"
_SAFE = "The aliases are as they were."


class WebhookError(OtaError):
    """A webhook that cannot be had, or is not there."""


class Hook(Frozen):
    """A webhook of the MLflow server."""

    id: str
    name: str
    url: str
    events: tuple[str, ...]
    status: str


def add(
    url: str, *, name: str = REGISTERED_MODEL, tracking_uri: str | None = None, environment: Mapping[str, str] = os.environ
) -> Hook:
    """Have MLflow POST to ``url`` when an alias is given to a version; a webhook of this registered model and address is brought up to date.

    Deliveries are signed with the secret in ``OTA_WEBHOOK_SECRET`` (HMAC-SHA256, header ``X-MLflow-Signature``). Raises WebhookError without
    a secret, without a server, and for what is no address; StorageError for what the server refuses.
    """
    secret = environment.get(SECRET, "")
    problems = (
        [] if secret else [f"set {SECRET} to a secret that the receiver knows, too: it checks the deliveries' signature by it"]
    )
    if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
        problems.append(f"{url!r} is no address to POST to; expected https://…")
    if problems:
        raise WebhookError("; ".join(problems))
    with _server(f"adding the webhook to {url}", tracking_uri) as client:
        told = f"Tells that an alias of {name} (and of any other registered model) was given to a version."
        there = next((one for one in _all(client) if one.url == url and one.name == _title(name)), None)
        if there is None:
            made = client.create_webhook(_title(name), url, [EVENT], description=told, secret=secret)
        else:
            made = client.update_webhook(there.webhook_id, events=[EVENT], description=told, secret=secret, status="ACTIVE")
        return _hook(made)


def listed(*, tracking_uri: str | None = None) -> list[Hook]:
    """Every webhook of the server, also those that others made. Raises WebhookError, StorageError."""
    with _server("listing the webhooks", tracking_uri) as client:
        return [_hook(one) for one in _all(client)]


def remove(which: str, *, tracking_uri: str | None = None) -> Hook:
    """Remove a webhook by its id or address. Raises WebhookError where there is none, or several have the address; StorageError."""
    with _server(f"removing the webhook {which}", tracking_uri) as client:
        hooks = [_hook(one) for one in _all(client)]
        found = [one for one in hooks if which in {one.id, one.url}]
        if len(found) != 1:
            known = ", ".join(f"{one.id} ({one.url})" for one in found or hooks) or "none"
            raise WebhookError(f"{len(found)} webhooks are called {which!r}; name one by its id: {known}")
        client.delete_webhook(found[0].id)
        return found[0]


def send_example(which: str, *, tracking_uri: str | None = None) -> str:
    """Have the server send an example to a webhook, and say what the receiver answered. Raises WebhookError where it is not there or failed."""
    with _server(f"trying the webhook {which}", tracking_uri) as client:
        found = next((one for one in _all(client) if which in {one.webhook_id, one.url}), None)
        if found is None:
            raise WebhookError(f"no webhook is called {which!r}; see them with: ota webhook list")
        result = client.test_webhook(found.webhook_id, EVENT)
    if not result.success:
        why = result.error_message or f"it answered {result.response_status}"
        raise WebhookError(f"{found.url} did not take the example: {why}")
    return f"{found.url} answered {result.response_status}"


@contextmanager
def _server(doing: str, tracking_uri: str | None) -> Iterator[MlflowClient]:
    """A client of the server. The embedded database has nobody who would deliver."""
    store = resolve_store(tracking_uri=tracking_uri, root=Path())
    if not store.is_server:
        raise WebhookError("webhooks are delivered by an MLflow server; name one with MLFLOW_TRACKING_URI or --tracking-uri")
    with clear_errors(store, doing, _SAFE):
        yield connect(store)


def _all(client: MlflowClient) -> Iterator[Webhook]:
    return pages(client.list_webhooks)


def _title(name: str) -> str:
    """A name that MLflow takes: at most 62 letters, digits, dots, underscores, hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"ota-aliases-{name}")[:62].rstrip("._-")


def _hook(one: Webhook) -> Hook:
    return Hook(
        id=one.webhook_id, name=one.name, url=one.url, events=tuple(map(str, one.events)), status=str(one.status)
    )  # fmt: skip
