"""What the operating system refused, in one sentence: which path, why, and what to do about it.

An OSError is left as it is wherever it arises, with `errno` and `filename` set (`named`), and worded once, at the end.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from gvendi_fast.base.printable import printable

# errno -> (why, what to do). Others have the system's own words alone.
_WHY = {
    errno.ENOSPC: ("its disk is full", "free some space, or use another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or use another disk"),
    errno.EFBIG: (
        "the file would be larger than this process or the file system may write",
        "raise the limit ('ulimit -f'), or use another disk",
    ),
    errno.EACCES: ("permission is denied", "change its permissions, or name another path"),
    errno.EPERM: ("the system does not permit it", "change its permissions, or name another path"),
    errno.EROFS: ("its file system is read-only", "name a path that can be written"),
    errno.ENAMETOOLONG: ("the name is too long", "name a shorter path"),
    errno.ELOOP: ("its links go round in a circle", "mend the links"),
    errno.ENOENT: ("it does not exist", "check the path and that its folder exists"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("it is a folder, and a file is wanted", "name a file"),
    errno.EEXIST: ("it exists already", "name another path"),
    errno.ENOTEMPTY: ("the folder holds other things", "name another path"),
    errno.EXDEV: ("it lies on another file system", "name a path on the same one"),
    errno.EBUSY: ("it is in use", "end what uses it"),
    errno.ETXTBSY: ("it is a program that runs", "name another path"),
    errno.EMFILE: ("this process has too many files open", "raise the limit ('ulimit -n')"),
    errno.ENFILE: ("this machine has too many files open", "end other processes"),
    errno.ENOMEM: ("the machine's memory is used up", "end other processes, or use a larger machine"),
    errno.EAGAIN: ("no process or thread more may be started", "raise the limit ('ulimit -u')"),
    errno.EIO: ("the disk or the mount failed to read or write", "check the disk; the data may be whole"),
    errno.ESTALE: ("the network file system has dropped it", "mount it again"),
    errno.ENODEV: ("its device is gone", "mount it again"),
    errno.ENXIO: ("its device is gone", "mount it again"),
    errno.ENOTCONN: ("its mount is gone", "mount it again"),
    errno.ECONNRESET: ("the other side broke off the connection", "try again"),
    errno.ECONNABORTED: ("the connection broke off", "try again"),
    errno.ECONNREFUSED: ("nothing answers there", "check the address, and that its server runs"),
    errno.ETIMEDOUT: ("there was no answer in time", "check the network or the mount, and try again"),
    errno.EHOSTUNREACH: ("the host cannot be reached", "check the network"),
    errno.ENETUNREACH: ("the network cannot be reached", "check the network"),
    errno.EINTR: ("a signal interrupted it", "try again"),
    errno.EPIPE: ("whoever read it has closed it", "keep the reader open"),
    errno.EBADF: ("it is closed", "open it, or redirect it to a file"),
    errno.EINVAL: ("the file system does not take this", "name another path"),
}
# As pyarrow writes it.
_ERRNO = re.compile(r"\[errno (\d+)\]", re.IGNORECASE)


class StoreError(OSError):
    """What an object store refuses, or failed to do: `errno`, its words with the remedy in `strerror`, and the URL."""


def sentence(error: OSError) -> str:
    """One line, without a full stop: the path, why it could not be used, and the remedy."""
    paths = [printable(os.fsdecode(path)) for path in (error.filename, error.filename2) if _is_path(path)]
    if isinstance(error, StoreError):
        return f"'{printable(os.fsdecode(error.filename))}' cannot be used: {printable(error.strerror)}"
    if error.errno is None:
        # Libraries raise OSError with words alone; their further lines are hints on their own calls.
        text = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        return text if not paths or paths[0] in text else f"'{paths[0]}' cannot be used: {text}"
    why, remedy = _WHY.get(error.errno, (None, None))
    said = why or printable((error.strerror or os.strerror(error.errno)).splitlines()[0])
    if not paths:
        if error.errno == errno.ENOENT and _folder_is_gone():
            return "the current folder does not exist any more; change to one that does"
        # A closed pipe is one of Python's connection errors too, and no network's.
        is_remote = isinstance(error, ConnectionError | TimeoutError) and error.errno != errno.EPIPE
        what = "a connection failed" if is_remote else "the operating system refused"
        return f"{what}: {said}" + (f"; {remedy}" if remedy else "")
    what = f"'{paths[0]}'" + (f" (to '{paths[1]}')" if len(paths) > 1 else "")
    return f"{what} cannot be used: {said}" + (f"; {remedy}" if remedy else "")


def name(error: OSError, path: str | os.PathLike) -> OSError:
    """The error with `filename`, and with `errno` where only its words hold the number, as those of pyarrow do."""
    if error.errno is None and (found := _ERRNO.search(str(error))):
        error.errno, error.strerror = int(found[1]), os.strerror(int(found[1]))
    if error.filename is None:
        error.filename = os.fspath(path)
    return error


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Every OSError that leaves the block names this path, if it names none: those of read and write do not."""
    try:
        yield
    except OSError as error:
        name(error, path)
        raise


@contextmanager
def making() -> Iterator[None]:
    """Where the block makes a file or folder: that it does not exist, though its folder does, is /proc's refusal."""
    try:
        yield
    except FileNotFoundError as error:
        folder = os.path.dirname(os.fspath(error.filename)) or os.curdir
        if _folder_is_gone() or not os.path.isdir(folder):
            raise
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), error.filename) from error


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """As `named`, for the system's errors alone: without a number it is the content that a library refuses."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _is_path(path: object) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and bool(path)


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
