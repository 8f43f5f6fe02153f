"""Folders for runs that nobody asked to keep: those of a killed process are found by their names and removed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from gvendi_fast.base.files import host_name, is_dead

_KEPT = "kept"
# Folders that this process has made.
_made: set[Path] = set()


def new_folder() -> Path:
    """An empty folder of this process in the system's temporary one; first, those of killed processes are removed.

    Its owner removes it in the end, or calls `keep`.
    """
    remove_dead()
    folder = Path(tempfile.mkdtemp(prefix=f"gvendi-{host_name()}-{os.getpid()}-"))
    _made.add(folder)
    return folder


def is_of_this_process(path: Path) -> bool:
    """Whether a folder is, or lies in, one that `new_folder` made for this process."""
    return not _made.isdisjoint([path, *path.parents])


def keep(folder: Path) -> None:
    """Let a folder of `new_folder` stay when its process has ended."""
    (folder / _KEPT).touch()


def remove_dead() -> None:
    """Remove folders of this user whose process on this host was killed, except those that are kept."""
    name = re.compile(rf"gvendi-{re.escape(host_name())}-(\d+)-[a-z0-9_]{{8}}", re.ASCII)
    for path in Path(tempfile.gettempdir()).glob("gvendi-*"):
        match = name.fullmatch(path.name)
        if match and is_dead(int(match[1])) and _is_own(path) and not os.path.lexists(path / _KEPT):
            # Another process may do the same at this moment, and what cannot be removed is left to the system.
            shutil.rmtree(path, ignore_errors=True)


def _is_own(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return path.is_dir() and not path.is_symlink() and (os.name == "nt" or found.st_uid == os.getuid())
