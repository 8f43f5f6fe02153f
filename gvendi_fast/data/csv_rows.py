"""CSV and TSV: a header, then one record a row, whose quoted cells may hold newlines. Cells are texts; an empty one is
no value. A record that is broken is refused by itself: reading goes on at the line after the one that it began on.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from gvendi_fast.data.json_lines import too_long
from gvendi_fast.data.listing import SKIP, UnreadableFileError
from gvendi_fast.data.remedies import AS_UTF_8
from gvendi_fast.data.rows import Reason
from gvendi_fast.data.unpacking import BOM, Text

_PIECE = 1 << 20


class _BadLineError(Exception):
    """A line that no record can hold; its argument is the reason."""


class _Lines:
    """The lines of a text for csv.reader, those of the record in hand kept, so that they can be read again."""

    def __init__(self, text: Text, max_bytes: int) -> None:
        self._text, self._max_bytes = text, max_bytes
        # Number of the last line that was read from the text.
        self.line = 0
        self.is_at_end = False
        self._again: deque[tuple[int, bytes | Reason]] = deque()
        # Number and content of the lines of this record.
        self.record: list[tuple[int, bytes | Reason]] = []
        self._size = 0
        # Why this record cannot be used, although it can be read to its end.
        self.problem: Reason | None = None

    def __iter__(self) -> _Lines:
        return self

    def begin(self) -> None:
        """Forget the record that was read."""
        self.record, self._size, self.problem = [], 0, None

    def read_again(self) -> None:
        """Have all lines of the record but the first one come again."""
        self._again.extendleft(reversed(self.record[1:]))

    def __next__(self) -> str:
        number, raw = self._again.popleft() if self._again else self._line()
        self.record.append((number, raw))
        if isinstance(raw, Reason):
            raise _BadLineError(raw)
        self._size += len(raw)
        if self._size > self._max_bytes + 2:
            raise _BadLineError(too_long(self._size, self._max_bytes))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            place = self._size - len(raw) + error.start + 1
            why = f"invalid UTF-8: byte 0x{raw[error.start]:02x} at position {place}"
            self.problem = self.problem or Reason(why)
            # No such byte is a quote or a newline: the record ends where it would, and its other lines are no rows.
            return raw.decode(errors="surrogateescape")

    def _line(self) -> tuple[int, bytes | Reason]:
        most = self._max_bytes + 2
        raw = self._text.stream.readline(most)
        # The line in which an archive ends is a part of the damage: nobody knows whether its last cell is whole.
        if not raw or (self._text.damage is not None and raw[-1:] != b"\n"):
            self.is_at_end = True
            raise StopIteration
        self.line += 1
        if len(raw) < most or raw[-1:] == b"\n":
            return self.line, raw.removeprefix(BOM)
        size = len(raw)
        while raw[-1:] != b"\n" and (raw := self._text.stream.readline(_PIECE)):
            size += len(raw)
        return self.line, too_long(size, self._max_bytes)


def csv_rows(
    text: Text, delimiter: str, digest: Any, max_bytes: int
) -> Iterator[tuple[int, int, bytes | Reason]]:
    """(line that it begins on, 0, row as a JSON object) of every record that is not empty, as `sources.read_lines`.

    digest: updated with the rows, if given.
    Raises UnreadableFileError for a header that cannot be read, or names a column twice.
    """
    # The limit is the process's own, and lies below that of a row; it is never lowered again.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes + 2))
    first = text.head.partition(b"\n")[0]
    if delimiter == "," and b"," not in first and b";" in first:
        delimiter = ";"
        text.remarks.append("divides its columns by semicolons")
    records = _records(text, delimiter, max_bytes)
    header = _header(text.path, next(records, (0, []))[1])
    for line, cells in records:
        value = cells if isinstance(cells, Reason) else _row(header, cells)
        if digest is not None:
            digest.update(value if type(value) is bytes else value.encode())
        yield line, 0, value


def _records(text: Text, delimiter: str, max_bytes: int) -> Iterator[tuple[int, list[str] | Reason]]:
    lines = _Lines(text, max_bytes)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except (_BadLineError, csv.Error) as error:
            if lines.is_at_end and text.damage is not None:
                cells = None
            else:
                lines.read_again()
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                is_ours = isinstance(error, _BadLineError)
                yield lines.record[0][0], error.args[0] if is_ours else Reason(f"broken CSV: {error}")
                continue
        if cells is None:
            break
        if cells:
            yield lines.record[0][0], lines.problem or cells
    if text.damage is not None:
        yield lines.line + 1, text.damage


def _header(path: str, cells: list[str] | Reason) -> list[str]:
    if isinstance(cells, Reason):
        mend = AS_UTF_8 if cells.startswith("invalid UTF-8") else "mend it"
        raise UnreadableFileError(
            f"corpus: '{path}' has no header that can be read ({cells}); {mend}, or {SKIP}"
        )
    for name in cells:
        if name and cells.count(name) > 1:
            raise UnreadableFileError(
                f"corpus: '{path}' has {cells.count(name)} columns '{name}'; keep one, or {SKIP}"
            )
    return cells


def _row(header: list[str], cells: list[str]) -> bytes | Reason:
    if len(cells) != len(header):
        return Reason(f"broken CSV: {len(cells):,} cells under a header of {len(header):,}")
    record = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}
    return json.dumps(record, ensure_ascii=False).encode()
