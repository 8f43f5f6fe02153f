"""Files that are written whole or not at all, even if the process is killed.

atomicwrites was considered: the names of its temporary files do not say what a killed process left behind and what a
live one is writing, and a file that must not be overwritten needs hard links there, which some file systems lack.
"""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import making, named
from gvendi_fast.base.places import is_url, open_file

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp$")
_FOREIGN_AGE_S = 24 * 3600
SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A file system without hard links reports one of these.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


def host_name() -> str:
    """This machine's name as names of temporary files hold it."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def exists(path: Path | Url) -> bool:
    """Whether there is something at `path`; where the system cannot say (permission, a vanished mount), its OSError."""
    if is_url(path):
        return path.exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(folder: Path | Url) -> list[str]:
    """Names of what a folder of results holds, sorted; none where there is no folder.

    Raises GvendiError where one is a FIFO, a socket or a device, which would have whoever opens it wait for ever.
    """
    if is_url(folder):
        return [name for name, _ in folder.entries()]
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in found:
        # Without links the listing itself says what an entry is.
        if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
            continue
        try:
            what = SPECIAL.get(stat.S_IFMT(entry.stat().st_mode))
        # Links to nothing or in a circle, and what is gone by now: whoever opens it has the system's word.
        except OSError:
            continue
        if what is not None:
            raise GvendiError(
                f"'{entry.path}' is {what}, not a file; remove it, and restore the file if there was one"
            )
    return [entry.name for entry in found]


def read_text(path: str | os.PathLike, most: int, what: str, wanted: str) -> str:
    """The text of a small UTF-8 file, of which no more is read than `most` characters.

    what: what a message calls it; wanted: what should be in it. Raises GvendiError for a longer file and for one that
    is not UTF-8, and OSError, with the path, where the system does not let it be read.
    """
    try:
        with named(path), io.TextIOWrapper(open_file(path), encoding="utf-8") as stream:
            text = stream.read(most + 1)
    except UnicodeDecodeError as error:
        raise GvendiError(f"{what} '{os.fspath(path)}' is not UTF-8: {error}") from error
    if len(text) > most:
        raise GvendiError(f"{what} '{os.fspath(path)}' has more than {most:,} characters; wanted {wanted}")
    return text


def make_folder(folder: Path | Url) -> None:
    """Make a folder, and those above it, unless it is there."""
    with making():
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_write(path: Path | Url, exclusive: bool = False, sweep: bool = True) -> Iterator[IO[bytes]]:
    """A stream whose bytes are at `path` after the block, and nowhere if the block raises or the process dies.

    The bytes go to a hidden file beside it (its name holds host, process and a random part), are flushed to the disk
    and moved over `path` in one step; then the folder is flushed, so that no later write can survive a power cut that
    this one does not. With `exclusive` a file that is already at `path` stays as it is. With `sweep` what killed
    processes left of this very file is removed first. In an object store it is one put, and nothing is beside.
    """
    if is_url(path):
        with path.written(exclusive) as stream:
            yield stream
        return
    if sweep:
        with _as_of(path.parent, path):
            remove_stale(path.parent, path.name)
    beside = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.{uuid4().hex}.tmp")
    try:
        with _as_of(beside, path), making():
            raw = _Raw(beside, path)
        with io.BufferedWriter(raw) as stream:
            yield stream
            stream.flush()
            with _as_of(beside, path):
                os.fsync(stream.fileno())
        with _as_of(beside, path):
            if exclusive:
                _place_new(beside, path)
            else:
                os.replace(beside, path)
            flush_folder(path.parent)
    finally:
        # What kept the file from being made may keep it from being looked for too.
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def put_quickly(path: Path | Url, content: bytes, exclusive: bool = False) -> bool:
    """Put a small file there whole, without waiting for the disk: for what may be lost with a power cut.

    Returns whether this content is there now; with `exclusive` a file that is already there stays.
    """
    if is_url(path):
        with path.written(exclusive) as stream:
            stream.write(content)
        return not exclusive or path.read_bytes() == content
    beside = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.{uuid4().hex}.tmp")
    try:
        with _as_of(beside, path), named(path):
            beside.write_bytes(content)
            if not exclusive:
                os.replace(beside, path)
                return True
            try:
                os.link(beside, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                # Two may both get here; whoever calls must bear that.
                if exists(path):
                    return False
                os.replace(beside, path)
            return True
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


class _Raw(io.FileIO):
    """A new file whose failed writes name the file that it is to become."""

    def __init__(self, beside: Path, path: Path) -> None:
        super().__init__(beside, "x")
        self._path = path

    def write(self, data: Any) -> int | None:
        """See `io.RawIOBase`."""
        with named(self._path):
            return super().write(data)


@contextmanager
def _as_of(other: Path, path: Path) -> Iterator[None]:
    """Errors name the file that was asked for in place of `other`: the hidden one beside it, or its folder."""
    try:
        yield
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) == os.fspath(other):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def _place_new(beside: Path, path: Path) -> None:
    try:
        os.link(beside, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Two processes may both get here; they write the same bytes unless their settings differ.
        if not path.exists():
            os.replace(beside, path)


def flush_folder(folder: Path | Url) -> None:
    """Make the names in `folder` survive a power cut; Windows and object stores do so by themselves."""
    if os.name == "nt" or is_url(folder):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a temporary file of `atomic_write`."""
    return _TEMPORARY.match(name) is not None


def is_passing(name: str) -> bool:
    """Whether a file of this name is nobody's content: a temporary one, or what NFS keeps of one removed while open."""
    return is_temporary(name) or name.startswith(".nfs")


def remove_stale(folder: Path | Url, name: str | None = None) -> None:
    """Remove what killed processes left in `folder`, and nothing that a live one may be writing.

    name: only what was to become the file of this name.
    A temporary file of this host is removed if its process no longer exists; one of another host, whose processes
    cannot be looked up, if it has not been written to for a day.
    """
    for path in stale(folder, name):
        path.unlink(missing_ok=True)


def stale(folder: Path | Url, name: str | None = None) -> list[Path]:
    """What `remove_stale` would remove; an object store has none."""
    if is_url(folder):
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if (match := _TEMPORARY.match(path.name))
        and name in (None, match["name"])
        and _is_stale(path, match["host"], int(match["pid"]))
    ]


def _is_stale(path: Path, host: str, pid: int) -> bool:
    # Windows has no way to ask, so age decides there too.
    if host == host_name() and os.name != "nt":
        return is_dead(pid)
    try:
        return time.time() - path.stat().st_mtime > _FOREIGN_AGE_S
    except FileNotFoundError:
        return False


def is_dead(pid: int) -> bool:
    """Whether a process of this machine has ended; False where the system cannot say."""
    # os.kill would end the process on Windows, and there is none of this number.
    if os.name == "nt" or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # One that has ended and that its parent has not asked after yet is still listed, on Linux as a zombie.
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[:1] == [b"Z"]


def two_outputs(out: Path | Url, suffix: str, beside: str, force: bool) -> tuple[Path | Url, Path | Url]:
    """`out` and the file beside it with the suffix `beside`, checked before any work is done.

    Raises GvendiError for an `out` without `suffix`, and where either file exists, unless `force`.
    """
    if out.suffix != suffix:
        raise GvendiError(f"--out must be a name that ends in {suffix}, got '{out}'")
    paths = out, out.with_suffix(beside)
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise GvendiError(f"'{path}' already exists; give another --out, or --force to overwrite a file")
    return paths
