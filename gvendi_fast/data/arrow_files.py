"""Arrow files and streams (.arrow, .feather), as `datasets` keeps them: read forward, one record batch at a time.

They have no checksums of their own, and a reader takes what they say of their buffers for true, so that each batch is
validated whole before anything of it is used. They are not mapped: a mapped file that is cut ends the process.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import is_url, open_file
from gvendi_fast.base.stand_ins import stand_in_at
from gvendi_fast.data.arrow_rows import BATCH_BYTES, BATCH_ROWS, first_line, records
from gvendi_fast.data.listing import SKIP, UnreadableFileError, check_file
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason
from gvendi_fast.data.tables import unreadable, usable_columns, wanted_columns
from gvendi_fast.data.unpacking import check_itself

_PIECE = 1 << 20
_FILE, _OLD = b"ARROW1", b"FEA1"
_END = b"\xff\xff\xff\xff\0\0\0\0"
# More rows than a file has: it is one group, whose bytes are one checksum.
_ALL = 1 << 62


class ArrowSource:
    """One Arrow file, read row by row with only the columns that `fields` names.

    max_bytes: of one row in these columns; a longer one gives a Reason in its place.
    For one thread at a time. Raises UnreadableFileError for a file that is not Arrow, or ambiguous.
    """

    def __init__(self, path: str, fields: Fields, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.path, self._max_bytes = path, max_bytes
        check_file(path)
        with naming(path), open_file(path) as stream:
            begin = stream.read(len(_FILE))
        if begin.startswith(_OLD):
            raise UnreadableFileError(
                f"corpus: '{path}' is of the first version of Feather; write it again with pyarrow.feather, or {SKIP}"
            )
        self._is_file = begin == _FILE
        # A stream may end without its mark, and one that is cut between two batches does.
        self.remarks = (
            [] if self._is_file or _has_end(path) else ["has no mark of its end: rows may be missing"]
        )
        self.group_rows = [_ALL]
        self._schema = next(self._read(None))
        self.present = list(self._schema.names)
        self.columns = wanted_columns(path, self._schema, fields)

    def __enter__(self) -> ArrowSource:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing stays open between two calls."""

    def usable(self, names: Iterable[str]) -> list[str]:
        """Those that are columns, one each, and nest no deeper than rows may."""
        return usable_columns(self._schema, names)

    def check(self, limit: int | None, look: Callable[[Any], None] | None = None) -> int:
        """How many rows there are, up to `limit`; UnreadableFileError where the columns in use of them are damaged."""
        rows = 0
        for batch in self._batches(self.columns or None):
            rows += batch.num_rows
            if look is not None and self.columns:
                look(batch)
            if limit is not None and rows >= limit:
                return limit
        return rows

    def rows(
        self, start: int = 0, columns: Iterable[str] | None = None
    ) -> Iterator[tuple[int, dict | Reason]]:
        """(1-based row number, record) from row `start` (0-based) on, as `ParquetSource.rows`."""
        names = self.columns if columns is None else self.usable(columns)
        number = 0
        for batch in self._batches(names or None):
            at_once = max(1, min(BATCH_ROWS, batch.num_rows * BATCH_BYTES // max(1, batch.nbytes)))
            for place in range(max(0, start - number), batch.num_rows, at_once):
                piece = batch.slice(place, at_once)
                for skip, record in enumerate(_records(piece.select(names), self._max_bytes), 1):
                    yield number + place + skip, record
            number += batch.num_rows

    def picked(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, batch of one row with all columns) of the rows with these ascending numbers, from 0."""
        first, wanted = 0, iter(numbers)
        number = next(wanted, None)
        for batch in self._batches(None):
            while number is not None and number < first + batch.num_rows:
                row = batch.slice(number - first, 1)
                row.validate(full=True)
                yield number, row
                number = next(wanted, None)
            if number is None:
                return
            first += batch.num_rows

    def fingerprint(self, rows: int, digest: Any) -> tuple[int, list[int]]:
        """Update `digest` with all of the file; (0, [its CRC-32]), as it is one group."""
        return 0, [self._sum(digest)]

    def footer_sum(self) -> int:
        """Of no bytes: a footer is in the group's checksum."""
        return 0

    def group_sum(self, index: int) -> int:
        """CRC-32 of the file as it is now."""
        return self._sum(None)

    def _sum(self, digest: Any) -> int:
        found = 0
        with open_file(self.path) as stream:
            while block := stream.read(_PIECE):
                found = zlib.crc32(block, found)
                if digest is not None:
                    digest.update(block)
        return found

    def _batches(self, names: Sequence[str] | None) -> Iterator[Any]:
        read = self._read(names)
        next(read)
        return read

    def _open(self) -> Any:
        import pyarrow

        return (
            pyarrow.PythonFile(open_file(self.path), "r") if is_url(self.path) else pyarrow.OSFile(self.path)
        )

    def _read(self, names: Sequence[str] | None) -> Iterator[Any]:
        """The schema, then the record batches. names: columns to read, None for all."""
        import pyarrow
        import pyarrow.ipc

        number = 0
        try:
            # Of a few columns, what the others hold is not unpacked.
            places = [self._schema.get_field_index(name) for name in names] if names else None
            options = pyarrow.ipc.IpcReadOptions(use_threads=False, included_fields=places)
            with naming(self.path), self._open() as file:
                open_ = pyarrow.ipc.open_file if self._is_file else pyarrow.ipc.open_stream
                reader = open_(file, options=options)
                # Names that are no UTF-8 are damage.
                list(reader.schema.names)
                yield reader.schema
                batches = (
                    map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else iter(reader)
                )
                for batch in batches:
                    batch.validate()
                    yield batch
                    number += batch.num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            # An error number is the system's; without one the content is not Arrow.
            if getattr(error, "errno", None) is not None:
                raise
            check_itself(self.path, stand_in_at(self.path))
            where = f"after row {number:,}: " if number else ""
            raise unreadable(self.path, "Arrow", where + first_line(error)) from error


def _has_end(path: str) -> bool:
    with naming(path), open_file(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - len(_END)))
        return stream.read() == _END


def _records(batch: Any, max_bytes: int) -> Iterable[dict | Reason]:
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        return (_record(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows))
    return records(batch, max_bytes)


def _record(row: Any, max_bytes: int) -> dict | Reason:
    """One row of a batch in which something is wrong."""
    import pyarrow

    try:
        row.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        what = first_line(error)
        # A text that is no UTF-8 is said as that of other files, by what reads it.
        if "UTF8" not in what and "UTF-8" not in what:
            return Reason(f"broken Arrow: {what}")
    return next(iter(records(row, max_bytes)))
