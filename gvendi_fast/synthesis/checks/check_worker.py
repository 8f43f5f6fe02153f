"""The process that checks: one request at a time, in an address space of limited size, killed by whoever waits.

Whatever a check raises ends the process, after its name has been reported: no later check meets what an error left
behind. Nothing here imports more than the check itself needs, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# A reply stays below the size that a pipe takes in one piece, even if every character needs an escape.
_REASON_CHARS = 300
# Nobody may be left to kill a check that hangs: the kernel ends it this many seconds after its limit.
_GRACE_S = 5.0


def main() -> None:
    """Serve checks until the other end of the pipe is closed.

    argv: file descriptors to read requests from and to write replies to. The first request holds the settings:
    target ("math" or "module:function"), limit_s (seconds) and memory_mb (address space).
    """
    requests = Connection(int(sys.argv[-2]), writable=False)
    replies = Connection(int(sys.argv[-1]), readable=False)
    _report_uncaught(replies)
    settings = json.loads(requests.recv_bytes())
    target = settings["target"]
    # Before the check is loaded: where it does not fit, the start says so, not every single verdict.
    _limit_memory(settings["memory_mb"])
    function = _math() if target == "math" else _user_function(target)
    _reply(replies, "ready")
    while True:
        try:
            request = requests.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, settings["limit_s"] + _GRACE_S)
        outcome, reason = function(json.loads(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, outcome, reason)


def _reply(replies: Connection, outcome: str, reason: str = "") -> None:
    replies.send_bytes(json.dumps([outcome, reason[:_REASON_CHARS]]).encode())


def _report_uncaught(replies: Connection) -> None:
    def report(kind: type[BaseException], error: BaseException, trace: object) -> None:
        # What the failed check holds is still there, and the report needs memory of its own.
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        _reply(replies, "ended", f"{kind.__name__}: {error}" if str(error) else kind.__name__)

    sys.excepthook = report


def _limit_memory(memory_mb: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_mb << 20
    # A process may run under a tighter limit already.
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _math() -> Callable[[Any], tuple[str, str]]:
    """math-verify on two final answers; neither is the gold one, so "same" in either order is "same"."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # LaTeX only: the plain-expression parser would evaluate the text as Python.
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def expression(answer: str) -> list[Any]:
        # Its own time limit is an alarm that a long C call never sees, so it is off here and in verify.
        return parse(f"\\boxed{{{answer}}}", latex, parsing_timeout=None, raise_on_error=True)

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        return verify(gold, answer, timeout_seconds=None, raise_on_error=True)

    def compare(request: list[str]) -> tuple[str, str]:
        one, other = map(expression, request)
        if not one or not other:
            return "error", "no mathematical expression"
        return ("same" if equal(one, other) or equal(other, one) else "different"), ""

    # The first use builds the parser's tables; that time belongs to the start.
    compare(["1", "\\frac{1}{2}"])
    return compare


def _user_function(target: str) -> Callable[[Any], tuple[str, str]]:
    module, _, name = target.partition(":")
    function: Any = importlib.import_module(module)
    for step in name.split("."):
        function = getattr(function, step)

    def check(row: dict[str, Any]) -> tuple[str, str]:
        verdict = function(row)
        if verdict is True:
            return "accepted", ""
        if verdict is False:
            return "rejected", f"refused by {target}"
        if isinstance(verdict, str):
            return "rejected", verdict or f"refused by {target}"
        return "error", f"{target} returned a {type(verdict).__name__}; wanted True, False or a reason (str)"

    return check
