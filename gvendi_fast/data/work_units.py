"""The work units of a corpus and how one is read: by seeking where the file allows it, else by reading up to it."""

from __future__ import annotations

import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import size_of
from gvendi_fast.data.kinds import is_table
from gvendi_fast.data.lines import Lines
from gvendi_fast.data.listing import Unreadable
from gvendi_fast.data.pieces import Piece
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason, Rejected, Row, decode_line, row_reader
from gvendi_fast.data.sources import can_start_at, open_table, read_lines
from gvendi_fast.data.unit_digests import GroupSums, line_digest, shown

_TAKEN_OVER = "this iterator's file has been taken over by a later read of the same UnitReader"
# Row within its work unit, then file and line of the row that had the id first.
_DUPLICATE = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus.

    path: as given.
    kind: as `kinds` names it, such as "jsonl.gz".
    size: bytes on disk.
    rows: how many are used.
    digest: BLAKE2b (16 bytes, hex) of the bytes that were read: the decompressed lines of JSON lines, the rows of other
        texts, the footer and the row groups in use of Parquet (bytes beyond a `limit` do not count), all of Arrow.
    """

    path: str
    kind: str
    size: int
    rows: int
    digest: str
    # Where it is read from, if its recorded name is another: ids and rejected rows have the recorded one.
    here: str | None = None
    # Whether it was read, and fingerprinted, up to the last row in use only.
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """A work unit: consecutive rows of one file that are computed, stored and resumed as a whole.

    ordinal: its number in the corpus, from 0.
    file: index in `Manifest.files`.
    first_row: ordinal in the corpus of its first row.
    rows: how many it has.
    line: line, or row where rows are no lines, of its first row.
    offset: byte in the file where its first row begins; used for plain JSON lines only.
    duplicates: which of its rows repeat an earlier id, packed; empty if none does.
    digest: of what its rows were read from (see unit_digests.py); "" if it is not known, and then not checked.
    """

    ordinal: int
    file: int
    first_row: int
    rows: int
    line: int
    offset: int
    duplicates: bytes = b""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A corpus after one pass over it: its files and its work units, in input order.

    files: in input order.
    units: the work units, in input order.
    fields: the names of a row's fields, with the format that was recognised ("auto": the shape "fields").
    rows: of all files.
    duplicates: rows that repeat an earlier id.
    rows_per_unit: rows of a work unit, at most.
    limit: how many rows were taken at most, None for all.
    max_row_bytes: longer rows are rejected.
    unreadable: files and folders that were passed over.
    notes: sentences on what else was passed over, and on how rows are read; no part of the corpus.
    advice: where most of the first rows cannot be read, a sentence on their fields and what would read them.
    damaged: files that end before they should, and why; their rows before that are in use.
    pieces: its rows in order, as runs of rows of its files.
    earlier: of a corpus that has grown, what it was before, oldest first: {"corpus": digest of units.json then,
        "units": how many of its work units are still the same}.
    grown: rows that it had before, and how many of those were sketched and are computed again; None where it did not
        grow just now.
    """

    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    fields: Fields
    rows: int
    duplicates: int
    rows_per_unit: int
    limit: int | None
    max_row_bytes: int = MAX_ROW_BYTES
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    advice: str = field(default="", compare=False)
    damaged: tuple[Unreadable, ...] = ()
    pieces: tuple[Piece, ...] = ()
    earlier: tuple[Mapping[str, Any], ...] = ()
    grown: tuple[int, int] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """What a run directory records of the corpus, JSON-able: all that decides which rows a work unit has."""
        # Only what is not as usual, so that directories of earlier versions go on.
        unusual: dict[str, Any] = {}
        if self.max_row_bytes != MAX_ROW_BYTES:
            unusual["max_row_bytes"] = self.max_row_bytes
        if self.unreadable:
            unusual["unreadable"] = [asdict(item) for item in self.unreadable]
        if self.damaged:
            unusual["damaged"] = [asdict(item) for item in self.damaged]
        if self.pieces and [piece.file for piece in self.pieces] != [*range(len(self.files))]:
            unusual["pieces"] = [[piece.file, piece.first, piece.rows] for piece in self.pieces]
        if self.earlier:
            unusual["earlier"] = list(self.earlier)
        return {
            **unusual,
            "units_total": len(self.units),
            "rows": self.rows,
            "duplicates": self.duplicates,
            "rows_per_unit": self.rows_per_unit,
            "limit": self.limit,
            "fields": {
                name: value
                for name, value in asdict(self.fields).items()
                if (name, value) != ("format", "auto")
            },
            "files": [
                {
                    name: value
                    for name, value in asdict(source).items()
                    # Where a corpus has not grown, its limit tells what is cut.
                    if name != "here" and (name != "cut" or (value and self.earlier))
                }
                for source in self.files
            ],
        }

    def remarks(self) -> list[str]:
        """Sentences on what of the corpus is passed over, and on how the rest is read."""
        return [*self.notes, *(f"passed over '{item.path}': {item.reason}" for item in self.unreadable)]

    def recorded_as(self, recorded: Mapping[str, Any]) -> Manifest:
        """The same corpus under the paths of an equal manifest's dict; the files are read from where they are."""
        paths = [entry["path"] for entry in recorded["files"]]
        files = [
            source if source.path == path else replace(source, path=path, here=source.here or source.path)
            for source, path in zip(self.files, paths, strict=True)
        ]
        return replace(self, files=tuple(files))


class UnitReader:
    """Reads the work units of a manifest; in order, they cost one pass over each file.

    In a plain file the reader seeks the work unit, in a Parquet file it opens its row group, and in an archive it reads
    forward to it (from the beginning only if it has passed the work unit already).

    It belongs to the thread that reads first, until `close`; in another one `read` raises GvendiError: give each thread
    a reader of its own.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._parse = row_reader(manifest.fields)
        self._file = -1
        self._line = 0
        self._unit_end = 0
        self._turn = 0
        # {"thread": whose it is}; `setdefault` of a dict is one step.
        self._owner: dict[str, int] = {}
        self._groups: GroupSums | None = None
        # (line or row of the file, byte offset, content)
        self._records: Iterator[tuple[int, int, bytes | dict | Reason | Lines]] = iter(())
        # The next one, if it is what is left of lines that came together.
        self._rest: tuple[int, int, Lines] | None = None

    def __enter__(self) -> UnitReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file; a later `read` opens what it needs again."""
        self._check_owner()
        self._close()
        self._owner.clear()

    def _close(self) -> None:
        getattr(self._records, "close", lambda: None)()
        self._file, self._line, self._records, self._groups = -1, 0, iter(()), None
        self._rest = None
        self._turn += 1

    def read(self, unit: Unit) -> Iterator[Row | Rejected]:
        """The rows of `unit` in input order, each either readable or rejected with its reason.

        Raises GvendiError if the file is missing or its size has changed since it was indexed, and before the last row
        if what was read is not what was indexed: use no row before the iterator is exhausted. RuntimeError if an
        iterator is used after a later `read` or `close` has taken its file.
        """
        manifest, path = self.manifest, self.manifest.files[unit.file].path
        parse = self._parse
        self._owner.setdefault("thread", threading.get_ident())
        self._check_owner()
        self._go_to(unit)
        turn, row = self._turn, 0
        repeats = _unpack_duplicates(unit.duplicates)
        for line, records in self._runs(unit):
            for record in records:
                if turn != self._turn:
                    raise RuntimeError(_TAKEN_OVER)
                parsed = parse(record, row, path, line)
                if row in repeats and parsed.id is not None:
                    file, first = repeats[row]
                    reason = f"duplicate id '{parsed.id}' (first at {manifest.files[file].path}:{first})"
                    parsed = Rejected(path, line, reason, parsed.id)
                yield parsed
                row += 1
                line += 1

    def _runs(self, unit: Unit) -> Iterator[tuple[int, Iterable[dict | Reason]]]:
        """(line of the first, records) of consecutive rows; the last ones come if all are what was indexed."""
        turn, row, digest = self._turn, 0, 0
        of_lines = unit.digest and self._groups is None
        while row < unit.rows:
            if turn != self._turn:
                raise RuntimeError(_TAKEN_OVER)
            found = self._next(unit.rows - row, 0 if row else unit.line)
            if found is None:
                path = self.manifest.files[unit.file].path
                raise GvendiError(
                    f"corpus: '{path}' has fewer rows than when it was indexed; run again on the unchanged file"
                )
            line, payload = found
            count, records = 1, (payload,)
            if type(payload) is Lines:
                digest, count, records = payload.digest(digest), len(payload), payload.records()
            elif of_lines:
                digest = line_digest(digest, line, payload)
            if type(payload) is bytes:
                records = (decode_line(payload),)
            self._line = line + count - 1
            row += count
            if row == unit.rows and unit.digest:
                self._check(unit, digest)
            yield line, records

    def _next(self, most: int, line: int) -> tuple[int, bytes | dict | Reason | Lines] | None:
        """The next row from `line` on with its line, or at most `most` rows that come together."""
        while True:
            found, self._rest = self._rest or next(self._records, None), None
            if found is None:
                return None
            first, _, payload = found
            if type(payload) is not Lines:
                if first >= line:
                    return first, payload
                continue
            start = max(0, line - first)
            end = start + most
            if end < len(payload):
                rest = payload.part(end, len(payload))
                self._rest = rest.line, rest.offset, rest
            if start < len(payload):
                return first + start, payload.part(start, end)

    def _check_owner(self) -> None:
        if self._owner.get("thread", threading.get_ident()) != threading.get_ident():
            raise GvendiError(
                f"this UnitReader is called in thread {threading.current_thread().name!r} and belongs to another one, "
                "which reads from its file; give each thread a UnitReader of its own, or close it there first"
            )

    def _check(self, unit: Unit, digest: int) -> None:
        read = shown(digest) if self._groups is None else self._groups.digest(unit.line - 1, unit.rows)
        if read != unit.digest:
            raise GvendiError(
                f"corpus: '{self.manifest.files[unit.file].path}' has changed since it was indexed: its rows from line "
                f"{unit.line} on (work unit {unit.ordinal}, {unit.rows} row{'s' * (unit.rows != 1)}) are others; run "
                "again on the unchanged file"
            )

    def _go_to(self, unit: Unit) -> None:
        source = self.manifest.files[unit.file]
        ahead = self._file == unit.file and self._line < unit.line
        # Other kinds can be opened at the work unit, unless the reader is already there.
        if ahead and (not can_start_at(source.kind) or self._unit_end == unit.first_row):
            self._turn += 1
        else:
            self._close()
            _check_unchanged(source)
            self._file = unit.file
            self._records = _open_records(source, unit, self.manifest, sys.maxsize)
            path = source.here or source.path
            self._groups = GroupSums(path, source.kind) if is_table(source.kind) else None
        self._unit_end = unit.first_row + unit.rows


def read_unit(manifest: Manifest, unit: Unit) -> Iterator[Row | Rejected]:
    """The rows of one work unit in input order; for several in order a `UnitReader` reads each file once."""
    with UnitReader(manifest) as reader:
        yield from reader.read(unit)


def _open_records(
    source: SourceFile, unit: Unit, manifest: Manifest, together: int = 0
) -> Iterator[tuple[int, int, Any]]:
    if is_table(source.kind):
        return _table_records(source, unit, manifest)
    start = (unit.offset, unit.line) if can_start_at(source.kind) else (0, 1)
    return read_lines(
        source.here or source.path,
        source.kind,
        *start,
        max_bytes=manifest.max_row_bytes,
        together=together,
    )


def _table_records(source: SourceFile, unit: Unit, manifest: Manifest) -> Iterator[tuple[int, int, Any]]:
    with open_table(
        source.here or source.path, source.kind, manifest.fields, manifest.max_row_bytes
    ) as table:
        for number, record in table.rows(unit.line - 1):
            yield number, 0, record


def _check_unchanged(source: SourceFile) -> None:
    path = source.here or source.path
    try:
        with naming(path):
            size = size_of(path)
    except FileNotFoundError as error:
        raise GvendiError(
            f"corpus: '{path}' no longer exists; restore it or index the corpus again"
        ) from error
    if size != source.size:
        raise GvendiError(
            f"corpus: '{path}' has changed since it was indexed ({source.size} -> {size} bytes); "
            "run the command again"
        )


def pack_duplicates(repeats: list[tuple[int, int, int]]) -> bytes:
    """`Unit.duplicates` of (row within the work unit, file and line of the first row with its id)."""
    return zlib.compress(b"".join(_DUPLICATE.pack(*repeat) for repeat in repeats)) if repeats else b""


def _unpack_duplicates(packed: bytes) -> dict[int, tuple[int, int]]:
    content = zlib.decompress(packed) if packed else b""
    return {row: (file, line) for row, file, line in _DUPLICATE.iter_unpack(content)}
