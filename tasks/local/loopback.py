"""Ports and plain HTTP on 127.0.0.1, for servers that this tool starts itself."""

import socket
import urllib.request
from collections.abc import Iterable

HOST = "127.0.0.1"


def get(url: str, *, body: bytes | None = None, timeout: float = 2.0) -> bytes | None:
    """The body of a 200 answer, None while nobody answers so; with a ``body`` (JSON) it is a POST. Proxies are left out."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"} if body is not None else {})
    try:
        with opener.open(request, timeout=timeout) as response:
            return bytes(response.read()) if response.status == 200 else None
    except OSError:
        return None


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held open together, so that no number comes twice."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((HOST, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def taken(ports: Iterable[int]) -> list[int]:
    """Those of the ports that a server cannot be started on. The TIME_WAIT of a server just stopped does not count."""
    return [port for port in ports if not _can_bind(port) or _answers(port)]


def _can_bind(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def _answers(port: int) -> bool:
    """On some systems a port of loopback can be bound although a server listens on all addresses."""
    with socket.socket() as sock:
        sock.settimeout(0.5)
        return sock.connect_ex((HOST, port)) == 0
