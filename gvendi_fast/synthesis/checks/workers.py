"""Checks run in processes that can be killed: a check that hangs or crashes is an answer like any other.

A worker handles one request at a time through a pair of pipes. It is killed when its time is up, with what it has
started, and a worker that has ended is replaced at the next request. Time is wall-clock; the state of the machine can
turn a verdict into an error, never into another verdict. Nor can what a check writes to the pipe (channel.py).

This guards against accidents and against texts, not against the check itself: it runs as the user, may read and write
what the user may, and end the run with a signal.

pebble's ProcessPool was tried: what a hung check has started lives on when its worker is killed, the time limit begins
only when a worker takes the request, so that one which has stopped is waited for without end, and what a check prints
goes to the caller's stdout.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.channel import GarbledError
from gvendi_fast.synthesis.checks.child import Child

# Importing a user's module may take long and is no part of a check.
_START_S = 120.0
_MODULE = "gvendi_fast.synthesis.checks.check_worker"
# What a worker may answer; "ended" is what the check has raised, which ends the process.
_OUTCOMES = {"ready", "same", "different", "accepted", "rejected", "error", "ended"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found: "same"/"different" of two answers, "accepted"/"rejected" of a row, or "error".

    An error says nothing about the answers: the check hung, crashed or could not be made; `reason` says which.
    """

    outcome: str
    reason: str = ""


class Workers:
    """`workers` processes that run one check function; for use by any number of threads at once.

    target: "math", or "module:function" of the user's. limit_s: wall-clock seconds for one check. memory_mb: address
    space of a worker. Processes start at the first request (`start` asks for one now) and end with `close`.
    """

    def __init__(
        self,
        target: str,
        workers: int = 1,
        limit_s: float = 5.0,
        memory_mb: int = 2048,
        folder: str | os.PathLike | None = None,
    ) -> None:
        if workers < 1:
            raise GvendiError(f"workers is {workers}; wanted at least 1")
        if not 0 < limit_s < float("inf"):
            raise GvendiError(f"limit_s is {limit_s}; wanted a number of seconds above 0")
        if memory_mb < 1:
            raise GvendiError(f"memory_mb is {memory_mb}; wanted at least 1")
        self.target, self.limit_s = target, limit_s
        settings = {"target": target, "limit_s": limit_s, "memory_mb": memory_mb}
        path = sys.path if folder is None else [os.path.abspath(folder), *sys.path]
        self._all = [_Worker(settings, path) for _ in range(workers)]
        # Last in, first out: while one worker is enough, no other is started.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="check")
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start a worker now; raises GvendiError with the reason where the check cannot be loaded."""
        self._with_worker(_Worker.start)

    def ask(self, request: Any) -> Verdict:
        """The verdict on one JSON-able request; returns within the limit plus the time a new worker needs."""
        body = json.dumps(request).encode()
        return self._with_worker(lambda worker: worker.ask(body))

    def ask_all(self, requests: Iterable[Any]) -> list[Verdict]:
        """The verdicts in the order of the requests, as many at a time as there are workers."""
        return list(self._threads.map(self.ask, requests))

    def close(self) -> None:
        """End every worker. Checks in other threads must have returned."""
        self._closed = True
        self._threads.shutdown()
        for worker in self._all:
            worker.stop()

    def _with_worker(self, use: Any) -> Any:
        if self._closed:
            raise GvendiError("the check's workers are closed; make new ones")
        worker = self._idle.get()
        try:
            return use(worker)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started when it is needed."""

    def __init__(self, settings: dict[str, Any], path: Sequence[str]) -> None:
        self._settings, self._path = settings, list(path)
        self._child: Child | None = None

    def start(self) -> None:
        if self._child is not None and self._child.alive:
            return
        self.stop()
        # A fixed hash seed: SymPy orders some of its work by hashes. The LaTeX parser writes a line for every text it
        # does not understand.
        quiet = self._settings["target"] == "math"
        self._child = Child(_MODULE, {"PYTHONHASHSEED": "0"}, self._path, quiet)
        verdict = self._exchange(json.dumps(self._settings).encode(), _START_S)
        if verdict.outcome != "ready":
            self.stop()
            raise GvendiError(f"the check '{self._settings['target']}' cannot start: {self._fault(verdict)}")

    def _fault(self, verdict: Verdict) -> str:
        is_math = self._settings["target"] == "math"
        wanted = (
            "math-verify (pip install 'gvendi-fast[synthesis]')"
            if is_math
            else "an importable 'module:function'"
        )
        return f"{verdict.reason}; wanted {wanted} that loads within {self._settings['memory_mb']} MB (memory_mb)"

    def ask(self, body: bytes) -> Verdict:
        self.start()
        return self._exchange(body, self._settings["limit_s"])

    def _exchange(self, body: bytes, limit_s: float) -> Verdict:
        # A long request waits, too, for a process that reads.
        until = time.monotonic() + limit_s
        going_on = False
        try:
            reply = self._child.receive(until) if self._child.send(body, until) else None
            if reply is None:
                self._child.kill()
                return Verdict("error", f"no verdict within {limit_s:g} s")
            verdict = _verdict(reply)
            going_on = verdict.outcome != "ended"
            return verdict if going_on else Verdict("error", verdict.reason)
        except GarbledError:
            self._child.kill()
            return Verdict("error", "the check wrote into the pipe of the verdicts")
        except (EOFError, ConnectionError):
            return Verdict("error", f"the checking process ended: {self._child.ending()}")
        finally:
            # An interrupted exchange leaves a reply behind, which must never be read as the next one.
            if not going_on:
                self.stop()

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child = None


def _verdict(reply: bytes) -> Verdict:
    try:
        outcome, reason = json.loads(reply)
    except (ValueError, TypeError) as error:
        raise GarbledError("what came is no verdict") from error
    if outcome not in _OUTCOMES or not isinstance(reason, str):
        raise GarbledError("what came is no verdict")
    return Verdict(outcome, reason)
