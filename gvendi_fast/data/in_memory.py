"""Rows that a program has in memory, or makes one after the other, as a file of the run directory.

They are written in the order given as JSON lines, one row in memory at a time. So they are read, resumed, fingerprinted
and found again as those of any file are; their recorded name is "rows", and the ids of rows without one are "rows:1",
"rows:2" and so on.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeAlias

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, make_folder
from gvendi_fast.base.places import is_url, open_file, place
from gvendi_fast.data.json_rows import row_line
from gvendi_fast.data.kinds import STANDARD_INPUT, kind_of
from gvendi_fast.data.manifest import Manifest
from gvendi_fast.data.rows import Fields
from gvendi_fast.data.run_directory import check_free
from gvendi_fast.data.run_files import SPOOL, SPOOLED, check_manifest, read_json

Paths: TypeAlias = str | os.PathLike | Sequence[str | os.PathLike]
Corpus: TypeAlias = Paths | Iterable[Any]
# Strings that are looked at to tell texts from paths, and the longest that can be a path.
_LOOKED_AT, _LONGEST_PATH = 100, 4096
# Rows of a table at a time.
_BLOCK = 256
_WANTED = "wanted paths, or rows: dicts or texts, a table, or anything that gives them one after the other"


def index_of(
    data: Corpus, out: str | os.PathLike, index: Callable[..., Manifest], fields: Fields, limit: int | None
) -> Callable[..., Manifest]:
    """How the corpus `data` is indexed for the run directory `out`: `index` with its files, or the file of its rows.

    index: as `index_corpus`. fields: the names of a row's fields; a text becomes a row with the field `fields.text`.
    limit: of rows more than these are not asked for.
    Rows are written to `out` first. Raises GvendiError for what is neither paths nor rows, for no rows, and where `out`
    was made from others: with rows behind those of before they are a corpus that has grown (`growth.py`).
    """
    if is_paths(data):
        return partial(index, data)
    path = spool((row_line(row, fields.text, fields.messages) for row in rows_of(data)), out, limit)

    def named(text: str) -> str:
        return text.replace(f"'{path}'", SPOOLED).replace(os.fspath(path), SPOOLED)

    def indexed(**settings: Any) -> Manifest:
        try:
            found = index(path, **settings)
        except GvendiError as error:
            error.args = tuple(named(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise
        (source,) = found.files
        notes = tuple(map(named, found.notes))
        return replace(found, files=(replace(source, path=SPOOLED, here=os.fspath(path)),), notes=notes)

    return indexed


def is_paths(data: Corpus) -> bool:
    """Whether these are paths: one string, or strings of which one of the first is a path, or all are single words."""
    if isinstance(data, str | os.PathLike):
        return True
    if not isinstance(data, list | tuple | set | frozenset):
        return False
    first = list(islice(data, _LOOKED_AT))
    if not first or any(isinstance(item, os.PathLike) for item in first):
        return True
    if not all(isinstance(item, str) for item in first):
        return False
    # No row of training data is one word, or hardly any: it is a path, misspelt perhaps, or what stands for one.
    return any(map(_is_path, first)) or all(len(item.split()) <= 1 and item.isascii() for item in first)


def _is_path(text: str) -> bool:
    if len(text) > _LONGEST_PATH or "\n" in text or "\0" in text:
        return False
    # A text may end in the name of a file, and have a question mark.
    is_word = len(text.split()) <= 1
    return (
        text == STANDARD_INPUT
        or is_url(text)
        or os.path.lexists(text)
        or (is_word and kind_of(text) is not None)
        or (glob.has_magic(text) and (is_word or os.sep in text) and bool(glob.glob(text)))
    )


def rows_of(data: Any) -> Iterator[Any]:
    """The rows of a list, a table, a data set or anything that can be iterated over, one after the other.

    A dict is taken for columns. Raises GvendiError for what has no rows.
    """
    if isinstance(data, Mapping):
        return _rows_of_columns(data)
    # Told by what they can do, so that none of their packages is imported.
    if callable(getattr(data, "to_batches", None)):
        return _rows_of_batches(data.to_batches())
    if _is_of(data, "pyarrow") and hasattr(data, "to_pylist"):
        return _rows_of_batches([data])
    if _is_of(data, "pyarrow") and callable(getattr(data, "read_next_batch", None)):
        return _rows_of_batches(data)
    if _is_of(data, "pandas") and hasattr(data, "iloc") and hasattr(data, "columns"):
        return _rows_of_frame(data)
    if _is_of(data, "polars") and callable(getattr(data, "iter_rows", None)):
        return data.iter_rows(named=True)
    if isinstance(data, bytes | bytearray | memoryview):
        raise GvendiError(f"data is {_a(data)}; {_WANTED}")
    try:
        return iter(data)
    except TypeError as error:
        raise GvendiError(f"data is {_a(data)}, which cannot be iterated over; {_WANTED}") from error


def _rows_of_columns(columns: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    parts = {
        name: part
        for name, part in columns.items()
        if not isinstance(part, str | bytes) and hasattr(part, "__len__")
    }
    is_split = [hasattr(part, "column_names") or hasattr(part, "columns") for part in columns.values()]
    if columns and all(is_split):
        names = list(map(str, columns))
        raise GvendiError(
            f"data is {_a(columns)} of {len(names)} data sets ({', '.join(names)}); give one of them, such as "
            f"data[{names[0]!r}]"
        )
    if not columns or len(parts) < len(columns) or any(isinstance(part, Mapping) for part in parts.values()):
        raise GvendiError(
            f"data is one {type(columns).__name__} with the keys {', '.join(map(repr, islice(columns, 8)))}; wanted "
            "rows, or columns of one length: give [data] if it is a row"
        )
    lengths = {str(name): len(part) for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name!r} {length:,}" for name, length in lengths.items())
        raise GvendiError(f"data holds columns of different lengths ({shown}); wanted one of each row")
    return (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))


def _rows_of_frame(frame: Any) -> Iterator[dict[str, Any]]:
    names = list(map(str, frame.columns))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise GvendiError(f"data has two columns {twice!r}; rename one of them")
    for first in range(0, len(frame), _BLOCK):
        yield from frame.iloc[first : first + _BLOCK].to_dict("records")


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[Any]:
    import pyarrow

    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise GvendiError(f"data has two columns {twice!r}; rename one of them")
        for first in range(0, batch.num_rows, _BLOCK):
            block = batch.slice(first, _BLOCK)
            try:
                yield from block.to_pylist()
                continue
            except (ValueError, OverflowError, pyarrow.ArrowException):
                pass
            # A value that Python has not: the rows with one are those that cannot be had alone either.
            for row in range(block.num_rows):
                yield _arrow_row(block.slice(row, 1))


def _arrow_row(row: Any) -> Any:
    import pyarrow

    from gvendi_fast.data.arrow_values import spelled

    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return spelled(row).to_pylist()[0]


def spool(lines: Iterator[bytes], out: str | os.PathLike, limit: int | None = None) -> Path:
    """Write rows, each a line of JSON, to the run directory `out`, up to `limit` of them, and return the file.

    Rows that the directory records must be the first ones, unless the limit was higher then, which leaves the file as
    it is. What else a call that failed has left in the file counts for nothing.
    """
    root = place(out)
    if not os.fspath(out):
        raise GvendiError("the path of the run directory is empty; give a folder ('.' for the current one)")
    check_free(root)
    path = root / SPOOL
    recorded = _recorded_bytes(root)
    first = next(lines, None)
    if first is None:
        raise GvendiError(f"data holds no rows; {_WANTED}")
    make_folder(root)
    try:
        with atomic_write(path) as stream:
            known = open_file(path) if recorded and exists(path) else None
            try:
                _write(chain([first], lines), stream, known, recorded, limit, root)
            finally:
                if known is not None:
                    known.close()
    except _ShorterError:
        return path
    return path


class _ShorterError(Exception):
    """The limit leaves out rows that are in the file."""


def _write(
    lines: Iterator[bytes],
    stream: IO[bytes],
    known: IO[bytes] | None,
    recorded: int,
    limit: int | None,
    root: Path,
) -> None:
    """known: the rows of before, in its first `recorded` bytes."""
    count = 0
    for count, line in enumerate(islice(lines, limit), 1):
        if recorded > 0 and known is not None:
            before = known.readline()
            recorded -= len(before)
            if before and before != line:
                raise GvendiError(
                    f"run directory '{root}' was made from other rows: row {count:,} is another one now; give another "
                    "out, or the same rows, to which others may be appended"
                )
        stream.write(line)
    if recorded > 0 and known is not None and known.readline():
        if count == limit:
            raise _ShorterError
        raise GvendiError(
            f"run directory '{root}' was made from more than these {count:,} rows; give another out, or the same rows, "
            "to which others may be appended"
        )


def _recorded_bytes(root: Path) -> int:
    """How many bytes of rows a run directory records; 0 where it records no corpus yet."""
    units = root / "units.json"
    files = check_manifest(units, read_json(units)).get("files") if exists(units) else None
    if not files:
        return 0
    if files[0]["path"] != SPOOLED:
        raise GvendiError(
            f"run directory '{root}' was made from files, such as '{files[0]['path']}', not from rows; give "
            "another out, or those files"
        )
    return files[0].get("size", 0)


def _is_of(data: Any, package: str) -> bool:
    return any(kind.__module__.split(".")[0] == package for kind in type(data).__mro__)


def _a(data: Any) -> str:
    name = type(data).__name__
    return f"a{'n' * (name[0].lower() in 'aeiou')} {name}"
