"""Parquet files: rows from any of them on, and checksums of the row groups that hold them."""

from __future__ import annotations

import os
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import IO, Any

from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import is_url, open_file, status_of
from gvendi_fast.base.stand_ins import stand_in_at
from gvendi_fast.data.arrow_rows import BATCH_BYTES, BATCH_ROWS, first_line, records
from gvendi_fast.data.listing import SKIP, UnreadableFileError, check_file
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason
from gvendi_fast.data.tables import unreadable, usable_columns, wanted_columns
from gvendi_fast.data.unpacking import check_itself

_PIECE = 1 << 20
# Path -> the state of the file whose row groups were checked.
_checked: dict[str, tuple[Any, ...]] = {}


def _check_row_groups(path: str, file: Any) -> None:
    """Read one row of every row group, once for a state of the file; raises pyarrow's OSError where one is damaged.

    Where what the footer says of a column contradicts itself, asking for it ends the process inside of pyarrow
    ("Definition level histogram size mismatch"); reading raises an error.
    """
    import pyarrow

    state = status_of(path)
    if _checked.get(path) == state:
        return
    for index in range(file.metadata.num_row_groups):
        try:
            next(file.iter_batches(1, [index], use_threads=False), None)
        except pyarrow.ArrowNotImplementedError:
            # A type that pyarrow does not read matters where its column is wanted.
            continue
    _checked[path] = state


class ParquetSource:
    """One Parquet file, read row by row with only the columns that `fields` names.

    max_bytes: of one row in these columns; a longer one gives a Reason in its place.
    For one thread at a time: give each a source of its own, as a `UnitReader` does.
    Raises UnreadableFileError for a file that is not Parquet, encrypted, or ambiguous (two columns of one name).
    """

    def __init__(self, path: str, fields: Fields, max_bytes: int = MAX_ROW_BYTES) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path, self._max_bytes, self.remarks = path, max_bytes, list[str]()
        check_file(path)
        try:
            with naming(path):
                self._file = pyarrow.parquet.ParquetFile(open_file(path) if is_url(path) else path)
                _check_row_groups(path, self._file)
            meta, schema = self._file.metadata, self._file.schema_arrow
            self.present = list(schema.names)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            # An error number is the system's; without one the content is not Parquet, or encrypted.
            if getattr(error, "errno", None) is not None:
                raise
            check_itself(path, stand_in_at(path))
            raise unreadable(path, "Parquet", first_line(error)) from error
        self.group_rows = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self.columns = wanted_columns(path, schema, fields)

    def __enter__(self) -> ParquetSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def groups_end(self, rows: int) -> int:
        """Byte offset after the row groups that hold the first `rows` rows."""
        end, seen = 0, 0
        for index, size in enumerate(self.group_rows):
            if seen >= rows:
                break
            seen += size
            end = max(end, self._group_range(index)[1])
        return end

    def _group_range(self, index: int) -> tuple[int, int]:
        """Its first byte and the one behind its last; (0, 0) of a row group without columns."""
        group, starts, ends = self._file.metadata.row_group(index), [], []
        for column in map(group.column, range(group.num_columns)):
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = min(start, column.dictionary_page_offset)
            starts.append(start)
            ends.append(start + column.total_compressed_size)
        return min(starts, default=0), max(ends, default=0)

    def fingerprint(self, rows: int, digest: Any) -> tuple[int, list[int]]:
        """Update `digest` with the bytes that hold the first `rows` rows, and with the footer.

        Returns the CRC-32 of the footer and of each row group that holds some of these rows, of the same bytes.
        """
        end = self.groups_end(rows)
        used = bisect_left([0, *accumulate(self.group_rows)], rows)
        ranges = [self._group_range(index) for index in range(used)]
        sums = [0] * used
        cuts = sorted({end, *(min(cut, end) for place in ranges for cut in place)})
        position = 0
        with open_file(self.path) as stream:
            for cut in cuts:
                # Usually one: row groups lie one behind the other.
                inside = [i for i, (first, last) in enumerate(ranges) if first <= position < last]
                while position < cut and (block := stream.read(min(cut - position, _PIECE))):
                    digest.update(block)
                    for index in inside:
                        sums[index] = zlib.crc32(block, sums[index])
                    position += len(block)
            footer = self._footer(stream)
        digest.update(footer)
        return zlib.crc32(footer), sums

    def footer_sum(self) -> int:
        """CRC-32 of the footer, as `fingerprint` gives it."""
        with open_file(self.path) as stream:
            return zlib.crc32(self._footer(stream))

    def group_sum(self, index: int) -> int:
        """CRC-32 of a row group, as `fingerprint` gives it."""
        position, end = self._group_range(index)
        found = 0
        with open_file(self.path) as stream:
            stream.seek(position)
            while position < end and (block := stream.read(min(end - position, _PIECE))):
                found = zlib.crc32(block, found)
                position += len(block)
        return found

    def _footer(self, stream: IO[bytes]) -> bytes:
        # The last 8 bytes give the length of the footer before them.
        end = stream.seek(-8, os.SEEK_END)
        stream.seek(end - int.from_bytes(stream.read(4), "little"))
        return stream.read()

    def usable(self, names: Iterable[str]) -> list[str]:
        """Those that are columns, one each, and nest no deeper than rows may."""
        return usable_columns(self._file.schema_arrow, names)

    def check(self, limit: int | None, look: Callable[[Any], None] | None = None) -> int:
        """Read the columns in use of the first `limit` rows, so that damage is found before the work is begun.

        Returns how many rows there are, up to `limit`. Raises UnreadableFileError where a page cannot be read.
        """
        total = sum(self.group_rows)
        total = total if limit is None else min(total, limit)
        used = list(range(bisect_left([0, *accumulate(self.group_rows)], total)))
        seen = 0
        if self.columns and used:
            for batch in self._batches(used, self.columns, seen):
                seen += batch.num_rows
                if look is not None:
                    look(batch)
        return total

    def rows(
        self, start: int = 0, columns: Iterable[str] | None = None
    ) -> Iterator[tuple[int, dict | Reason]]:
        """(1-based row number, record) from row `start` (0-based) on; opens at the row group that holds it.

        A cell that is not UTF-8 or that Python has no value for, and a row that is too long, give a Reason in place of
        the row. Raises UnreadableFileError where the file is damaged.
        """
        first, group = 0, 0
        while group < len(self.group_rows) and first + self.group_rows[group] <= start:
            first += self.group_rows[group]
            group += 1
        names = self.columns if columns is None else self.usable(columns)
        number = first
        for batch in self._batches(list(range(group, len(self.group_rows))), names, first):
            skip = min(max(start - number, 0), batch.num_rows)
            for record in records(batch.slice(skip), self._max_bytes):
                skip += 1
                yield number + skip, record
            number += batch.num_rows

    def picked(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, batch of one row with all columns) of the rows with these ascending numbers, from 0."""
        first = 0
        for group, count in enumerate(self.group_rows):
            if bisect_left(numbers, first) < bisect_left(numbers, first + count):
                number = first
                for batch in self._batches([group], None, first):
                    until = number + batch.num_rows
                    for wanted in numbers[bisect_left(numbers, number) : bisect_left(numbers, until)]:
                        yield wanted, batch.slice(wanted - number, 1)
                    number = until
            first += count

    def _batches(self, groups: list[int], names: Sequence[str] | None, first: int) -> Iterator[Any]:
        """Batches of row groups of which the first one begins with row `first`; names: None for all columns."""
        import pyarrow

        batches = self._file.iter_batches(self.batch_rows(groups, names), groups, names, use_threads=False)
        number = first
        while True:
            try:
                with naming(self.path):
                    batch = next(batches, None)
            except (OSError, pyarrow.ArrowException) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                raise UnreadableFileError(
                    f"corpus: '{self.path}' is damaged after row {number:,} ({first_line(error)}); replace the file, "
                    f"or {SKIP}"
                ) from error
            if batch is None:
                return
            yield batch
            number += batch.num_rows

    def batch_rows(self, groups: Sequence[int], names: Sequence[str] | None = None) -> int:
        """How many rows of these row groups to read at once, so that they take about 8 MB."""
        meta, most = self._file.metadata, 0.0
        for index in groups:
            group, rows = meta.row_group(index), max(1, self.group_rows[index])
            size = group.total_byte_size
            if size > rows * BATCH_BYTES / BATCH_ROWS and names is not None:
                columns = map(group.column, range(group.num_columns))
                size = sum(
                    c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names
                )
            most = max(most, size / rows)
        return int(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, most))))
