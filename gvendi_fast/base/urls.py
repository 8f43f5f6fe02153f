"""Files at URLs through fsspec: paths with the methods of `pathlib.Path`, whose calls are tried again.

An object store has no rename and no folders: a file is one put of all of it under its name, which is there whole or
not at all, and a folder is what names begin with. What other processes write is seen at once, as no listing is kept.

What libraries try again by themselves: botocore four times after 500, 502, 503, 504 and a connection that fails, s3fs
four times where the body of an answer breaks off. What is left comes here: errors behind those, other stores, whose
libraries differ, an answer that is shorter than it should be, an upload that the store refuses as it arrived broken.
"""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import IO, Any, TypeVar

import fsspec
from upath.extensions import ProxyUPath

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import StoreError

Result = TypeVar("Result")

# Seconds before each further try; each is drawn from half to one and a half of it.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Protocols whose put is whole or nothing, and refused, if that is asked for, where the name is taken.
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
_WEB = ("http", "https")
# {protocol: what pip installs}; others are said by fsspec.
_DRIVERS = {
    "s3": "gvendi-fast[s3]",
    "s3a": "gvendi-fast[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
# Trying again does not change what these say.
_FINAL = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.ENOSPC,
}
# Of an upload that arrived broken; s3fs has one error number for all refusals.
_BROKEN = {
    "IncompleteBody",
    "BadDigest",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
}
# Under which of these a store says when an object was written.
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "created")
# Bytes of an object that are put by one request; more go in several, and are there with the last one.
_AT_ONCE = 1 << 26
# Bytes that a read fetches, if less is asked for: twice as many each time that it goes on where the last one ended.
_FIRST_READ, _MOST_READ = 1 << 18, 1 << 23


class Url(ProxyUPath):
    """A file or folder at a URL. Threads may share one; it is pickled by its URL and storage options.

    Errors are OSErrors with a number and the URL: FileNotFoundError, IsADirectoryError, and StoreError for what the
    store refuses and what fails however often it is tried. Settings of the store's library come from its own
    configuration (environment, ~/.aws, FSSPEC_*).
    """

    def __fspath__(self) -> str:
        return str(self)

    @property
    def fs(self) -> Any:
        """The file system, which fsspec keeps, one a process; GvendiError where what reads the protocol is missing."""
        options = dict(self.storage_options)
        if self.protocol != "hf":
            options["use_listings_cache"] = False
        try:
            return fsspec.filesystem(self.protocol, **options)
        except (ImportError, ValueError) as error:
            package = _DRIVERS.get(self.protocol)
            remedy = f"pip install '{package}'" if package else str(error)
            raise GvendiError(
                f"'{self}' cannot be used: what reads {self.protocol}:// is not installed; {remedy}"
            ) from error

    def _call(self, function: Callable[[Any], Result]) -> Result:
        """`function` of the file system, tried again where that may help."""
        system = self.fs
        for wait in (*WAITS_S, None):
            try:
                return function(system)
            # Every library has errors of its own; those of this program go on as they are.
            except Exception as error:
                if isinstance(error, GvendiError | StoreError) or _is_fault(error):
                    raise
                error = _behind_absence(error, self)
                found = _as_os_error(error, self)
                if wait is None or (found.errno in _FINAL and _code_of(error) not in _BROKEN):
                    raise found from error
            time.sleep(wait * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")

    def _info(self) -> dict[str, Any]:
        return self._call(lambda fs: fs.info(self.path))

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object of this name, or any whose name begins with it as a folder."""
        try:
            self._info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether names of objects begin with this as a folder."""
        return self._is("directory")

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._is("file")

    def _is(self, kind: str) -> bool:
        try:
            return self._info()["type"] == kind
        except FileNotFoundError:
            return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # type: ignore[override]
        """Size, kind, and, where its store says so, the time of its last change (else 0)."""
        info = self._info()
        if info.get("size") is None:
            raise StoreError(errno.EINVAL, "its server does not say how large it is; download it", str(self))
        changed = next((info[name] for name in _CHANGED if hasattr(info.get(name), "timestamp")), None)
        mode = stat.S_IFDIR | 0o755 if info["type"] == "directory" else stat.S_IFREG | 0o644
        when = 0 if changed is None else changed.timestamp()
        return os.stat_result((mode, 0, 0, 1, 0, 0, info["size"], when, when, when))

    def status(self) -> tuple[Any, ...]:
        """What the store says of the object: its size, and tag or times."""
        return tuple(sorted((name, str(value)) for name, value in self._info().items()))

    def entries(self) -> list[tuple[str, bool]]:
        """(name, whether it is a folder) of what is in a folder, sorted; none where there is no folder."""

        def listed(fs: Any) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return fs.ls(self.path, detail=True)

        try:
            found = self._call(listed)
        except (FileNotFoundError, NotADirectoryError):
            return []
        own = self.path.rstrip("/")
        # Some tools make an empty object in a folder's place.
        others = (item for item in found if item["name"].rstrip("/").lstrip("/") != own.lstrip("/"))
        return sorted(
            {(item["name"].rstrip("/").rsplit("/", 1)[-1], item["type"] == "directory") for item in others}
        )

    def iterdir(self) -> Iterator[Url]:
        """What is in a folder, sorted by name."""
        return (self / name for name, _ in self.entries())

    def find(self) -> list[Url]:
        """The objects below a folder, sorted."""

        def found(fs: Any) -> list[str]:
            fs.invalidate_cache()
            return fs.find(self.path)

        return self._urls(self._call(found))

    def matches(self) -> list[Url]:
        """What matches the URL as a glob, sorted."""

        def found(fs: Any) -> list[str]:
            fs.invalidate_cache()
            return fs.glob(self.path)

        return self._urls(self._call(found))

    def _urls(self, paths: list[str]) -> list[Url]:
        unstrip = self.fs.unstrip_protocol
        return [type(self)(unstrip(path), **self.storage_options) for path in sorted(paths)]

    def open(
        self, mode: str = "rb", buffering: int = -1, encoding: str | None = None, **more: Any
    ) -> IO[Any]:  # type: ignore[override]
        """The object for reading, by ranges; `files.atomic_write` writes."""
        if mode not in ("r", "rt", "rb"):
            raise io.UnsupportedOperation(f"'{self}': an object is written whole, not opened as {mode!r}")
        raw = _Ranges(self)
        if buffering == 0:
            return raw  # type: ignore[return-value]
        stream = io.BufferedReader(raw, io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering)
        return stream if mode == "rb" else io.TextIOWrapper(stream, encoding or "utf-8", **more)

    def read_bytes(self) -> bytes:
        """All of the object, from one answer, so that it is one version of it."""

        def whole(fs: Any) -> bytes:
            size = fs.info(self.path).get("size")
            if size == 0:
                return b""
            # One byte more is asked for: an object that is longer by now is not taken for what it was.
            content = fs.cat_file(self.path, start=0, end=None if size is None else size + 1)
            if size is not None and len(content) != size:
                raise OSError(errno.EIO, f"{len(content):,} of its {size:,} bytes came")
            return content

        return self._call(whole)

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes `start` to before `end`, which must lie inside of the object."""

        def piece(fs: Any) -> bytes:
            content = fs.cat_file(self.path, start=start, end=end)
            if len(content) > end - start:
                raise StoreError(
                    errno.EINVAL,
                    "its server sends all of it where a piece is asked for; download it",
                    str(self),
                )
            if len(content) != end - start:
                raise OSError(errno.EIO, f"{len(content):,} of {end - start:,} bytes came")
            return content

        return b"" if start >= end else self._call(piece)

    @contextmanager
    def written(self, exclusive: bool = False) -> Iterator[IO[bytes]]:
        """A stream whose bytes are the object after the block; nothing is there if the block raises.

        exclusive: an object that is there stays as it is.
        """
        self._check_store()
        with NamedTemporaryFile(prefix="gvendi-", suffix=".part") as file:
            yield file
            file.flush()
            if exclusive:
                self._put_new(file)
            else:
                self._put(file, "overwrite")

    def _put_new(self, file: IO[bytes]) -> None:
        try:
            self._put(file, "create")
        except OSError:
            # Stores and their libraries have several words for it, also where a try that failed had done it.
            if not self.exists():
                raise

    def _put(self, file: IO[bytes], mode: str) -> None:
        size = file.seek(0, os.SEEK_END)

        def put(fs: Any) -> None:
            file.seek(0)
            if size > _AT_ONCE:
                fs.put_file(file.name, self.path, mode=mode)
            else:
                fs.pipe_file(self.path, file.read(), mode=mode)

        try:
            self._call(put)
        except FileNotFoundError as error:
            raise StoreError(
                errno.ENOENT,
                f"its bucket '{self.parts[0].strip('/')}' does not exist; make it, or check its name",
                str(self),
            ) from error

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._call(lambda fs: fs.rm_file(self.path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing, where it could be made: a folder is there with its first object, a bucket is its owner's to make."""
        self._check_store()

    def _check_store(self) -> None:
        if self.protocol not in STORES:
            raise GvendiError(
                f"'{self}' cannot be written: files that are there whole or not at all are made at "
                f"{', '.join(f'{name}://' for name in STORES if name != 'memory')} and on this machine; name such a "
                "place, or mount this one"
            )

    def resolve(self, strict: bool = False) -> Url:
        """Itself: there are no links."""
        return self


class _Ranges(io.RawIOBase):
    """An object for reading: what is read is fetched in pieces that grow as long as one goes on behind the other."""

    def __init__(self, url: Url) -> None:
        self._url = url
        found = url.stat()
        self._size = found.st_size
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(url))
        self._place = self._start = 0
        self._piece, self._most = b"", _FIRST_READ

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = (0, self._place, self._size)[whence]
        if begin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(self._url))
        self._place = begin + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        # As much as is asked for, as those who read a header want it whole.
        wanted, done = memoryview(buffer).cast("B"), 0
        while done < len(wanted) and self._place < self._size:
            inside = self._place - self._start
            if not 0 <= inside < len(self._piece):
                self._fetch(len(wanted) - done)
                inside = 0
            count = min(len(wanted) - done, len(self._piece) - inside)
            wanted[done : done + count] = memoryview(self._piece)[inside : inside + count]
            self._place += count
            done += count
        return done

    def _fetch(self, wanted: int) -> None:
        goes_on = self._place > 0 and self._place == self._start + len(self._piece)
        self._most = min(2 * self._most, _MOST_READ) if goes_on else _FIRST_READ
        end = min(self._place + max(wanted, self._most), self._size)
        self._piece, self._start = self._url.read_range(self._place, end), self._place


def _is_fault(error: Exception) -> bool:
    """Whether an error is a fault of a program rather than of a store: Python's own, but for those of the system."""
    return type(error).__module__ == "builtins" and not isinstance(error, OSError)


def _behind_absence(error: Exception, url: Url) -> Exception:
    """What has failed where fsspec says that there is no such file: of the web it says so whatever it was."""
    cause = error.__cause__
    if url.protocol not in _WEB or not isinstance(error, FileNotFoundError):
        return error
    is_absent = not isinstance(cause, Exception) or isinstance(cause, FileNotFoundError)
    return error if is_absent or _status_of(cause) in (404, 410) else cause


def _as_os_error(error: Exception, url: Url) -> OSError:
    """The error with a number, the URL, and the words of whoever refused."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    status, name = _status_of(error), type(error).__name__
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(url))
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        kind = errno.EISDIR if isinstance(error, IsADirectoryError) else errno.ENOTDIR
        return type(error)(kind, os.strerror(kind), str(url))
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(url))
    if isinstance(error, PermissionError) or status in (401, 403):
        return StoreError(
            errno.EACCES,
            f"its store refuses it ({said}); check the credentials and what they allow",
            str(url),
        )
    if "Credential" in name or "Token" in name or "Auth" in name:
        return StoreError(
            errno.EACCES,
            f"there are no credentials for its store ({said}); set them up as its own tools want them",
            str(url),
        )
    if url.protocol in _WEB and isinstance(error, ValueError | OverflowError):
        return StoreError(errno.EINVAL, f"it cannot be asked for ({said}); check how it is spelled", str(url))
    number = error.errno if isinstance(error, OSError) and error.errno else None
    if status is not None and number is None:
        number = errno.EIO if status >= 500 or status in (408, 425, 429) else errno.EINVAL
    if number is None:
        number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO
    tries = "" if number in _FINAL else f", tried {len(WAITS_S) + 1} times"
    return StoreError(number, f"its store failed ({said}{tries})", str(url))


def _status_of(error: Exception) -> int | None:
    """The status of HTTP that an error of some library has."""
    response = getattr(error, "response", None)
    found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    found += [getattr(response, name, None) for name in ("status", "status_code")]
    return next(
        (int(value) for value in found if isinstance(value, int | str) and str(value).isdigit()), None
    )


def _code_of(error: Exception) -> str | None:
    """The store's own word for an error, as botocore has it."""
    response = getattr(error.__cause__ or error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
