"""How a work unit is read: by seeking where the file allows it, else by reading up to it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import size_of, status_of
from gvendi_fast.data.kinds import is_table
from gvendi_fast.data.lines import Lines
from gvendi_fast.data.manifest import Manifest, SourceFile, Unit, unpack_duplicates
from gvendi_fast.data.rows import Fields, Reason, Rejected, Row, decode_line, row_reader
from gvendi_fast.data.sources import can_start_at, open_table, read_lines
from gvendi_fast.data.unit_digests import groups_digest, groups_of, line_digest, shown

_TAKEN_OVER = "this iterator's file has been taken over by a later read of the same UnitReader"


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
        repeats = unpack_duplicates(unit.duplicates)
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


class GroupSums:
    """Checksums of a table's row groups, each read once as long as the system says that the file is the same.

    The time of a file's last change of status cannot be set back, as that of its content can.
    """

    def __init__(self, path: str, kind: str) -> None:
        self.path, self.kind = path, kind
        self._status: tuple[Any, ...] = ()
        self._footer = 0
        self._rows: list[int] = []
        self._sums: dict[int, int] = {}

    def digest(self, first: int, rows: int) -> str:
        """`Unit.digest` of `rows` rows from row `first` (from 0) on, as the file is now."""
        status = status_of(self.path)
        if status != self._status:
            with open_table(self.path, self.kind, Fields()) as source:
                self._rows, self._footer = source.group_rows, source.footer_sum()
            self._status, self._sums = status, {}
        wanted = groups_of(self._rows, first, rows)
        missing = [group for group in wanted if group not in self._sums and group < len(self._rows)]
        if missing:
            with open_table(self.path, self.kind, Fields()) as source:
                # Rows are read in order, so that the row groups before these are done with.
                self._sums = {group: self._sums[group] for group in wanted if group in self._sums}
                self._sums |= {group: source.group_sum(group) for group in missing}
        return groups_digest(self._footer, [self._sums.get(group, 0) for group in wanted])
