"""The process that checks: one request at a time, in an address space of limited size, killed by whoever waits.

Whatever a check raises ends the process, after its name has been reported: no later check meets what an error left
behind. Nothing here imports more than the check itself needs, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from gvendi_fast.synthesis.checks.channel import Channel

# A reply stays below the size that a pipe takes in one piece, even if every character needs an escape.
_REASON_CHARS = 300
# Nobody may be left to kill a check that hangs: the kernel ends it this many seconds after its limit.
_GRACE_S = 5.0
# Linux's prctl: what loses its parents becomes a child of this process, so that it is found when this one is ended.
_ADOPT = 36


def main() -> None:
    """Serve checks until the other end of the pipe is closed.

    argv: file descriptors to read requests from and to write replies to, as `Child` gives them. The first request
    holds the settings: target ("math" or "module:function"), limit_s (seconds) and memory_mb (address space).
    """
    channel = Channel.of_child(int(sys.argv[-2]), int(sys.argv[-1]))
    _report_uncaught(channel)
    settings = json.loads(channel.receive(any_number=True))
    target = settings["target"]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)
    # Before the check is loaded: where it does not fit, the start says so, not every single verdict.
    _limit_memory(settings["memory_mb"])
    function = _math() if target == "math" else _user_function(target)
    _reply(channel, "ready")
    this = os.getpid()
    while True:
        try:
            request = channel.receive(any_number=True)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, settings["limit_s"] + _GRACE_S)
        outcome, reason = function(json.loads(request))
        # A check that forks and returns in both processes has one verdict.
        if os.getpid() != this:
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(channel, outcome, reason)


def _reply(channel: Channel, outcome: str, reason: str = "") -> None:
    channel.send(json.dumps([outcome, reason[:_REASON_CHARS]]).encode())


def _report_uncaught(channel: Channel) -> None:
    this = os.getpid()

    def report(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if os.getpid() != this:
            os._exit(1)
        # What the failed check holds is still there, and the report needs memory of its own.
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        _reply(channel, "ended", f"{kind.__name__}: {error}" if str(error) else kind.__name__)

    sys.excepthook = report


def _limit_memory(memory_mb: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A file that a check writes may be as long as its memory.
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
        _, most = resource.getrlimit(kind)
        limit = memory_mb << 20
        # A process may run under a tighter limit already.
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, most))


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
