"""The pass over one file of a corpus: its rows as work units, by themselves, whatever the files before it hold."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np

from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import size_of
from gvendi_fast.data.kinds import is_table
from gvendi_fast.data.lines import Lines
from gvendi_fast.data.listing import UNREADABLE
from gvendi_fast.data.manifest import Unit, pack_duplicates
from gvendi_fast.data.row_sizes import row_sizes
from gvendi_fast.data.rows import Fields, Reason, decode_line, record_id
from gvendi_fast.data.seen_ids import PackedIds, Repeat, TooManyIdsError
from gvendi_fast.data.sources import open_table, read_lines
from gvendi_fast.data.unit_cuts import Cut, Cutter, fitting
from gvendi_fast.data.unit_digests import groups_digest, groups_of, line_digest, shown
from gvendi_fast.data.unpacking import Damage

# (work unit of the file, rows within it, their ids, their lines) -> those whose id is not the first of its kind.
Repeats: TypeAlias = Callable[[int, Sequence[int], Sequence[str], Sequence[int]], list[Repeat]]


@dataclass(frozen=True, slots=True)
class FileScan:
    """What is known of a file after the pass over it.

    size, rows, digest, is_cut: as `SourceFile` has them.
    units: its work units, numbered within the file; their file is 0.
    duplicates: how many of its rows repeat an earlier id.
    remarks: sentences on what is odd about it, which go on "corpus: 'path' ...".
    damage: why it ended too early.
    ids: those of its rows, where nobody has looked yet which repeat those of files before it.
    """

    size: int
    rows: int
    digest: str
    is_cut: bool
    units: tuple[Unit, ...]
    duplicates: int
    remarks: tuple[str, ...]
    damage: str | None
    ids: PackedIds | None = None


@dataclass(frozen=True, slots=True)
class ToScan:
    """A file that is to be read by itself. path: as the corpus names it. here: where it lies. fields: of its rows."""

    path: str
    here: str
    kind: str
    fields: Fields


def scanner(cut: Cut, max_bytes: int) -> Callable[[Sequence[ToScan]], list[FileScan | Exception | None]]:
    """What scans files, each by itself, wherever it is called.

    It returns the error of a file that cannot be read, and None for one of more ids than are held in memory.
    """
    return partial(_all_scanned, cut, max_bytes)


def _all_scanned(cut: Cut, max_bytes: int, files: Sequence[ToScan]) -> list[FileScan | Exception | None]:
    return [_scanned(cut, max_bytes, file) for file in files]


def _scanned(cut: Cut, max_bytes: int, file: ToScan) -> FileScan | Exception | None:
    ids = PackedIds()
    try:
        with naming(file.path):
            index = FileIndex(file.here, file.kind, cut, max_bytes, ids.pack)
            index.scan(file.fields)
    except UNREADABLE as error:
        return error
    except TooManyIdsError:
        return None
    return index.result(ids)


class FileIndex:
    """The pass over one file: counts rows, fingerprints bytes, and ends work units as `cut` says.

    Work units are numbered within the file, and their file is 0.
    """

    def __init__(self, path: str, kind: str, cut: Cut, max_bytes: int, repeats: Repeats) -> None:
        """repeats: called with each work unit that has ids."""
        self.path, self.kind = path, kind
        self.size = size_of(path)
        self.digest = hashlib.blake2b(digest_size=16)
        self.rows = self.duplicates = 0
        # Whether there are rows behind those that were asked for.
        self.is_cut = False
        self.units: list[Unit] = []
        # What is odd about the file, and why it ended too early.
        self.remarks: list[str] = []
        self.damage: Damage | None = None
        self._cut, self._max_bytes, self._repeats = cut, max_bytes, repeats
        # Line and offset of the first row of the unit that is open, the rows with which it began and ends, and its
        # bytes.
        self._open: tuple[int, int] | None = None
        self._begin = self._until = self._bytes = 0
        # Of the rows of this work unit that have an id: row of the file, id, line.
        self._ids: list[tuple[int, str, int]] = []
        self._lines = self._footer = 0
        self._groups: list[int] = []
        self._group_rows: list[int] = []
        # Rows of the work units of a table that is cut by bytes.
        self._lengths: Iterator[int] = iter(())

    def scan(self, fields: Fields, limit: int | None = None, first: int = 0, looks_on: bool = False) -> None:
        """Up to `limit` rows from row `first` (from 0) on; `looks_on` tells whether there are more."""
        if is_table(self.kind):
            self._scan_table(fields, limit, first, looks_on)
        else:
            self._scan_lines(fields, limit, first, looks_on)
        if self._open is not None:
            self._close_unit()

    def result(self, ids: PackedIds | None = None) -> FileScan:
        """What is known after `scan`; ids: those that `repeats` has kept for later."""
        return FileScan(
            self.size,
            self.rows,
            self.digest.hexdigest(),
            self.is_cut,
            tuple(self.units),
            self.duplicates,
            tuple(self.remarks),
            None if self.damage is None else str(self.damage),
            ids,
        )

    def _scan_lines(self, fields: Fields, limit: int | None, first: int, looks_on: bool) -> None:
        before = self.digest.copy()
        is_plain, is_escaped = _key_finders(fields.id)
        # Bytes enter the fingerprint as they are read, so that rows up to the limit come by themselves at its end.
        together = 0 if first else sys.maxsize if limit is None else max(0, limit - 1)
        most = self._cut.bytes
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
            if most is not None:
                self._make_room(len(raw) if type(raw) is bytes else 0, most)
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
        start, key, most = 0, fields.id, self._cut.bytes
        # Of the lines up to each, without their newlines.
        sizes = None if most is None else lines.ends - np.arange(len(lines))
        while start < len(lines):
            stop = start + (self._until - self.rows if self._open else self._cut.rows)
            if sizes is not None and most is not None:
                count = fitting(sizes, start, stop - start, most - self._bytes)
                if not count and self._open is not None:
                    self._close_unit()
                    continue
                stop = start + max(1, count)
                self._bytes += int(sizes[stop - 1]) - (int(sizes[start - 1]) if start else 0)
            part = lines.part(start, stop)
            start += len(part)
            self._open_unit(part.line, part.offset)
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
            sizes = None if self._cut.bytes is None else _TableCutter(self._cut, first, wanted)
            found = source.check(None if wanted is None else wanted + looks_on, sizes)
            total = found if wanted is None else min(found, wanted)
            if sizes is not None:
                self._lengths = iter(sizes.units())
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

    def _make_room(self, size: int, most: int) -> None:
        """Count the bytes of a row that comes next, after the open work unit has ended if it has no room for them."""
        if self._open is not None and self._bytes + size > most:
            self._close_unit()
        self._bytes += size

    def _open_unit(self, line: int, offset: int) -> None:
        if self._open is None:
            self._open, self._begin = (line, offset), self.rows
            self._until = self.rows + next(self._lengths, self._cut.rows)

    def _take(self, line: int, offset: int, own: str | Reason | None) -> None:
        self._open_unit(line, offset)
        if own is not None and type(own) is not Reason:
            self._ids.append((self.rows, own, line))
        self.rows += 1
        if self.rows == self._until:
            self._close_unit()

    def _close_unit(self) -> None:
        assert self._open is not None
        unit, begin, rows = len(self.units), self._begin, self.rows - self._begin
        found: list[Repeat] = []
        if self._ids:
            numbers, ids, lines = zip(*self._ids, strict=True)
            found = self._repeats(unit, [number - begin for number in numbers], ids, lines)
        digest = shown(self._lines)
        if is_table(self.kind):
            groups = groups_of(self._group_rows, self._open[0] - 1, rows)
            digest = groups_digest(self._footer, [self._groups[group] for group in groups])
        self.units.append(Unit(unit, 0, begin, rows, *self._open, pack_duplicates(found), digest))
        self.duplicates += len(found)
        self._open, self._ids, self._lines, self._bytes = None, [], 0, 0


class _TableCutter:
    """The work units of a table's rows, from row `first` on and before row `end`, by batches from its beginning on."""

    def __init__(self, cut: Cut, first: int, end: int | None) -> None:
        self._cutter, self._first, self._end = Cutter(cut), first, end
        self._seen = 0

    def __call__(self, batch: Any) -> None:
        """Take a batch of the columns in use."""
        start, seen = max(0, self._first - self._seen), self._seen
        self._seen += batch.num_rows
        stop = batch.num_rows if self._end is None else min(batch.num_rows, self._end - seen)
        if start < stop:
            self._cutter.take(row_sizes(batch)[start:stop])

    def units(self) -> list[int]:
        """How many rows each work unit has; nothing where no column is in use."""
        return self._cutter.units()


def _key_finders(key: str) -> tuple[Callable[[bytes], Any], Callable[[bytes], Any]]:
    """Two searches of which one finds something in every line with this key: plainly spelled, or with \\u escapes.

    They are expressions, which find a few bytes in less time than `in`.
    """
    # What an ASCII name is made of has numbers from 0x30 to 0x7a.
    escaped = rb"\\u00[3-7]" if key.isascii() else rb"\\u"
    return re.compile(f'"{key}"'.encode() if key.isidentifier() else b"").search, re.compile(escaped).search
