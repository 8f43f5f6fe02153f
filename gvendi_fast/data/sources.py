"""Reading the records of a corpus' files one after another, compressed or not; listing.py finds the files.

fsspec was considered, and is what a corpus in an object store will need: for local files its globs take hidden files
and give absolute paths, which a run directory's manifest would then hold, and before Python 3.14 it reads zstd
with one more package only.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import IO, Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.stand_ins import stand_in, stand_in_at
from gvendi_fast.data.arrow_values import is_plain, plain
from gvendi_fast.data.listing import SKIP, UnreadableFileError, check_file
from gvendi_fast.data.records import Unread
from gvendi_fast.data.rows import MAX_DEPTH, MAX_ROW_BYTES, Fields, Reason, decode_line
from gvendi_fast.data.shapes import FIRST_ROWS, all_columns, columns_of, outline

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PIECE = 1 << 20
# What packed files begin with, whatever their names say -> the suffix that names them.
_PACKED = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": None,
    b"\xfd7zXZ\0": None,
    b"PAR1": ".parquet",
}
# How zstd refuses a frame whose window is larger than 2^27 bytes, before it takes memory.
_WINDOW = "requires too much memory"
# Rows of Parquet at a time, at most, and about how many bytes of them.
_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 23
# Bytes of the lines by which a shape is recognised, at most, and one line.
_FIRST_BYTES = 1 << 22


def _open_lines(path: str, kind: str, is_begun: bool) -> IO[bytes]:
    check_file(path)
    if not is_begun:
        _check_itself(path, stand_in_at(path))
    if kind == "jsonl.gz":
        return gzip.open(path, "rb")
    if kind == "jsonl.zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path, "rb"), "zstd"), 1 << 17)
    return open(path, "rb", buffering=1 << 17)


def read_lines(
    path: str,
    kind: str,
    offset: int = 0,
    line: int = 1,
    digest: Any = None,
    max_bytes: int = MAX_ROW_BYTES,
) -> Iterator[tuple[int, int, bytes | Reason]]:
    """(line number, byte offset, line) of every line that is not empty, from `offset`, where line `line` begins.

    digest: updated with every byte read, if given.
    max_bytes: of one line, without its end; a longer one gives a Reason in its place, and is never held in memory.
    An archive that is damaged or ends too early gives a Reason in place of the line that could not be read, and ends
    there. Raises UnreadableFileError for UTF-16, a first line of another format, and an archive that asks for too much
    memory, and OSError, with the file's name, where the system cannot read.
    """
    with naming(path), _open_lines(path, kind, offset > 0) as stream:
        if offset:
            stream.seek(offset)
        readline, update = stream.readline, None if digest is None else digest.update
        # Space for a line's end, so that a line which fills what is read is too long; the first may have a mark, too.
        most = max_bytes + 2 + (len(_BOM) if line == 1 else 0)
        while True:
            try:
                raw = readline(most)
                size = len(raw)
                if update is not None:
                    update(raw)
                if size <= max_bytes and line != 1:
                    # Nearly every line: it is whole, and cannot be too long.
                    is_blank, content = raw.isspace(), raw.rstrip(b"\r\n")
                else:
                    content = raw.removeprefix(_BOM) if line == 1 else raw
                    mark = size - len(content)
                    is_blank, content = not content.strip(), content.rstrip(b"\r\n")
                    if size == most and raw[-1:] != b"\n":
                        end = raw[-2:]
                        del raw, content
                        rest, end, is_blank = _skip_line(stream, digest, end, is_blank)
                        size += rest
                        content = _too_long(size - mark - len(end) + len(end.rstrip(b"\r\n")), max_bytes)
                    elif len(content) > max_bytes:
                        content = _too_long(len(content), max_bytes)
                    most = max_bytes + 2
            except (EOFError, zlib.error, OSError) as error:
                # An error number means that the disk failed; without one the archive is damaged.
                if kind == "jsonl" or getattr(error, "errno", None) is not None:
                    raise
                if _WINDOW in str(error):
                    raise UnreadableFileError(
                        f"corpus: '{path}' was packed with a window of more than 128 MB, which unpacking would hold in "
                        "memory; pack it again with one that is smaller: zstd -d --long=31 -c FILE | zstd; "
                        f"{SKIP}"
                    ) from error
                yield line, offset, Reason(f"damaged archive: {error}")
                return
            if not size:
                return
            if line == 1 and isinstance(content, bytes):
                if content.startswith(_UTF16):
                    raise UnreadableFileError(
                        f"corpus: '{path}' is UTF-16; convert it to UTF-8, as iconv -f UTF-16 -t UTF-8 does"
                    )
                # What an archive holds; the file itself has been looked at.
                _check_itself(path, stand_in(content) or _no_lines(content))
            if not is_blank:
                yield line, offset, content
            offset += size
            line += 1


def _no_lines(first: bytes) -> str | None:
    """What a file with this first line is in the place of JSON lines, with the remedy; None where a row may be lost."""
    for start, suffix in _PACKED.items():
        if first.startswith(start):
            return f"packed: {f'name it {suffix}' if suffix else 'unpack it'}"
    if re.match(rb"\s*\[\s*(?:\{|$)", first):
        return "a JSON array where rows should be: write one object a line, as jq -c '.[]' does"
    if first.strip() == b"{":
        return "JSON over several lines, not JSON lines: write one object a line, as jq -c . does"
    return None


def _check_itself(path: str, what: str | None) -> None:
    if what is not None:
        raise UnreadableFileError(f"corpus: '{path}' is {what}, or {SKIP}")


def _too_long(size: int, max_bytes: int) -> Reason:
    return Reason(f"too long: {size:,} bytes, --max-row-bytes is {max_bytes:,}")


def _skip_line(stream: IO[bytes], digest: Any, end: bytes, is_blank: bool) -> tuple[int, bytes, bool]:
    """Read to the end of a line without keeping it: its bytes, the last two, and whether all are white space."""
    size = 0
    while piece := stream.readline(_PIECE):
        size += len(piece)
        end = (end + piece[-2:])[-2:]
        is_blank = is_blank and not piece.strip()
        if digest is not None:
            digest.update(piece)
        if end.endswith(b"\n"):
            break
    return size, end, is_blank


# Path -> the state of the file whose row groups were checked.
_checked: dict[str, tuple[int, ...]] = {}


def _check_row_groups(path: str, file: Any) -> None:
    """Read one row of every row group, once for a state of the file; raises pyarrow's OSError where one is damaged.

    Where what the footer says of a column contradicts itself, asking for it ends the process inside of pyarrow
    ("Definition level histogram size mismatch"); reading raises an error.
    """
    import pyarrow

    found = os.stat(path)
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
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

        self.path, self._max_bytes = path, max_bytes
        check_file(path)
        try:
            with naming(path):
                self._file = pyarrow.parquet.ParquetFile(path)
                _check_row_groups(path, self._file)
            meta, schema = self._file.metadata, self._file.schema_arrow
            present = list(schema.names)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            # An error number is the system's; without one the content is not Parquet, or encrypted.
            if getattr(error, "errno", None) is not None:
                raise
            _check_itself(path, stand_in_at(path))
            raise UnreadableFileError(
                f"corpus: '{path}' is not a readable Parquet file ({_first_line(error)}); fetch or write it "
                f"again, or {SKIP}"
            ) from error
        self.group_rows = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        self.present, self._schema = present, schema
        wanted = [*columns_of(fields), fields.id]
        if fields.by is not None:
            wanted.append(fields.by if fields.by in present else fields.by.split(".")[0])
        self.columns = [name for name in dict.fromkeys(wanted) if name in present]
        for name in self.columns:
            if present.count(name) > 1:
                raise UnreadableFileError(
                    f"corpus: '{path}' has {present.count(name)} columns '{name}'; keep one"
                )
            if _depth(schema.field(name).type) > MAX_DEPTH:
                raise UnreadableFileError(
                    f"corpus: column '{name}' of '{path}' nests more than {MAX_DEPTH} levels deep; flatten it"
                )

    def __enter__(self) -> ParquetSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def usable(self, names: Iterable[str]) -> list[str]:
        """Those that are columns, one each, and nest no deeper than rows may."""
        return [
            name
            for name in names
            if self.present.count(name) == 1 and _depth(self._schema.field(name).type) <= MAX_DEPTH
        ]

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
        with open(self.path, "rb") as stream:
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
        with open(self.path, "rb") as stream:
            return zlib.crc32(self._footer(stream))

    def group_sum(self, index: int) -> int:
        """CRC-32 of a row group, as `fingerprint` gives it."""
        position, end = self._group_range(index)
        found = 0
        with open(self.path, "rb") as stream:
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

    def rows(
        self, start: int = 0, columns: Iterable[str] | None = None
    ) -> Iterator[tuple[int, dict | Reason]]:
        """(1-based row number, record) from row `start` (0-based) on; opens at the row group that holds it.

        A cell that is not UTF-8 or that Python has no value for gives an Unread in its place, and a row that is too
        long a Reason in place of the row. Raises GvendiError where the file is damaged.
        """
        import pyarrow

        first, group = 0, 0
        while group < len(self.group_rows) and first + self.group_rows[group] <= start:
            first += self.group_rows[group]
            group += 1
        names = self.columns if columns is None else self.usable(columns)
        groups = list(range(group, len(self.group_rows)))
        at_once = self.batch_rows(groups, names)
        batches = self._file.iter_batches(at_once, groups, names, use_threads=False)
        number, as_it_is = first, None
        while True:
            try:
                with naming(self.path):
                    batch = next(batches, None)
            except (OSError, pyarrow.ArrowException) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                raise GvendiError(
                    f"corpus: '{self.path}' is damaged after row {number} ({_first_line(error)}); replace the file"
                ) from error
            if batch is None:
                return
            skip = min(max(start - number, 0), batch.num_rows)
            as_it_is = is_plain(batch.schema) if as_it_is is None else as_it_is
            for record in _records(batch.slice(skip), self._max_bytes, as_it_is):
                skip += 1
                yield number + skip, record
            number += batch.num_rows

    def batch_rows(self, groups: Sequence[int], names: Sequence[str] | None = None) -> int:
        """How many rows of these row groups to read at once, so that they take about 8 MB."""
        meta, most = self._file.metadata, 0.0
        for index in groups:
            group, rows = meta.row_group(index), max(1, self.group_rows[index])
            size = group.total_byte_size
            if size > rows * _BATCH_BYTES / _BATCH_ROWS and names is not None:
                columns = map(group.column, range(group.num_columns))
                size = sum(
                    c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names
                )
            most = max(most, size / rows)
        return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, most))))


def first_records(
    path: str, kind: str, fields: Fields, count: int = FIRST_ROWS, max_bytes: int = MAX_ROW_BYTES
) -> tuple[list[dict], list[str]]:
    """Outlines of the readable ones of a file's first `count` records, and names of columns.

    Raises as `read_lines` and `ParquetSource` do.
    """
    if kind == "parquet":
        with ParquetSource(path, fields, max_bytes) as source:
            names = source.usable(all_columns(fields))
            records = (record for _, record in islice(source.rows(columns=names), count))
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


def _records(batch: Any, max_bytes: int, as_it_is: bool) -> Iterable[dict | Reason]:
    import pyarrow

    if _at_most(batch) > max_bytes:
        return (_record(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows))
    try:
        return (batch if as_it_is else plain(batch)).to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        # Only the rows that hold the bad cells are lost, so this batch is read again one by one.
        return [_record(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows)]


def _record(row: Any, max_bytes: int) -> dict | Reason:
    import pyarrow

    size = _at_most(row)
    if size > max_bytes:
        return _too_long(size, max_bytes)
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record.update(plain(row.select([name])).to_pylist()[0])
        except UnicodeDecodeError as error:
            record[name] = Unread(
                Reason(f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}")
            )
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            record[name] = Unread(
                Reason(f"field '{name}' ({column.type}) has a value beyond Python's: {_first_line(error)}")
            )
    return record


def _at_most(batch: Any) -> int:
    """Bytes of a batch's rows, at most: `nbytes` counts a dictionary once, however many rows repeat its values."""
    import pyarrow.types as types

    size = 0
    for column in batch.columns:
        if types.is_dictionary(column.type):
            column = column.dictionary_decode() if len(column) == 1 else column
            size += column.nbytes * (len(column) if types.is_dictionary(column.type) else 1)
        elif types.is_string_view(column.type) or types.is_binary_view(column.type):
            # The bytes of a view's values, which its slices share, can only be told from a copy.
            size += column.cast(
                "large_binary" if types.is_binary_view(column.type) else "large_string"
            ).nbytes
        else:
            size += column.nbytes
    return size


def _depth(kind: Any) -> int:
    """How many levels an Arrow type nests."""
    depth, level = 0, [kind]
    while level:
        depth += 1
        level = [type_.field(index).type for type_ in level for index in range(type_.num_fields)]
    return depth


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
