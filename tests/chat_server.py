"""A chat endpoint on loopback that answers from a function and misbehaves by plan.

What is counted: `served` counts a request, by its content (the JSON of its body), if its 200 reply was handed to the
socket whole and the client was there when that began. A reply that was cut, or whose client had gone before, is in
`abandoned`; one with another status in `rejected`. So without broken connections `served` equals the final rows of a
request store. A client that dies between the last byte and its own commit is the one case left in which `served` is
larger: it asks again, and the answer is paid twice.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TRUNCATED = b'{"choices": [{"message": {"role": "assistant", "content": "hal'


@dataclass(frozen=True)
class Fault:
    """What happens in place of a plain answer.

    status, retry_after: an error reply. body: this JSON (or these bytes) in place of a completion, as a 200 unless
    `status` is set. stall: seconds before anything is sent. trickle: seconds over which the reply is sent, in pieces.
    drop: "before" the first byte or "within" the reply. usage: False leaves the token counts out. type: of the content.
    headers: further lines of the head. raw: writes whatever it likes to the connection, which is closed then.
    """

    status: int = 200
    retry_after: str | None = None
    body: object = None
    stall: float = 0.0
    trickle: float = 0.0
    drop: str = ""
    usage: bool = True
    type: str = "application/json"
    headers: tuple[str, ...] = ()
    raw: Callable[[socket.socket], None] | None = None


class ChatServer:
    """answer(messages, draw) -> text; draw: the request's `seed`, else how often its content has come before.

    plan(arrival, body) -> Fault or None; arrival counts requests from 0. Use as a context manager.
    """

    def __init__(
        self,
        answer: Callable[[list, int], str],
        plan: Callable[[int, dict], Fault | None] = lambda arrival, body: None,
        port: int = 0,
    ):
        self.answer, self.plan = answer, plan
        self.served, self.rejected, self.abandoned = Counter(), Counter(), Counter()
        self.arrived = Counter()
        self.times, self.keys, self.heads, self.bodies = [], [], [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.gate, self.gate_after = threading.Event(), None
        self.closing = threading.Event()
        self.http = _Server(("127.0.0.1", port), _Handler)
        self.http.chat = self
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.let_go()
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def hold_after(self, served: int) -> None:
        """Let this many requests of now on be answered; the others wait until `let_go`."""
        self.gate.clear()
        self.gate_after = self.served.total() + served

    def let_go(self) -> None:
        self.gate_after = None
        self.gate.set()

    def claim(self, counter: Counter, what: str, gone: Callable[[], bool]) -> bool:
        """Count a reply before its first byte leaves, so that no client has one that is not counted.

        Waits at the gate; False if the client has gone by then.
        """
        while True:
            with self.lock:
                if gone():
                    self.abandoned[what] += 1
                    return False
                if self.gate_after is None or self.served.total() < self.gate_after:
                    counter[what] += 1
                    return True
            self.gate.wait()


def content(body: dict) -> str:
    return json.dumps(body, sort_keys=True)


def completion(text: object, ended: str = "stop", usage: bool = True, model: str = "m") -> dict:
    counts = {"prompt_tokens": 7, "completion_tokens": len(str(text).split()), "total_tokens": 0}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": ended}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
    }
    return {**body, "usage": counts} if usage else body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Clients come and go; what counts is counted in the handler."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Keep the tests' output free of a line per request."""

    def do_POST(self):
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(Fault(404), b'{"error": {"message": "no such path"}}')
            return
        what = content(body)
        with chat.lock:
            arrival, before = chat.arrived.total(), chat.arrived[what]
            chat.arrived[what] += 1
            chat.times.append(time.monotonic())
            chat.keys.append(self.headers.get("Authorization"))
            chat.heads.append(dict(self.headers.items()))
            chat.bodies.append(body)
            chat.under_way += 1
            chat.most_under_way = max(chat.most_under_way, chat.under_way)
        try:
            self._reply(chat, body, arrival, body.get("seed", before), what)
        finally:
            with chat.lock:
                chat.under_way -= 1

    def _reply(self, chat, body, arrival, draw, what):
        fault = chat.plan(arrival, body) or Fault()
        chat.closing.wait(fault.stall)
        if fault.raw is not None:
            with chat.lock:
                chat.abandoned[what] += 1
            self.close_connection = True
            # The client goes when it has heard enough.
            with contextlib.suppress(ConnectionError, TimeoutError):
                fault.raw(self.connection)
            return
        found = fault.body
        if found is None and fault.status == 200:
            found = completion(chat.answer(body["messages"], draw), usage=fault.usage, model=body["model"])
        raw = found if isinstance(found, bytes) else json.dumps(found).encode()
        if fault.drop:
            with chat.lock:
                chat.abandoned[what] += 1
            self._cut(b"" if fault.drop == "before" else self._head(fault, raw) + raw[: len(raw) // 2])
            return
        counter = chat.served if fault.status == 200 else chat.rejected
        if not chat.claim(counter, what, self._gone):
            return
        try:
            self._send(fault, raw)
        except ConnectionError:
            self.close_connection = True
            with chat.lock:
                counter[what] -= 1
                chat.abandoned[what] += 1

    def _gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _cut(self, sent: bytes) -> None:
        self.close_connection = True
        self.connection.sendall(sent)
        self.connection.shutdown(socket.SHUT_RDWR)

    def _head(self, fault: Fault, raw: bytes) -> bytes:
        lines = [f"HTTP/1.1 {fault.status} x", f"Content-Type: {fault.type}", f"Content-Length: {len(raw)}"]
        if fault.retry_after is not None:
            lines.append(f"Retry-After: {fault.retry_after}")
        lines.extend(fault.headers)
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _send(self, fault: Fault, raw: bytes) -> None:
        whole, trickle = self._head(fault, raw) + raw, fault.trickle
        if not trickle:
            self.connection.sendall(whole)
            return
        pieces = 20
        step = -(-len(whole) // pieces)
        for start in range(0, len(whole), step):
            self.connection.sendall(whole[start : start + step])
            time.sleep(trickle / pieces)
