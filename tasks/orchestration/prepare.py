"""What must be set before Prefect is imported, and before anything asks for a server on this machine."""

import os
import signal
import sys
import threading
from types import FrameType

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


def prepare_prefect() -> None:
    """Settings of the temporary server that Prefect starts where PREFECT_API_URL is not set.

    It may take long to start on a busy machine, and it has nobody to report to.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
