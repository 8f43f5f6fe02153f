"""Standard input as a file of the corpus: rows are read twice, so that it is kept in a file, once a process."""

from __future__ import annotations

import atexit
import filecmp
import os
import re
import shutil
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists
from gvendi_fast.base.places import is_url, open_file, place, size_of
from gvendi_fast.base.temporary import new_folder
from gvendi_fast.data.kinds import STANDARD_INPUT
from gvendi_fast.data.run_files import SPOOL, SPOOLED

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

# How messages call it.
SHOWN = "'-' (standard input)"
_PIECE = 1 << 20
# What it begins with -> its kind, if it is no plain JSON lines.
_KINDS = {b"\x1f\x8b": "jsonl.gz", b"\x28\xb5\x2f\xfd": "jsonl.zst", b"PAR1": "parquet", b"ARROW1": "arrow"}
# What no header of CSV has, and any line of JSON, or end of one.
_NO_HEADER = re.compile(rb"[{}\[\]:\0]")
# Where standard input was kept, and which one: a program may have another one later.
_kept: list[tuple[IO[bytes], str]] = []


def spooled() -> str:
    """The file that holds all of standard input, which ends with the process.

    Raises GvendiError where there is none, or a terminal.
    """
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        what = "closed" if stream is None else "a terminal"
        raise GvendiError(
            f"corpus: {SHOWN} is {what}; pipe rows into the command, as in: cat FILE | gvendi score -"
        )
    for known, path in _kept:
        if known is stream:
            return path
    folder = new_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "standard-input"
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file, _PIECE)
    _kept.append((stream, str(path)))
    return str(path)


def kind_of_input(path: str) -> str:
    """The kind of what standard input held, by what it begins with: JSON lines, unless it says otherwise."""
    with open(path, "rb") as stream:
        head = stream.read(_PIECE)
    header, ended, _ = head.partition(b"\n")
    kind = "tsv" if b"\t" in header else "csv" if b"," in header else "jsonl"
    if not ended or _NO_HEADER.search(header):
        kind = "jsonl"
    return next((kind for begin, kind in _KINDS.items() if head.startswith(begin)), kind)


def place_in(run: str | os.PathLike, path: str, kind: str) -> Path | Url | None:
    """Where a run directory keeps the rows that came from no file: standard input's, and a program's; else None."""
    if path == SPOOLED:
        return place(run) / SPOOL
    return place(run) / f"standard-input.{kind}" if path == STANDARD_INPUT else None


def keep_in(run: str | os.PathLike, path: str, kind: str, here: str) -> None:
    """Keep rows that came from no file, and lie `here`, with the run directory made from them, unless they are there.

    path: their recorded name. What is kept of a corpus before it has grown is replaced.
    """
    where = place_in(run, path, kind)
    if where is None or (exists(where) and _is_same(here, where)):
        return
    with open_file(here) as file, atomic_write(where) as kept:
        shutil.copyfileobj(file, kept, _PIECE)


def _is_same(here: str, where: Path | Url) -> bool:
    """Whether two files have the same bytes."""
    if not is_url(here) and not is_url(where):
        return filecmp.cmp(here, where, shallow=False)
    if here == os.fspath(where):
        return True
    if size_of(here) != size_of(where):
        return False
    with open_file(here) as one, open_file(where) as other:
        while (piece := one.read(_PIECE)) and piece == other.read(_PIECE):
            pass
        return not piece


def named(error: Exception, path: str, name: str = STANDARD_INPUT) -> None:
    """Let an error speak of standard input, or of another `name`, in place of the file that holds it."""
    shown = SHOWN if name == STANDARD_INPUT else f"'{name}'"
    error.args = tuple(
        arg.replace(f"'{path}'", shown).replace(path, name) if isinstance(arg, str) else arg
        for arg in error.args
    )
