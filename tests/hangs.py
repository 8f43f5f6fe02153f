"""What ends a test that hangs, and never one that is slow because its machine is.

A test's limit (`timeout` in pyproject.toml, or its marker) is of processor time, of its process and of all below it: a
busy machine does not lengthen that, and a loop without an end reaches it. A test that waits for what never comes uses
none: it ends after QUIET_S in which its processes had less than QUIET_SHARE of one core. Both say which step it was.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest

# For a wait inside a test, by the clock: long enough that only a hang reaches it.
HANG_S = 900.0
QUIET_S, QUIET_SHARE = 900.0, 0.01
LOOK_EVERY_S = 10.0
PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds; fails after HANG_S, saying what it was waiting for."""
    until = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < until, f"still waiting for {what} after {HANG_S:.0f} s"
        time.sleep(0.002)


# For what has limits by the clock itself: the first is short, as many tests wait for it to pass.
LIMITS_S = (0.6, 6.0, 60.0)
Found = TypeVar("Found")


def in_time(attempt: Callable[[float], Found], was_late: Callable[[Found], bool]) -> Found:
    """attempt(limit_s) under the shortest limit of `LIMITS_S` at which nothing was late that should not be."""
    for limit_s in LIMITS_S:
        found = attempt(limit_s)
        if not was_late(found):
            break
    return found


def processor_time() -> float:
    """Processor seconds that this process, its children and theirs have used, those that have ended included.

    Without /proc only children that have ended are seen.
    """
    if not (PROC / "self" / "stat").exists():
        return sum(os.times()[:4])
    family, used = [os.getpid()], 0
    listed = os.path.exists(f"{PROC}/self/task/{threading.get_native_id()}/children")
    below = _listed_children if listed else _parents_read_backwards()
    for process in family:
        try:
            with open(f"{PROC}/{process}/stat", "rb") as stream:
                # The name, in brackets, may hold blanks and brackets itself.
                used += sum(map(int, stream.read().rpartition(b")")[2].split()[11:15]))
            family += below(process)
        except OSError:
            # It has ended since.
            continue
    return used * _TICK_S


def _listed_children(process: int) -> list[int]:
    """Children as the kernel lists them: every test asks, and reading all processes takes forty times as long."""
    found = []
    for thread in os.listdir(f"{PROC}/{process}/task"):
        with open(f"{PROC}/{process}/task/{thread}/children", "rb") as stream:
            found += map(int, stream.read().split())
    return found


def _parents_read_backwards() -> Callable[[int], list[int]]:
    """The children of a process by the parents of all, for kernels without that list."""
    found: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        found.setdefault(int(parent), []).append(int(folder.name))
    return lambda process: found.get(process, [])


class Watch:
    """What a test has used since it began. limit_s: of processor time."""

    def __init__(
        self,
        limit_s: float,
        used: Callable[[], float] = processor_time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_s, self._used, self._now = limit_s, used, now
        self.step = "its start"
        self._first = self._mark = used()
        self._since = now()

    def why_ended(self) -> str | None:
        """Why the test is taken for one that hangs, None while it is not."""
        used, now = self._used(), self._now()
        if used - self._first > self.limit_s:
            return f"{used - self._first:.0f} s of processor time, and {self.limit_s:.0f} s are its limit"
        if used - self._mark > QUIET_SHARE * QUIET_S:
            self._mark, self._since = used, now
        if now - self._since > QUIET_S and PROC.exists():
            return f"waits: its processes did next to nothing for {now - self._since:.0f} s"
        return None


def watch(item: pytest.Item, limit_s: float) -> Callable[[], None]:
    """Watch a test from the main thread, by SIGALRM; returns what ends that."""
    found = Watch(limit_s)
    item.stash[WATCH] = found

    def look(number: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        why = found.why_ended()
        if why is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            pytest.fail(f"hangs in {found.step}: {why}")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY_S, LOOK_EVERY_S)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return stop


WATCH = pytest.StashKey[Watch]()


@contextmanager
def step(item: pytest.Item | None, name: str) -> Iterator[None]:
    """Name what a test does within the block."""
    found = None if item is None else item.stash.get(WATCH, None)
    if found is None:
        yield
        return
    before, found.step = found.step, name
    try:
        yield
    finally:
        found.step = before


class Plugin:
    """Takes the place of pytest-timeout's clock."""

    def __init__(self) -> None:
        self._item: pytest.Item | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings) -> bool | None:
        if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
            # pytest-timeout's own thread, by the clock.
            return None
        self._item, item.cancel_timeout = item, watch(item, settings.timeout)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        with step(item, "the test itself"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item):
        with step(item, "what follows the test"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with step(self._item, f"the fixture '{fixturedef.argname}'"):
            return (yield)
