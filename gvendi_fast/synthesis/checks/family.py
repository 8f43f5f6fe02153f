"""Ending a process with all that it has started, also what has left its group and its session.

On Linux the family is found in /proc: by the parents, the group, the session, and a mark in the environment that a
process begins with, which stays with whatever it starts. What has been started with an emptied environment, has left
the session and lost its parents is not found. Without /proc it is the process group.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# Seconds until what cannot be killed, such as a process in an uninterruptible read, is left behind.
_PATIENCE = 5.0


def end_family(leader: int, mark: str, gone: bool) -> None:
    """Kill the process `leader` and its family; returns when none of it runs. mark: "NAME=value" of its environment.

    gone: the leader has ended and been waited for, so that its number may be another process's by now.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGSTOP)
    wanted, until = mark.encode(), time.monotonic() + _PATIENCE
    stopped: set[int] = set()
    # Stopped first: what is killed one by one could go on starting others.
    while fresh := _family(leader, wanted, gone) - stopped:
        _signal(fresh, signal.SIGSTOP)
        stopped |= fresh
    while family := _family(leader, wanted, gone):
        _signal(family, signal.SIGKILL)
        if time.monotonic() > until:
            break
        time.sleep(0.001)
    # By some systems' rules the dead may not be killed.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _signal(processes: set[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _family(leader: int, mark: bytes, gone: bool) -> set[int]:
    """Its members that run, the leader among them; empty where there is no /proc."""
    parents: dict[int, int] = {}
    found = set()
    for process, (state, parent, group, session) in _processes().items():
        if state in "ZX":
            continue
        parents[process] = parent
        if (not gone and leader in (process, group, session)) or _carries(process, mark):
            found.add(process)
    # A worker adopts what loses its parents (check_worker.py), so the line to it is unbroken while it lives.
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _processes() -> dict[int, tuple[str, int, int, int]]:
    """State, parent, group and session of every process of this user."""
    found = {}
    user = os.getuid()
    for name in os.listdir(_PROC) if _PROC.is_dir() else ():
        if not name.isdecimal():
            continue
        # Processes end while they are looked at.
        with suppress(OSError, ValueError):
            if os.stat(_PROC / name).st_uid != user:
                continue
            # The program's name in parentheses may hold anything.
            fields = (_PROC / name / "stat").read_bytes().rpartition(b")")[2].split()
            found[int(name)] = (fields[0].decode(), *map(int, fields[1:4]))
    return found


def _carries(process: int, mark: bytes) -> bool:
    with suppress(OSError):
        return mark in (_PROC / str(process) / "environ").read_bytes().split(b"\0")
    return False
