"""Finding a corpus' files and reading their records one after another, compressed or not.

fsspec was considered, and is what a corpus in an object store will need: for local files its globs take hidden files
and give absolute paths, which a run directory's manifest would then hold, and before Python 3.14 it reads zstd
with one more package only.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Fields, Reason, lone_surrogate

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".ndjson.zst": "jsonl.zst",
    ".parquet": "parquet",
}
_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 256
_BLOCK = 1 << 20


def kind_of(path: str) -> str | None:
    """ "jsonl", "jsonl.gz", "jsonl.zst" or "parquet" by the file's suffix, None for any other suffix."""
    name = os.path.basename(path).lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def find_files(inputs: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The files of a corpus, in the order of `inputs`.

    An input is a file, a folder (every file below it with a known suffix, hidden ones left out, sorted by path) or a
    glob (`**` goes into folders; its matches sorted; a folder it matches is taken as a folder). A file that is
    named twice is read once, where it is named first.

    Raises GvendiError for a path that does not exist, a glob or folder without a file, and an unknown suffix.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not given:
        raise GvendiError("corpus: no input was given; name a file, a folder or a glob")
    paths: dict[str, str] = {}
    for item in map(os.fspath, given):
        for path in _expand(item):
            paths.setdefault(os.path.abspath(path), path)
    for path in paths.values():
        if lone_surrogate(path):
            raise GvendiError(f"corpus: the file name {path!r} is not UTF-8; rename the file")
    return list(paths.values())


def short_names(paths: Sequence[str]) -> list[str]:
    """Each path relative to the lowest folder that holds all of them, so that the folder's own place is not shown."""
    if not paths:
        return []
    whole = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [Path(path).relative_to(folder).as_posix() for path in whole]


def _expand(item: str) -> list[str]:
    if os.path.isdir(item):
        # Its files hold accepted rows, rejected ones and settings side by side.
        if os.path.isfile(os.path.join(item, "events.jsonl")) and os.path.isfile(
            os.path.join(item, "rejected.jsonl")
        ):
            raise GvendiError(
                f"corpus: '{item}' is the directory of a synthesis run; name its accepted.jsonl and the files of its "
                "seeds"
            )
        return _folder(item)
    if os.path.exists(item):
        if kind_of(item) is None:
            raise GvendiError(f"corpus: '{item}' has an unknown suffix; wanted {', '.join(SUFFIXES)}")
        return [item]
    if not glob.has_magic(item):
        raise GvendiError(f"corpus: '{item}' does not exist")
    matches = sorted(glob.glob(item, recursive=True))
    if not matches:
        raise GvendiError(f"corpus: the glob '{item}' matches nothing")
    # A pattern such as data/* also matches read-me files, which are passed over, but one file must remain.
    paths = [path for path in matches if os.path.isfile(path) and kind_of(path) is not None]
    for path in filter(os.path.isdir, matches):
        paths.extend(_walk(path))
    if not paths:
        raise GvendiError(f"corpus: the glob '{item}' matches no file with a suffix of {', '.join(SUFFIXES)}")
    return sorted(paths)


def _folder(folder: str) -> list[str]:
    paths = sorted(_walk(folder))
    if not paths:
        raise GvendiError(
            f"corpus: the folder '{folder}' holds no file with a suffix of {', '.join(SUFFIXES)}"
        )
    return paths


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and kind_of(name) is not None:
                yield os.path.join(parent, name)


def _open_lines(path: str, kind: str) -> IO[bytes]:
    if kind == "jsonl.gz":
        return gzip.open(path, "rb")
    if kind == "jsonl.zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path, "rb"), "zstd"), 1 << 17)
    return open(path, "rb", buffering=1 << 17)


def read_lines(
    path: str, kind: str, offset: int = 0, line: int = 1, digest: Any = None
) -> Iterator[tuple[int, int, bytes | Reason]]:
    """(line number, byte offset, line) of every line that is not empty, from `offset`, where line `line` begins.

    `digest`, if given, is updated with every byte read. An archive that is damaged or ends too early gives a Reason
    in place of the line that could not be read, and ends there.
    """
    with _open_lines(path, kind) as stream:
        if offset:
            stream.seek(offset)
        while True:
            try:
                raw = stream.readline()
            except (EOFError, zlib.error, OSError) as error:
                # An error number means that the disk failed; without one the archive is damaged.
                if kind == "jsonl" or getattr(error, "errno", None) is not None:
                    raise
                yield line, offset, Reason(f"damaged archive: {error}")
                return
            if not raw:
                return
            if digest is not None:
                digest.update(raw)
            content = raw.removeprefix(_BOM) if line == 1 else raw
            if content.strip():
                yield line, offset, content.rstrip(b"\r\n")
            offset += len(raw)
            line += 1


class ParquetSource:
    """One Parquet file, read row by row with only the columns that `fields` names."""

    def __init__(self, path: str, fields: Fields) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise GvendiError(f"corpus: '{path}' is not a readable Parquet file ({error})") from error
        meta = self._file.metadata
        self.group_rows = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
        present = set(self._file.schema_arrow.names)
        wanted = [fields.prompt, fields.completion, fields.messages, fields.text, fields.id]
        if fields.by is not None:
            wanted.append(fields.by if fields.by in present else fields.by.split(".")[0])
        self.columns = [name for name in dict.fromkeys(wanted) if name in present]

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
        with open(self.path, "rb") as stream:
            for cut in cuts:
                # Usually one: row groups lie one behind the other.
                inside = [i for i, (first, last) in enumerate(ranges) if first <= position < last]
                while position < cut and (block := stream.read(min(cut - position, _BLOCK))):
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
            while position < end and (block := stream.read(min(end - position, _BLOCK))):
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

        A cell that is not UTF-8 gives a Reason in place of its row. Raises GvendiError where the file is damaged.
        """
        first, group = 0, 0
        while group < len(self.group_rows) and first + self.group_rows[group] <= start:
            first += self.group_rows[group]
            group += 1
        names = self.columns if columns is None else [name for name in columns if name in self.columns]
        groups = range(group, len(self.group_rows))
        batches = self._file.iter_batches(_PARQUET_BATCH, list(groups), names, use_threads=False)
        number = first
        while True:
            try:
                batch = next(batches, None)
            except OSError as error:
                raise GvendiError(
                    f"corpus: '{self.path}' is damaged after row {number} ({error}); replace the file"
                ) from error
            if batch is None:
                return
            skip = min(max(start - number, 0), batch.num_rows)
            for record in _records(batch.slice(skip)):
                skip += 1
                yield number + skip, record
            number += batch.num_rows


def _records(batch: Any) -> Iterable[dict | Reason]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Only the rows that hold the broken bytes are lost, so this batch is read again one by one.
        return [_record(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _record(batch: Any) -> dict | Reason:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Reason(f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}")
