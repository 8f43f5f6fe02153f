"""A corpus as work units: one pass makes the manifest, after which any work unit can be read on its own.

rows.py says what a row is, sources.py how files are opened, work_units.py how a work unit is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Sequence

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.data.listing import UNREADABLE, Unreadable, find_files, kind_of, list_files
from gvendi_fast.data.pieces import Piece, Step
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason, Rejected, Row, decode_line, record_id
from gvendi_fast.data.sources import ParquetSource, read_lines
from gvendi_fast.data.unit_digests import groups_digest, groups_of, line_digest, shown
from gvendi_fast.data.work_units import Manifest, SourceFile, Unit, UnitReader, pack_duplicates, read_unit

__all__ = [
    "Fields",
    "Manifest",
    "Rejected",
    "Row",
    "SourceFile",
    "Unit",
    "UnitReader",
    "find_files",
    "index_corpus",
    "read_unit",
]

ROWS_PER_UNIT = 4096
_SQLITE_CACHE_KIB = 65536
# A character of a key by its number. An expression finds two bytes in a line in a third of the time that `in` takes.
_ESCAPED = re.compile(rb"\\u").search


def index_corpus(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    fields: Fields | None = None,
    rows_per_unit: int = ROWS_PER_UNIT,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    skip_unreadable: bool = False,
    plan: Callable[[Sequence[str]], Sequence[Step]] | None = None,
) -> Manifest:
    """Read the corpus once and cut it into work units.

    inputs: files, folders and globs as `find_files` takes them. A row is a line that is not empty, or a row of a
        Parquet file.
    fields: the names of a row's fields.
    limit: read the first `limit` rows only, over all files in order, whether they can be read or not.
    rows_per_unit: rows of a work unit, at most; a work unit never spans files.
    max_row_bytes: of a line, or of a Parquet row in the columns in use; a longer row is rejected.
    skip_unreadable: pass over files and folders that cannot be read, and list them in `Manifest.unreadable`.
    plan: which pieces of the files found are read, in order, in place of every file whole (`growth.py`).
    Of rows with the same id the first in input order counts, even if it is rejected for another reason. The ids seen
    are kept on disk as 16-byte digests, so memory does not grow with the rows (a work unit is one small object; a
    duplicate adds 16 bytes before compression).

    Raises GvendiError for inputs that do not exist or are not what their suffix says, an empty corpus, and a setting
    below 1, and OSError, with the file's name, for what the system cannot read.
    """
    fields = fields or Fields()
    for name, value in (
        ("rows_per_unit", rows_per_unit),
        ("limit", limit),
        ("max_row_bytes", max_row_bytes),
    ):
        if value is not None and value < 1:
            raise GvendiError(f"{name} is {value}; wanted at least 1")
    files: list[SourceFile] = []
    units: list[Unit] = []
    pieces: list[Piece] = []
    rows = duplicates = 0
    listing = list_files(inputs, skip_unreadable)
    unreadable = list(listing.unreadable)
    with _SeenIds() as seen:
        for step in map(Step, listing.files) if plan is None else plan(listing.files):
            path, rest = step.path, None if limit is None else limit - rows
            if step.file is None and rest == 0:
                break
            if step.is_rest and (rest == 0 or not files[step.file].cut):
                continue
            number = len(files) if step.file is None else step.file
            try:
                with naming(path):
                    index = _FileIndex(path, number, rows, len(units), rows_per_unit, seen, max_row_bytes)
                    index.scan(fields, rest if step.rows is None else step.rows, step.first, plan is not None)
            except UNREADABLE as error:
                if not skip_unreadable or step.file is not None:
                    raise
                unreadable.append(Unreadable.of(error, path))
                seen.forget(number)
                continue
            whole = step.first + index.rows, index.digest.hexdigest()
            name = step.recorded_as or path
            files[number:] = [
                SourceFile(
                    name, index.kind, index.size, *whole, None if name == path else path, index.is_cut
                ),
                *files[number + 1 :],
            ]
            pieces.append(Piece(number, step.first, index.rows))
            units.extend(index.units)
            rows += index.rows
            duplicates += index.duplicates
    if not files:
        first = unreadable[0]
        raise GvendiError(
            f"corpus: none of its {len(unreadable)} file(s) and folder(s) can be read; the first one is "
            f"'{first.path}': {first.reason}"
        )
    if rows == 0:
        raise GvendiError(
            f"corpus: the {len(files)} file(s) given hold no rows; the first one is '{files[0].path}'"
        )
    return Manifest(
        tuple(files),
        tuple(units),
        fields,
        rows,
        duplicates,
        rows_per_unit,
        limit,
        max_row_bytes,
        tuple(unreadable),
        listing.notes,
        pieces=tuple(pieces),
    )


class _FileIndex:
    """The pass over one file: counts rows, fingerprints bytes, and ends a work unit every `rows_per_unit` rows."""

    def __init__(
        self,
        path: str,
        file: int,
        first_row: int,
        first_unit: int,
        rows_per_unit: int,
        seen: _SeenIds,
        max_bytes: int,
    ) -> None:
        self.path, self.file, self.kind = path, file, kind_of(path) or ""
        self.size = os.path.getsize(path)
        self.digest = hashlib.blake2b(digest_size=16)
        self.rows = self.duplicates = 0
        # Whether there are rows behind those that were asked for.
        self.is_cut = False
        self.units: list[Unit] = []
        self._first_row, self._first_unit, self._per_unit, self._seen = (
            first_row,
            first_unit,
            rows_per_unit,
            seen,
        )
        self._max_bytes = max_bytes
        # Line and offset of the first row of the unit that is open, and the rows with which it ends.
        self._open: tuple[int, int] | None = None
        self._until = 0
        self._repeats: list[tuple[int, int, int]] = []
        self._lines = self._footer = 0
        self._groups: list[int] = []
        self._group_rows: list[int] = []

    def scan(self, fields: Fields, limit: int | None, first: int = 0, looks_on: bool = False) -> None:
        """Up to `limit` rows from row `first` (from 0) on; `looks_on` tells whether there are more."""
        if self.kind == "parquet":
            self._scan_parquet(fields, limit, first)
        else:
            self._scan_lines(fields, limit, first, looks_on)
        if self._open is not None:
            self._close_unit()

    def _scan_lines(self, fields: Fields, limit: int | None, first: int, looks_on: bool) -> None:
        before = self.digest.copy()
        # Most lines without an id need no parsing: its key is absent unless spelled plainly or with \u escapes.
        plain = f'"{fields.id}"'.encode() if fields.id.isidentifier() else b""
        for line, offset, raw in read_lines(
            self.path, self.kind, digest=self.digest, max_bytes=self._max_bytes
        ):
            if first:
                first -= 1
                before = before if first else self.digest.copy()
                continue
            if self.rows == limit:
                self.is_cut, self.digest = True, before
                return
            own = None
            if type(raw) is bytes and (plain in raw or _ESCAPED(raw)):
                record = decode_line(raw)
                own = None if isinstance(record, Reason) else record_id(record, fields)
            self._lines = line_digest(self._lines, line, raw)
            self._take(line, offset, own)
            # Stops before the next line is read, whose bytes would enter the fingerprint.
            if self.rows == limit:
                if not looks_on:
                    return
                before = self.digest.copy()

    def _scan_parquet(self, fields: Fields, limit: int | None, first: int) -> None:
        with ParquetSource(self.path, fields, self._max_bytes) as source:
            whole = sum(source.group_rows)
            total = whole if limit is None else min(whole, first + limit)
            self.is_cut = total < whole
            self._footer, self._groups = source.fingerprint(total, self.digest)
            self._group_rows = source.group_rows
            if fields.id not in source.columns:
                for number in range(first + 1, total + 1):
                    self._take(number, 0, None)
                return
            for number, record in source.rows(columns=[fields.id]):
                if number > total:
                    return
                if number <= first:
                    continue
                self._take(number, 0, None if isinstance(record, Reason) else record_id(record, fields))

    def _take(self, line: int, offset: int, own: str | Reason | None) -> None:
        if self._open is None:
            self._open = line, offset
            self._until = self.rows + self._per_unit
        if own is not None and not isinstance(own, Reason):
            first = self._seen.first(own, self.file, line)
            if first is not None:
                self._repeats.append((self.rows % self._per_unit, *first))
        self.rows += 1
        if self.rows == self._until:
            self._close_unit()

    def _close_unit(self) -> None:
        rows = (self.rows - 1) % self._per_unit + 1
        ordinal, first_row = self._first_unit + len(self.units), self._first_row + self.rows - rows
        repeats = pack_duplicates(self._repeats)
        digest = shown(self._lines)
        if self.kind == "parquet":
            groups = groups_of(self._group_rows, self._open[0] - 1, rows)
            digest = groups_digest(self._footer, [self._groups[group] for group in groups])
        self.units.append(Unit(ordinal, self.file, first_row, rows, *self._open, repeats, digest))
        self.duplicates += len(self._repeats)
        self._open, self._repeats, self._lines = None, [], 0


class _SeenIds:
    """Where each id occurred first, in a private temporary database that the system removes with the process."""

    def __enter__(self) -> _SeenIds:
        # An empty name makes SQLite use a temporary file that is unlinked at once.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(f"PRAGMA cache_size=-{_SQLITE_CACHE_KIB}")
        self._db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, file INT, line INT) WITHOUT ROWID")
        self._db.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def first(self, own: str, file: int, line: int) -> tuple[int, int] | None:
        """(file, line) of the earlier row with this id, None when this one is the first."""
        key = hashlib.blake2b(own.encode(), digest_size=16).digest()
        try:
            if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (key, file, line)).rowcount:
                return None
        except sqlite3.OperationalError as error:
            raise GvendiError(
                f"corpus: the table of ids seen cannot be written to the temporary folder ({error}); it needs about 40 "
                "bytes per row: set SQLITE_TMPDIR to a folder with enough space"
            ) from error
        return self._db.execute("SELECT file, line FROM seen WHERE id = ?", (key,)).fetchone()

    def forget(self, file: int) -> None:
        """Drop the ids of a file that turned out to be unreadable, so that none of its rows counts as the first."""
        self._db.execute("DELETE FROM seen WHERE file = ?", (file,))
