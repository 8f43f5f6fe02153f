"""Where files lie: a path of this machine, or the URL of an object store, by one set of calls.

A URL's class is in urls.py, which is loaded with the first URL alone, as it needs packages that few have.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gvendi_fast.base.errors import GvendiError

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

# A drive of Windows has one letter, and no second slash.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL = re.compile(r"(?:file|local)://", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)


def is_url(path: Any) -> bool:
    """Whether this is the URL of something that does not lie on this machine."""
    text = path if isinstance(path, str) else "" if isinstance(path, Path) else str(path)
    return "://" in text and _URL.match(text) is not None and _LOCAL.match(text) is None


def place(path: str | os.PathLike) -> Path | Url:
    """A path of this machine as `Path`, a URL as `Url`, which has the same methods.

    Raises GvendiError where the packages that read URLs are missing, and for a protocol that nothing reads.
    """
    if isinstance(path, Path):
        return path
    # A UPath of universal_pathlib has no os.fspath.
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)
    if not is_url(text):
        return Path(_LOCAL.sub("", text))
    try:
        from gvendi_fast.base.urls import Url
    except ImportError as error:
        raise GvendiError(
            f"'{text}' is a URL, and what reads URLs is not installed ({error}): pip install 'gvendi-fast[urls]'"
        ) from error
    if isinstance(path, Url):
        return path
    try:
        return Url(text, **getattr(path, "storage_options", {}))
    except ValueError as error:
        raise GvendiError(
            f"'{text}' cannot be used: there is nothing that reads {text.partition('://')[0]}:// ({error})"
        ) from error


def local_name(path: str) -> str:
    """A file:// URL as the path that it stands for; anything else as it is."""
    return _LOCAL.sub("", path)


def name_of(path: str) -> str:
    """The last component of a path or URL, without what a web address has behind a question mark."""
    if _WEB.match(path):
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    return path.rsplit("/", 1)[-1] if is_url(path) else os.path.basename(path)


def open_file(path: str | os.PathLike, buffering: int = -1) -> IO[bytes]:
    """The bytes of a file, for reading; its errors have its name where it is a URL."""
    if is_url(path):
        return place(path).open("rb", buffering)
    return open(path, "rb", buffering)


def size_of(path: str | os.PathLike) -> int:
    """Bytes of a file. Raises OSError where there is none, and for a URL whose server does not say."""
    return place(path).stat().st_size if is_url(path) else os.path.getsize(path)


def status_of(path: str | os.PathLike) -> tuple[Any, ...]:
    """What changes whenever a file does: of a URL, whatever its store says of the object."""
    if is_url(path):
        return place(path).status()
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
