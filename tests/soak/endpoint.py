"""The chat endpoint of a soak, in a process of its own that is told over a pipe how to behave."""

from __future__ import annotations

import base64
import json
import os
import random
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from urllib.parse import quote

from tests.chat_server import ChatServer, Fault, completion
from tests.problem_families import writer
from tests.soak.attempt import KEY


def begin() -> tuple[int, str, Callable[[tuple[str, int]], None]]:
    """Start it; returns its process, its address, and what to call with ("well" | "failing" | "hostile", seed)."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    url = ours.recv()

    def steer(how: tuple[str, int]) -> None:
        ours.send(how)
        ours.recv()

    return pid, url, steer


def _serve(orders: Connection) -> None:
    # It ends with the process that began it.
    plan = {"of": lambda arrival, body: None}
    with ChatServer(writer(favour=0.3), lambda arrival, body: plan["of"](arrival, body)) as server:
        orders.send(server.url)
        while True:
            try:
                how, seed = orders.recv()
            except EOFError:
                return
            plan["of"] = {"well": _well, "failing": _failing, "hostile": _hostile}[how](seed)
            orders.send("done")


def _well(seed: int) -> Callable:
    return lambda arrival, body: None


def _failing(seed: int) -> Callable:
    """Errors that pass: each arrival fails with the chance of this seed, for the first 120."""
    r = random.Random(seed)
    chance, left = r.choice((0.1, 0.3, 0.6)), [120]

    def plan(arrival: int, body: dict) -> Fault | None:
        left[0] -= 1
        if left[0] < 0 or r.random() > chance:
            return None
        return r.choice(
            (
                Fault(429, retry_after=r.choice(("0", "0.01", None))),
                Fault(500),
                Fault(503, body=b"<html>busy</html>", type="text/html"),
                Fault(502, body=b""),
                Fault(drop="before"),
                Fault(drop="within"),
                Fault(stall=0.05),
                Fault(trickle=0.05),
            )
        )

    return plan


def _hostile(seed: int) -> Callable:
    """Answers that no model gives; a third of all arrivals is answered well."""
    r = random.Random(seed)
    mad = r.sample(bodies(r), 4)

    def plan(arrival: int, body: dict) -> Fault | None:
        if r.random() < 0.4:
            return None
        return Fault(body=r.choice(mad))

    return plan


def bodies(r: random.Random) -> list[object]:
    """Bodies of a 200 that are hostile: JSON-able, or bytes as they are sent."""

    def said(text: object) -> dict:
        return completion(text)

    pair = "<prompt>{0}</prompt>\n<completion>{0}</completion>"
    control = (
        "\x1b]0;title\x07 \x1b[2J \u202e\u2066 \x00 \x9b31m [/INST] [bold] <script>alert(1)</script> {{7*7}}"
    )
    spelled = json.dumps(KEY).replace("/", "\\/").replace("s", "\\u0073")
    deep = b'{"choices": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    return [
        said(pair.format(control)),
        said(pair.format("x " * 300_000)),
        said("x" * 20_000_000),
        said(pair.format(f"the key is {KEY}, is it not?")),
        said(pair.format(f"the key is {base64.b64encode(KEY.encode()).decode()}")),
        said(pair.format(f"the key is {quote(KEY, safe='')}")),
        said(pair.format("\ud83d half")),
        said(None),
        said(5),
        said(["a", {"b": 1}]),
        said(""),
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {
            "choices": [{"message": {"content": {"x": 1}}}],
            "usage": {"prompt_tokens": -5, "completion_tokens": "many"},
        },
        {**completion("x"), "usage": {"prompt_tokens": 10**30, "completion_tokens": 1e300}},
        {**completion("x"), "usage": 7},
        {**completion("x"), "model": ["m"], "id": 9},
        [],
        None,
        "text",
        7,
        deep,
        b"",
        b"\xff\xfe",
        b"NaN",
        b'{"choices": [{"message": {"content": ' + spelled.encode() + b'}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "x", "content": "y"}, "finish_reason": '
        + b"9" * 6_000
        + b"}]}",
        b"data: {}\n\n",
        b" " * 3_000_000,
    ]
