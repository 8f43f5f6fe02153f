"""The rows of a corpus' files by their kind: text, given row by row as JSON, or tables, given as records.

fsspec reads what lies at URLs (base/urls.py). For files of this machine its globs take hidden files and give absolute
paths, which a run directory's manifest would then hold, and before Python 3.14 it unpacks zstd with one more package
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.os_errors import naming
from gvendi_fast.data.kinds import format_of, is_table
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason, decode_line
from gvendi_fast.data.shapes import FIRST_ROWS, all_columns, outline

if TYPE_CHECKING:
    from gvendi_fast.data.tables import Table

# Bytes of the lines by which a shape is recognised, at most, and one line.
_FIRST_BYTES = 1 << 22
_DELIMITERS = {"csv": ",", "tsv": "\t"}


def open_table(path: str, kind: str, fields: Fields, max_bytes: int = MAX_ROW_BYTES) -> Table:
    """A file of a kind that is a table. Raises UnreadableFileError where it cannot be read as one."""
    # What reads a kind is loaded with the first file of it.
    if kind == "parquet":
        from gvendi_fast.data.parquet import ParquetSource

        return ParquetSource(path, fields, max_bytes)
    from gvendi_fast.data.arrow_files import ArrowSource

    return ArrowSource(path, fields, max_bytes)


def records_of_file(path: str, kind: str, fields: Fields) -> Iterator[tuple[int, dict | Reason]]:
    """(number as `read_lines` has it, record) of every row of a file, a table's with the columns of `fields` only."""
    if is_table(kind):
        with open_table(path, kind, fields) as table:
            yield from table.rows()
        return
    for line, _, raw in read_lines(path, kind):
        yield line, raw if isinstance(raw, Reason) else decode_line(raw)


def first_records(
    path: str, kind: str, fields: Fields, count: int = FIRST_ROWS, max_bytes: int = MAX_ROW_BYTES
) -> tuple[list[dict], list[str]]:
    """Outlines of the readable ones of a file's first `count` records, and names of columns.

    Raises as `read_lines` and `open_table` do.
    """
    if is_table(kind):
        with open_table(path, kind, fields, max_bytes) as source:
            records = (record for _, record in islice(source.rows(columns=all_columns(fields)), count))
            return _outlines(records, fields), source.present
    return _outlines(map(decode_line, _first_lines(path, kind, count, max_bytes)), fields), []


def _first_lines(path: str, kind: str, count: int, max_bytes: int) -> Iterator[bytes]:
    size = 0
    for _, _, raw in islice(read_lines(path, kind, max_bytes=max_bytes), count):
        if not isinstance(raw, Reason):
            yield raw
            size += len(raw)
        if size > _FIRST_BYTES:
            return


def _outlines(records: Iterable[dict | Reason], fields: Fields) -> list[dict]:
    """One record is held at a time: a row may take 300 times its bytes."""
    return [outline(record, fields) for record in records if not isinstance(record, Reason)]


def can_start_at(kind: str) -> bool:
    """Whether reading can begin at any row; otherwise what is before it is read, too."""
    return kind in ("jsonl", "parquet")


def read_lines(
    path: str,
    kind: str,
    offset: int = 0,
    line: int = 1,
    digest: Any = None,
    max_bytes: int = MAX_ROW_BYTES,
    remarks: list[str] | None = None,
    together: int = 0,
) -> Iterator[tuple[int, int, Any]]:
    """(number, byte offset, row as JSON) of every row of a text that is not empty.

    The number is that of the row's line, or, where JSON has no row a line, of the row, from 1.
    offset, line: where to begin in JSON lines, if not at the beginning: line `line` begins at this byte.
    digest: updated with every byte of JSON lines that is read, with the rows of other texts, if given.
    max_bytes: of one row, without a line's end; a longer one gives a Reason in its place, and is never held in memory.
    together: how many rows of JSON lines, from where it begins, may come as `Lines` in place of one row.
    remarks: gets sentences on what is odd about the file ("corpus: 'path' ..."), if given.
    A file that is damaged or ends too early gives every row before that, then a `Damage`, and ends there. Raises
    UnreadableFileError for what is no text of this kind and an archive that asks for too much memory, and OSError, with
    the file's name, where the system cannot read.
    """
    from gvendi_fast.data.csv_rows import csv_rows
    from gvendi_fast.data.json_lines import json_lines
    from gvendi_fast.data.json_values import json_values, layout_of
    from gvendi_fast.data.unpacking import Text

    form = format_of(kind)
    with naming(path), Text(path, kind, remarks) as text:
        if form in _DELIMITERS:
            yield from csv_rows(text, _DELIMITERS[form], digest, max_bytes)
        elif (layout := layout_of(text, kind, form == "json")) is not None:
            yield from json_values(text, layout, digest, max_bytes)
        else:
            yield from json_lines(text, offset, line, digest, max_bytes, together)
