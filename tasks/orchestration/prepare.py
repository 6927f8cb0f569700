"""What must be set before Prefect is imported and before a server on this machine is asked, and whether Prefect's server is there."""

import os
import signal
import sys
import threading
import time
from types import FrameType

from ota_core.errors import OtaError

ANSWER_SECONDS = 10.0
TRIES = 3
WITHOUT = "start it, correct PREFECT_API_URL, or go without: unset PREFECT_API_URL, or ota run --no-server; a merge alone needs no server: ota merge"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def exempt_loopback() -> None:
    """Have servers on this machine asked directly where a proxy is set: Prefect's temporary one, MLflow, S3 and models that are benchmarked.

    For this process and its children; what NO_PROXY exempts already stays exempt. Without a proxy nothing changes.
    """
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return
    given = ",".join(filter(None, (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"))))
    hosts = dict.fromkeys(part.strip() for part in given.split(",") if part.strip())
    if "*" in hosts:
        return
    # Some programs look at the one spelling, some at the other.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])


def end_in_order() -> None:
    """Have SIGTERM and SIGHUP end this process as the end of a program does: temporary folders go, and children such as Prefect's temporary
    server are stopped. Where something else handles them already, or outside the main thread, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def prepare_prefect(*, server: bool = True, check: bool = True) -> None:
    """Settings of Prefect's client, and of the temporary server that it starts where PREFECT_API_URL is not set.

    That one may take long to start on a busy machine, and it has nobody to report to. A server that restarts is waited for: about four minutes.
    Without ``server`` the temporary one is used whatever is configured. ``check``: raises OtaError, within half a minute, where nobody answers at the configured
    address.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "7")  # the waits double: 2 + 4 + … + 128 seconds
    if not server:
        os.environ["PREFECT_API_URL"] = ""  # wins over the profile, too
        os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
    elif check:
        check_server()


def check_server() -> None:
    """Raise OtaError where a Prefect server is configured and does not answer as one. Any answer but that of nobody counts: rights are Prefect's to tell."""
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        return
    import httpx

    shown, said = httpx.URL(address).copy_with(userinfo=b""), ""
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            # Nothing is sent, so that nobody's certificate matters here.
            status = httpx.get(f"{address.rstrip('/')}/health", timeout=ANSWER_SECONDS, verify=False).status_code
            if status < 500 and status != 404:
                return
            said = f"it answers {status}; expected a Prefect server, whose address ends with /api"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = str(error) or type(error).__name__
        if not last:
            time.sleep(1.0)
    raise OtaError(f"the Prefect server at {shown} cannot be reached ({said}). {WITHOUT}")


def lost_server(error: BaseException) -> str | None:
    """What to say of an error that comes of a Prefect server that went away in the middle; None for any other error."""
    if "prefect" not in sys.modules:
        return None
    import httpx
    from prefect.settings import PREFECT_API_URL

    address, seen = PREFECT_API_URL.value(), error
    while seen is not None:
        if isinstance(seen, httpx.RequestError) and address and _request_url(seen).startswith(address.rstrip("/")):
            shown = httpx.URL(address).copy_with(userinfo=b"")
            return (
                f"the Prefect server at {shown} went away ({seen or type(seen).__name__}). Nothing that was computed is lost: the same command finds it "
                f"done. {WITHOUT}"
            )
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    return None


def _request_url(error: "object") -> str:
    try:
        return str(error.request.url)  # type: ignore[attr-defined]
    except RuntimeError:  # httpx: no request is known
        return ""
