"""A corpus as work units: one pass makes the manifest, after which any work unit can be read on its own.

rows.py says what a row is, sources.py how files are opened, work_units.py how a work unit is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import size_of
from gvendi_fast.data.kinds import STANDARD_INPUT, is_table, kind_of
from gvendi_fast.data.lines import Lines
from gvendi_fast.data.listing import UNREADABLE, Unreadable, find_files, list_files
from gvendi_fast.data.pieces import Piece, Step
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason, Rejected, Row, decode_line, record_id
from gvendi_fast.data.shapes import FIRST_ROWS, Recognised, check_format, recognise
from gvendi_fast.data.sources import first_records, open_table, read_lines
from gvendi_fast.data.standard_input import kind_of_input, named, spooled
from gvendi_fast.data.unit_digests import groups_digest, groups_of, line_digest, shown
from gvendi_fast.data.unpacking import Damage
from gvendi_fast.data.work_units import Manifest, SourceFile, Unit, UnitReader, pack_duplicates, read_unit

if TYPE_CHECKING:
    from gvendi_fast.data.hub_data import HubRows

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
# Of ids that are held in memory: bytes of all, and of one beside its text.
_IDS_BYTES, _ENTRY_BYTES = 1 << 26, 150
# A place is a file's number and, in these bits, a line's.
_LINE_BITS = 40


def index_corpus(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    fields: Fields | None = None,
    rows_per_unit: int = ROWS_PER_UNIT,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    skip_unreadable: bool = False,
    plan: Callable[[Sequence[str]], Sequence[Step]] | None = None,
    hub: HubRows | None = None,
) -> Manifest:
    """Read the corpus once and cut it into work units.

    inputs: files, folders, globs, "-" and data sets of the hub as `list_files` takes them. A row is a line that is not
        empty, an item of a JSON array, a record of CSV, or a row of a table.
    fields: the names of a row's fields, and the shape of rows; "auto" is recognised from the first rows of the first
        file that has one to read.
    limit: read the first `limit` rows only, over all files in order, whether they can be read or not.
    rows_per_unit: rows of a work unit, at most; a work unit never spans files.
    max_row_bytes: of a row as text, or in the columns in use of a table; a longer row is rejected.
    skip_unreadable: pass over files and folders that cannot be read, and list them in `Manifest.unreadable`.
    plan: which pieces of the files found are read, in order, in place of every file whole (`growth.py`).
    hub: where rows of the hub are kept; None: in a temporary folder.
    Of rows with the same id the first in input order counts, even if it is rejected for another reason. The ids seen
    take 64 MiB of memory at most, then they are kept on disk as 16-byte digests, so memory does not grow with the rows
    (a work unit is one small object; a duplicate adds 16 bytes before compression).

    Raises GvendiError for inputs that do not exist or are not what their suffix says, an empty corpus, and a setting
    below 1, a format that there is not, and OSError, with the file's name, for what the system cannot read.
    """
    fields = fields or Fields()
    check_format(fields)
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
    recognised: Recognised | None = None
    listing = list_files(inputs, skip_unreadable, with_hub=True)
    if listing.hub and hub is None:
        from gvendi_fast.data.hub_data import HubRows

        hub = HubRows()
    recorded = {name: hub.recorded(name) for name in listing.hub} if hub is not None else {}
    found = list(dict.fromkeys(recorded.get(path, path) for path in listing.files))
    fetched = set(recorded.values())
    unreadable, damaged, notes = list(listing.unreadable), dict[str, Unreadable](), list(listing.notes)
    with _SeenIds() as seen:
        for step in map(Step, found) if plan is None else plan(found):
            path, rest = step.path, None if limit is None else limit - rows
            if step.file is None and rest == 0:
                break
            if step.is_rest and (rest == 0 or not files[step.file].cut):
                continue
            number = len(files) if step.file is None else step.file
            here, kind = path, kind_of(path) or ""
            if path == STANDARD_INPUT:
                here = spooled()
                kind = kind_of_input(here)
            elif path in fetched:
                last = rest if step.rows is None else step.rows
                here, kind = hub.file(path, None if last is None else step.first + last), "jsonl"
            try:
                with naming(path):
                    if recognised is None:
                        # No row beyond the limit has a say.
                        count = FIRST_ROWS if rest is None else min(FIRST_ROWS, rest)
                        first, seen_names = first_records(here, kind, fields, count, max_row_bytes)
                        recognised = recognise(first, fields, seen_names) if first else None
                    index = _FileIndex(
                        here, kind, number, rows, len(units), rows_per_unit, seen, max_row_bytes
                    )
                    index.scan(
                        recognised.fields if recognised else fields,
                        rest if step.rows is None else step.rows,
                        step.first,
                        plan is not None,
                    )
            except UNREADABLE as error:
                if here != path:
                    named(error, here, path)
                if not skip_unreadable or step.file is not None:
                    raise
                unreadable.append(Unreadable.of(error, path))
                seen.forget(number)
                continue
            name = step.recorded_as or path
            source = SourceFile(
                name,
                kind,
                index.size,
                step.first + index.rows,
                index.digest.hexdigest(),
                None if name == here else here,
                index.is_cut,
            )
            files[number:] = [source, *files[number + 1 :]]
            pieces.append(Piece(number, step.first, index.rows))
            units.extend(index.units)
            remarks = index.remarks if index.rows else [*index.remarks, "holds no rows"]
            # A file of several pieces is read several times.
            notes += dict.fromkeys(
                note for remark in remarks if (note := f"corpus: '{path}' {remark}") not in notes
            )
            if index.damage is not None:
                damaged[path] = Unreadable(path, str(index.damage))
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
    recognised = recognised or Recognised(replace(fields, format="auto"))
    return Manifest(
        tuple(files),
        tuple(units),
        recognised.fields,
        rows,
        duplicates,
        rows_per_unit,
        limit,
        max_row_bytes,
        tuple(unreadable),
        (*notes, *recognised.notes),
        recognised.advice,
        tuple(damaged.values()),
        tuple(pieces),
    )


class _FileIndex:
    """The pass over one file: counts rows, fingerprints bytes, and ends a work unit every `rows_per_unit` rows."""

    def __init__(
        self,
        path: str,
        kind: str,
        file: int,
        first_row: int,
        first_unit: int,
        rows_per_unit: int,
        seen: _SeenIds,
        max_bytes: int,
    ) -> None:
        self.path, self.file, self.kind = path, file, kind
        self.size = size_of(path)
        self.digest = hashlib.blake2b(digest_size=16)
        self.rows = self.duplicates = 0
        # Whether there are rows behind those that were asked for.
        self.is_cut = False
        self.units: list[Unit] = []
        # What is odd about the file, and why it ended too early.
        self.remarks: list[str] = []
        self.damage: Damage | None = None
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
        # Of the rows of this work unit that have an id: row of the file, id, line.
        self._ids: list[tuple[int, str, int]] = []
        self._lines = self._footer = 0
        self._groups: list[int] = []
        self._group_rows: list[int] = []

    def scan(self, fields: Fields, limit: int | None, first: int = 0, looks_on: bool = False) -> None:
        """Up to `limit` rows from row `first` (from 0) on; `looks_on` tells whether there are more."""
        if is_table(self.kind):
            self._scan_table(fields, limit, first, looks_on)
        else:
            self._scan_lines(fields, limit, first, looks_on)
        if self._open is not None:
            self._close_unit()

    def _scan_lines(self, fields: Fields, limit: int | None, first: int, looks_on: bool) -> None:
        before = self.digest.copy()
        is_plain, is_escaped = _key_finders(fields.id)
        # Bytes enter the fingerprint as they are read, so that rows up to the limit come by themselves at its end.
        together = 0 if first else sys.maxsize if limit is None else max(0, limit - 1)
        for line, offset, raw in read_lines(
            self.path,
            self.kind,
            digest=self.digest,
            max_bytes=self._max_bytes,
            remarks=self.remarks,
            together=together,
        ):
            if type(raw) is Lines:
                self._take_lines(raw, fields, is_plain, is_escaped)
                continue
            if first:
                first -= 1
                before = before if first else self.digest.copy()
                continue
            if self.rows == limit:
                self.is_cut, self.digest = True, before
                return
            own = None
            if type(raw) is bytes:
                # As `line_digest`, without its call.
                self._lines = crc32(raw, self._lines ^ line)
                if is_plain(raw) or is_escaped(raw):
                    record = decode_line(raw)
                    own = None if isinstance(record, Reason) else record_id(record, fields)
            else:
                self._lines = line_digest(self._lines, line, raw)
                self.damage = raw if type(raw) is Damage else self.damage
            # As `_take`, without its call.
            if self.rows < self._until - 1 and self._open is not None and own is None:
                self.rows += 1
            else:
                self._take(line, offset, own)
            # Stops before the next line is read, whose bytes would enter the fingerprint.
            if self.rows == limit:
                if not looks_on:
                    return
                before = self.digest.copy()

    def _take_lines(
        self,
        lines: Lines,
        fields: Fields,
        is_plain: Callable[[bytes], Any],
        is_escaped: Callable[[bytes], Any],
    ) -> None:
        start, key = 0, fields.id
        while start < len(lines):
            part = lines.part(start, start + (self._until - self.rows if self._open else self._per_unit))
            start += len(part)
            if self._open is None:
                self._open = part.line, part.offset
                self._until = self.rows + self._per_unit
            self._lines = part.digest(self._lines)
            if is_plain(part.raw) or is_escaped(part.raw):
                for number, record in enumerate(part.records()):
                    if type(record) is dict and key in record:
                        own = record_id(record, fields)
                        if own is not None and type(own) is not Reason:
                            self._ids.append((self.rows + number, own, part.line + number))
            self.rows += len(part)
            if self.rows == self._until:
                self._close_unit()

    def _scan_table(self, fields: Fields, limit: int | None, first: int, looks_on: bool) -> None:
        with open_table(self.path, self.kind, fields, self._max_bytes) as source:
            wanted = None if limit is None else first + limit
            found = source.check(None if wanted is None else wanted + looks_on)
            total = found if wanted is None else min(found, wanted)
            self.is_cut = found > total
            self.remarks += source.remarks
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
        if own is not None and type(own) is not Reason:
            self._ids.append((self.rows, own, line))
        self.rows += 1
        if self.rows == self._until:
            self._close_unit()

    def _close_unit(self) -> None:
        rows = (self.rows - 1) % self._per_unit + 1
        ordinal, first_row = self._first_unit + len(self.units), self._first_row + self.rows - rows
        begin = self.rows - rows
        found = self._seen.repeats(self.file, [(row - begin, own, at) for row, own, at in self._ids])
        repeats = pack_duplicates(found)
        digest = shown(self._lines)
        if is_table(self.kind):
            groups = groups_of(self._group_rows, self._open[0] - 1, rows)
            digest = groups_digest(self._footer, [self._groups[group] for group in groups])
        self.units.append(Unit(ordinal, self.file, first_row, rows, *self._open, repeats, digest))
        self.duplicates += len(found)
        self._open, self._ids, self._lines = None, [], 0


def _key_finders(key: str) -> tuple[Callable[[bytes], Any], Callable[[bytes], Any]]:
    """Two searches of which one finds something in every line with this key: plainly spelled, or with \\u escapes.

    They are expressions, which find a few bytes in less time than `in`.
    """
    # What an ASCII name is made of has numbers from 0x30 to 0x7a.
    escaped = rb"\\u00[3-7]" if key.isascii() else rb"\\u"
    return re.compile(f'"{key}"'.encode() if key.isidentifier() else b"").search, re.compile(escaped).search


class _SeenIds:
    """Where each id occurred first: in memory up to `_IDS_BYTES`, then in a private temporary database that the system
    removes with the process.
    """

    def __init__(self) -> None:
        # {id: its file and line, as one number}, and at most how many bytes that takes.
        self._first: dict[str, int] = {}
        self._bytes = 0
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> _SeenIds:
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()

    def repeats(self, file: int, ids: list[tuple[int, str, int]]) -> list[tuple[int, int, int]]:
        """(row, file and line of the first row with this id) of each of these (row, id, line) that is not the first."""
        names = [own for _, own, _ in ids]
        places = [(file << _LINE_BITS) + line for _, _, line in ids]
        if self._db is None:
            firsts = list(map(self._first.setdefault, names, places))
            self._bytes += sum(map(sys.getsizeof, names)) + _ENTRY_BYTES * len(names)
            if self._bytes > _IDS_BYTES:
                self._db = _open_database()
                self._firsts_on_disk(list(self._first), list(self._first.values()))
                self._first = {}
        else:
            firsts = self._firsts_on_disk(names, places)
        if firsts == places:
            return []
        return [
            (row, first >> _LINE_BITS, first & (1 << _LINE_BITS) - 1)
            for (row, _, _), place, first in zip(ids, places, firsts, strict=True)
            if place != first
        ]

    def _firsts_on_disk(self, names: list[str], places: list[int]) -> list[int]:
        """Where each of these ids occurred first, if they occur at these places."""
        assert self._db is not None
        keys = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names]
        before = self._db.total_changes
        try:
            # At once, as a statement for each row takes three times as long.
            self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", zip(keys, places, strict=True))
        except sqlite3.OperationalError as error:
            raise GvendiError(
                f"corpus: the table of ids seen cannot be written to the temporary folder ({error}); it needs about 40 "
                "bytes per row: set SQLITE_TMPDIR to a folder with enough space"
            ) from error
        if self._db.total_changes - before == len(keys):
            return places
        return [self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()[0] for key in keys]

    def forget(self, file: int) -> None:
        """Drop the ids of a file that turned out to be unreadable, so that none of its rows counts as the first."""
        self._first = {name: place for name, place in self._first.items() if place >> _LINE_BITS != file}
        if self._db is not None:
            self._db.execute("DELETE FROM seen WHERE place >> ? = ?", (_LINE_BITS, file))


def _open_database() -> sqlite3.Connection:
    # An empty name makes SQLite use a temporary file that is unlinked at once.
    found = sqlite3.connect("", isolation_level=None)
    found.execute("PRAGMA journal_mode=OFF")
    found.execute("PRAGMA synchronous=OFF")
    found.execute(f"PRAGMA cache_size=-{_SQLITE_CACHE_KIB}")
    found.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place INT) WITHOUT ROWID")
    found.execute("BEGIN")
    return found
