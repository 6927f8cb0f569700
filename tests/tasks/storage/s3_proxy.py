"""A proxy on loopback in front of the real S3 server, which passes everything on and damages the answers that a test chooses."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.servers import S3Test

HTML = b"<html><head><title>Sign in</title></head><body>Please sign in to the network.</body></html>"
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"


@dataclass
class Answer:
    """What the server answered, and what the client is to be given instead."""

    method: str
    path: str
    """Without the query."""
    query: dict[str, list[str]]
    status: int
    headers: dict[str, str]
    """In lower case."""
    body: bytes
    short: int = 0
    """So many bytes of the body are announced and not sent."""
    asked: dict[str, str] = field(default_factory=dict)
    """The request's headers, in lower case."""

    @property
    def lists(self) -> bool:
        return "list-type" in self.query

    def replace(self, status: int, body: bytes, kind: str) -> None:
        """Another answer altogether."""
        self.status, self.body, self.headers = status, body, {"content-type": kind}


@dataclass
class Proxy:
    """``change`` is given every answer; ``seen`` holds method and path of every request, in their order."""

    endpoint: str
    change: Callable[[Answer], None] = lambda answer: None
    seen: list[str] = field(default_factory=list)
    read_only: bool = False
    """Refuse what could change something, as keys do that may only read."""


@contextmanager
def s3_proxy(behind: str) -> Iterator[Proxy]:
    """A proxy in front of the server at this address."""
    target, lock = urlsplit(behind).netloc, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            if proxy.read_only and self.command not in {"GET", "HEAD"}:
                proxy.seen.append(f"{self.command} {self.path} refused")
                self.send_response(403)
                self.send_header("Content-Length", str(len(DENIED)))
                self.end_headers()
                self.wfile.write(DENIED)
                return
            server = http.client.HTTPConnection(target, timeout=60)
            # The signature is over the address that the client knows: it stays.
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders(body or None)
            got = server.getresponse()
            content = b"" if self.command == "HEAD" else got.read()
            parts = urlsplit(self.path)
            answer = Answer(
                self.command, parts.path, parse_qs(parts.query, keep_blank_values=True), got.status,
                {name.lower(): value for name, value in got.getheaders()}, content,
                asked={name.lower(): value for name, value in self.headers.items()},
            )  # fmt: skip
            server.close()
            with lock:
                proxy.seen.append(f"{self.command} {parts.path}{'?list' if answer.lists else ''}")
                proxy.change(answer)
            self.send_response(answer.status)
            length_of = answer.headers.get("content-length", "0") if self.command == "HEAD" else str(len(answer.body))
            for name, value in answer.headers.items():
                if name not in {"content-length", "transfer-encoding", "connection", "date", "server"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", length_of)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: len(answer.body) - answer.short])
            if answer.short:
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()


@pytest.fixture
def proxy(s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The tests' S3 server, which from now on is reached through a proxy."""
    with s3_proxy(s3_server.endpoint) as made:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, made.endpoint)
        yield made
