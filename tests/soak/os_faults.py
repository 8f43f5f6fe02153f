"""Calls of the operating system that fail in this process: the n-th that concerns a folder, once or from then on.

What Python itself calls is reached (`os`, `open` and the streams it gives); what libraries in C call is not: a full
file system (`attacks.full`) and permissions (`attacks.permission`) are there for these.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Kind of call -> what may be the matter with it.
ERRORS = {
    "read": (errno.EIO, errno.ESTALE),
    "look": (errno.EIO, errno.EACCES, errno.ESTALE),
    "open": (errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE),
    "make": (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG),
    "flush": (errno.EIO, errno.ENOSPC),
}
_OF_OS = {
    "open": "open",
    "listdir": "look",
    "scandir": "look",
    "stat": "look",
    "lstat": "look",
    "mkdir": "make",
    "rmdir": "make",
    "replace": "make",
    "rename": "make",
    "link": "make",
    "unlink": "make",
    "remove": "make",
    "truncate": "write",
    "ftruncate": "write",
    "fsync": "flush",
    "fdatasync": "flush",
}


@dataclass
class Plan:
    """Which call fails. number: it is the so-manieth of `kind` below `folder`, from 1; 0 lets all through.

    draw: number that chooses the error. lasting: all later ones of the kind fail too.
    done: calls until now, by kind; hit: whether one has failed.
    """

    folder: Path
    kind: str = ""
    number: int = 0
    draw: int = 0
    lasting: bool = False
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ERRORS, 0))
    hit: bool = False

    def pass_or_fail(self, kind: str, path: Any) -> None:
        """Raise the error that is planned for this call, if it is its turn."""
        if not self._concerns(path):
            return
        self.done[kind] += 1
        if kind != self.kind or not self.number:
            return
        if self.done[kind] == self.number or (self.lasting and self.done[kind] > self.number):
            self.hit = True
            number = ERRORS[kind][self.draw % len(ERRORS[kind])]
            name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None
            raise OSError(number, os.strerror(number), name)

    def _concerns(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = _readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        try:
            whole = os.path.abspath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return whole.startswith(f"{self.folder}{os.sep}")


_readlink = os.readlink


def install(plan: Plan) -> None:
    """Let the calls of this process go through `plan`, for good."""
    for name, kind in _OF_OS.items():
        setattr(os, name, _guarded(plan, kind, getattr(os, name)))
    builtins.open = io.open = _opener(plan, io.open)


def _guarded(plan: Plan, kind: str, call: Callable) -> Callable:
    def guarded(*args, **kwargs):
        # Names relative to an open folder are another's (rmtree); the first argument is where it begins.
        if args and kwargs.get("dir_fd") is None:
            plan.pass_or_fail(kind, args[0])
        return call(*args, **kwargs)

    return guarded


def _opener(plan: Plan, call: Callable) -> Callable:
    def opened(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):
        if isinstance(file, int) or not plan._concerns(file):
            return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
        writes = any(letter in mode for letter in "wxa+")
        plan.pass_or_fail("make" if writes else "open", file)
        raw = _Raw(file, "".join(letter for letter in mode if letter not in "bt"))
        raw.plan, raw.path = plan, os.fspath(file)
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader
        binary = kind(raw, size)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    return opened


class _Raw(io.FileIO):
    """A file whose reads and writes go through the plan."""

    plan: Plan
    path: str

    def write(self, data):
        self.plan.pass_or_fail("write", self.path)
        return super().write(data)

    def readinto(self, buffer):
        self.plan.pass_or_fail("read", self.path)
        return super().readinto(buffer)

    def readall(self):
        self.plan.pass_or_fail("read", self.path)
        return super().readall()
