"""An S3-compatible server of a test's own (moto's), behind a proxy that breaks what a seeded plan says."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# What may happen to a request, and what else about it is as it was asked:
#   500, 503   the store says so, and has done nothing
#   cut        half of an upload arrives, and the connection breaks
#   lost       the store does what it was asked, and its answer never arrives
#   short      an answer breaks off half-way
#   lies       half of an answer arrives as if it were all of it
#   slow       an answer comes in small pieces with pauses
UPLOADS, ANSWERS = ("500", "503", "cut", "lost"), ("500", "503", "lost", "short", "lies", "slow")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}
_PIECE, _PAUSE_S = 1 << 14, 0.002
_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>a fault of the test</Message></Error>"
_CODES = {"500": b"InternalError", "503": b"ServiceUnavailable"}


class Faults:
    """Which request is broken, and how: each of `kinds` with this share, drawn from the seed by the request's number.

    every: in place of shares, {kind: every n-th request that it applies to}.
    only: what the path of a request must hold to be broken.
    happened: how often each was.
    """

    def __init__(
        self,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        every: Mapping[str, int] | None = None,
        only: str = "",
    ) -> None:
        self._draw, self._shares, self._every = random.Random(seed), dict(shares or {}), dict(every or {})
        self._only, self._seen, self._door = only, Counter[str](), threading.Lock()
        self.happened: Counter[str] = Counter()

    def next(self, method: str, path: str) -> str | None:
        """What happens to this request; None: nothing."""
        kinds = (
            UPLOADS if method in ("PUT", "POST") else ANSWERS if method == "GET" else ("500", "503", "lost")
        )
        if self._only not in path:
            return None
        with self._door:
            for kind in kinds:
                self._seen[kind] += 1
                if (kind in self._every and self._seen[kind] % self._every[kind] == 0) or (
                    kind in self._shares and self._draw.random() < self._shares[kind]
                ):
                    self.happened[kind] += 1
                    return kind
        return None


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.store.faults.next(self.command, self.path)
        self.store.asked.append((self.command, self.path))
        self.store.watch(self.command, self.path)
        if fault in _CODES:
            self._answer(int(fault), {"Content-Type": "application/xml"}, _ERROR % _CODES[fault])
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.store.behind)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if fault == "cut":
            self._cut(headers, body)
            return
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "lost":
            self._break()
            return
        # Of HEAD it is the length of what GET would give.
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, dict(answer.getheaders()), content, fault, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    def _answer(
        self,
        status: int,
        headers: Mapping[str, str],
        content: bytes,
        fault: str | None = None,
        length: str | None = None,
    ) -> None:
        if fault == "lies":
            content = content[: len(content) // 2]
        self.send_response(status)
        for name, value in headers.items():
            # A store that lies has no checksum of the whole either.
            if name.lower() not in _HOP and not (fault == "lies" and "checksum" in name.lower()):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)) if length is None else length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "short":
            self.wfile.write(content[: len(content) // 2])
            self._break()
        elif fault == "slow":
            for start in range(0, len(content), _PIECE):
                self.wfile.write(content[start : start + _PIECE])
                self.wfile.flush()
                self.store.stopped.wait(_PAUSE_S)
        else:
            self.wfile.write(content)

    def _cut(self, headers: Mapping[str, str], body: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.store.behind)) as upstream:
            lines = [
                f"{self.command} {self.path} HTTP/1.1",
                *(f"{k}: {v}" for k, v in headers.items()),
                "",
                "",
            ]
            upstream.sendall("\r\n".join(lines).encode() + body[: len(body) // 2])
        self._break()

    def _break(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Connections that a client closes are no news."""


class ObjectStore:
    """The store: `faults` breaks requests from now on, `asked` lists them, `environment` leads clients to it.

    watch: called with (method, path) of every request that has arrived, before anything is done.
    behind: the port of the server behind the proxy, where nothing is broken.
    """

    def __init__(self, behind: int) -> None:
        self.behind, self.faults = behind, Faults()
        self.asked: list[tuple[str, str]] = []
        self.watch: Callable[[str, str], None] = lambda method, path: None
        self.stopped = threading.Event()
        handler = type("Handler", (_Proxy,), {"store": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            # What is tested is what this package tries again.
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        connection = http.client.HTTPConnection("127.0.0.1", self.behind)
        signed = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
        connection.request("PUT", f"/{name}", headers={"Authorization": signed})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
        return f"s3://{name}"

    def close(self) -> None:
        """End the proxy."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store for the block; what S3's clients read from the environment is set, and what they keep is forgotten."""
    reason = "an S3-compatible server and its client are needed (pip install 'moto[server]' s3fs)"
    server = pytest.importorskip("moto.server", reason=reason)
    s3fs = pytest.importorskip("s3fs", reason=reason)
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    store = ObjectStore(moto.get_host_and_port()[1])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield store
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            store.close()
            moto.stop()
