"""JSON that is not one object a line: an array of rows, rows over several lines, a list of rows inside an object.

The text is cut into rows by its quotes and brackets alone, in pieces, so that memory stays flat and one broken row
costs itself only; each row is decoded later, as a line is. A parser that streams (ijson) was considered: it ends at
the first broken byte, and gives no row back as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gvendi_fast.data.json_lines import too_long
from gvendi_fast.data.rows import Reason
from gvendi_fast.data.unpacking import BOM, Text, lost

_PIECE = 1 << 17
# Bytes in which an object that may be a row ends.
_LOOKED_AT = 1 << 21
_BETWEEN = re.compile(rb"(?:[\s,]|\xef\xbb\xbf)*")
_BARE = re.compile(rb'[^\s,\[\]{}"]+')
_BRACKET = re.compile(rb'["{}\[\]]')
# A newline cannot stand inside a string: there a string that lacks its quote ends. So many escapes at once bound what
# the search remembers.
_INSIDE = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*){0,500}', re.DOTALL)
_FIRST_KEY = re.compile(rb'\{\s*("[^"\\]*")\s*:')
_QUOTES = re.compile(rb'\\.|"', re.DOTALL)
_CLOSES = {ord("}"): ord("{"), ord("]"): ord("[")}
_QUOTE, _OPEN = ord('"'), b"{["

_ARRAY = re.compile(rb"\s*\[\s*(?:\{|\]|$)")
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# Of an object that holds the rows in one of its lists: the members before it, which are no objects with such a list.
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records", "samples")
# However many digits an integer has.
_DECODER = json.JSONDecoder(parse_int=len)
_WRAPPER = re.compile(
    rb"\s*\{\s*(?:" + _STRING + rb"\s*:\s*(?:" + _STRING + rb"|[^\s,\[\]{}\"]+)\s*,\s*){0,50}"
    rb'"(' + "|".join(WRAPPERS).encode() + rb')"\s*:\s*\[\s*\{',
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How JSON that is no JSON lines holds its rows.

    list: the name of the list in an object that holds them, or "".
    begin: bytes before the first row of that list.
    """

    list: str = ""
    begin: int = 0


def layout_of(text: Text, kind: str, is_json: bool) -> Layout | None:
    """The layout of a text; None for JSON lines. is_json: it is named so (.json), and may be any JSON."""
    head = text.head.removeprefix(BOM)
    first, ended, _ = head.lstrip().partition(b"\n")
    is_values = _ARRAY.match(first) is not None or first.rstrip() == b"{"
    if not is_values and not (is_json and first.startswith((b"{", b"["))):
        return None
    found = _WRAPPER.match(head)
    # An object that holds the rows looks like a row that begins with a list, of which there would be others.
    if found is not None and not _is_followed(text.path, kind):
        return Layout(found[1].decode(), found.end() - 1)
    return Layout() if is_values or not _is_one(first, bool(ended)) else None


def _is_followed(path: str, kind: str) -> bool:
    """Whether the first object of a text has another one behind it; one that is longer than nearly any row has not."""
    with Text(path, kind) as text:
        return _Values(text, _LOOKED_AT, at_most=_LOOKED_AT).is_followed()


def _is_one(line: bytes, is_whole: bool) -> bool:
    """Whether a line holds one value alone, as far as it is known."""
    try:
        value = line.decode(errors="replace")
        _, end = _DECODER.raw_decode(value)
    except (ValueError, RecursionError):
        return not is_whole
    return not value[end:].strip()


def json_values(
    text: Text, layout: Layout, digest: Any, max_bytes: int
) -> Iterator[tuple[int, int, bytes | Reason]]:
    """(number of the row from 1, 0, row) of every row. digest: updated with the rows, if given."""
    for number, value in enumerate(_Values(text, max_bytes, layout), 1):
        if digest is not None:
            digest.update(value if type(value) is bytes else value.encode())
        yield number, 0, value


class _Values:
    """The rows of a text, each its bytes or why it is none; of its first `at_most` bytes, if given."""

    def __init__(
        self, text: Text, max_bytes: int, layout: Layout | None = None, at_most: int | None = None
    ) -> None:
        self._text, self._max_bytes, self._layout, self._at_most = (
            text,
            max_bytes,
            layout or Layout(),
            at_most,
        )
        # What is read and not yet given: its first byte is number `_first` of the text.
        self._data = bytearray()
        self._at = self._first = 0
        self._is_inside = False
        # Of the last value: where in the text it begins, whether it is broken, and whether it ends in a string.
        self._begin, self._is_broken, self._in_string = 0, False, False
        # White space before a row that begins its line, which tells where the next one does.
        self._indent: bytes | None = None

    def __iter__(self) -> Iterator[bytes | Reason]:
        is_wrapped = self._enter()
        while self._between():
            byte = self._data[self._at]
            if byte == ord("[") and not self._is_inside:
                self._is_inside, self._at = True, self._at + 1
            elif byte == ord("]") and self._is_inside:
                self._is_inside, self._at = False, self._at + 1
                if is_wrapped:
                    is_wrapped = False
                    self._value(b"{")
            else:
                value = self._value() if byte in _OPEN or byte == _QUOTE else self._bare()
                if value is None:
                    break
                yield value
        if self._text.damage is not None:
            yield self._text.damage
        elif self._is_inside:
            yield lost("file", self._unended())

    def is_followed(self) -> bool:
        """Whether the text begins with an object that has another one behind it."""
        return self._is_at_object() and bool(self._value()) and not self._is_broken and self._is_at_object()

    def _is_at_object(self) -> bool:
        return self._between() and self._data[self._at] == ord("{")

    def _enter(self) -> bool:
        """Go to the list that holds the rows, where an object does."""
        if not self._layout.list:
            return False
        self._text.remarks.append(
            f"holds its rows in the list '{self._layout.list}'; what is beside it is not read"
        )
        self._text.stream.read(len(self._text.head) - len(self._text.head.removeprefix(BOM)))
        # All but the bracket of the first row.
        self._first += len(self._text.stream.read(self._layout.begin))
        self._is_inside = True
        return True

    def _end(self) -> int:
        return self._first + len(self._data)

    def _more(self) -> bool:
        if self._at_most is not None and self._end() >= self._at_most:
            return False
        piece = self._text.stream.read(_PIECE)
        self._data += piece
        return bool(piece)

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self._first += count
        self._at -= count

    def _between(self) -> bool:
        """Go to the next value or bracket; False at the end of the text."""
        self._drop(self._at)
        line: bytes | None = None
        while True:
            end = _BETWEEN.match(self._data).end()  # type: ignore[union-attr]
            gap = bytes(self._data[:end])
            if b"\n" in gap:
                line = gap[gap.rindex(b"\n") + 1 :]
            elif line is not None:
                line += gap
            # Half a mark may have been read.
            if end < len(self._data) and not BOM.startswith(bytes(self._data[end : end + 3])):
                self._at, self._indent = end, line
                return True
            self._at = end
            self._drop(end)
            if not self._more():
                self._at = 0
                self._indent = line
                return bool(self._data)

    def _unended(self) -> str:
        if self._in_string and self._data.rstrip(b"} \t\r\n").endswith(b"]"):
            return f"its row at byte {self._begin:,} has a quote too many or too few, so that its end is not known"
        return f"its JSON array has no end, the file ends at byte {self._end():,}"

    def _bare(self) -> bytes | Reason:
        """A number, a word or a stray bracket: no row."""
        start = self._at
        while (found := _BARE.match(self._data, start)) and found.end() == len(self._data):
            if len(self._data) - start > self._max_bytes or not self._more():
                break
        self._at = found.end() if found else start + 1
        size = self._at - start
        return (
            too_long(size, self._max_bytes) if size > self._max_bytes else bytes(self._data[start : self._at])
        )

    def _value(self, inside: bytes = b"") -> bytes | Reason | None:
        """The object, list or string that begins here; None where the text ends first. inside: brackets open before."""
        start = place = self._at
        opened, in_string, dropped, is_broken = bytearray(inside), False, 0, False
        self._begin = self._first + start
        while True:
            if in_string:
                place = _INSIDE.match(self._data, place).end()  # type: ignore[union-attr]
            else:
                found = _BRACKET.search(self._data, place)
                place = len(self._data) if found is None else found.start()
            # An escape may be cut.
            if place + (self._data[place : place + 1] == b"\\") >= len(self._data):
                is_long = place - start > self._max_bytes
                if (
                    is_long
                    and not inside
                    and not dropped
                    and (end := self._next_row(start, place)) is not None
                ):
                    return self._given(start, end)
                if inside or is_long:
                    # Too long, or not wanted: it is not kept.
                    dropped += place - start
                    self._at = place
                    self._drop(place)
                    start = place = 0
                if not self._more():
                    end = None if inside or dropped else self._next_row(start, len(self._data))
                    if end is not None:
                        return self._given(start, end)
                    self._in_string = in_string
                    return self._unfinished(start, dropped)
                continue
            byte = self._data[place]
            place += 1
            if in_string:
                if byte == ord("\\"):
                    place -= 1
                    continue
                in_string = False
                is_broken = byte == ord("\n")
                place -= is_broken
            elif byte == _QUOTE:
                in_string = True
                continue
            elif byte in _OPEN:
                opened.append(byte)
                continue
            else:
                is_broken = not opened or opened.pop() != _CLOSES[byte]
            if is_broken or not opened:
                break
        if is_broken and not dropped and (end := self._next_row(start, place)) is not None:
            return self._given(start, end)
        value = self._given(start, place, dropped)
        self._is_broken = is_broken
        if is_broken:
            self._recover()
        return value

    def _given(self, start: int, end: int, dropped: int = 0) -> bytes | Reason:
        """The value in these bytes, behind which reading goes on; `dropped` more bytes of it are not kept."""
        self._at, self._is_broken = end, True
        size = dropped + end - start
        return too_long(size, self._max_bytes) if size > self._max_bytes else bytes(self._data[start:end])

    def _next_row(self, start: int, end: int) -> int | None:
        """Where a row ends that has a quote too many or too few: before one with the same first key on its line.

        There an odd number of quotes lies behind, which of a row that is whole, or a list in one, is even.
        """
        key = _FIRST_KEY.match(self._data, start)
        if key is None:
            return None
        quotes, place = 0, start
        for found in re.finditer(rb"\}\s*,?\s*\{\s*" + re.escape(key[1]) + rb"\s*:", self._data[start:end]):
            boundary = start + found.start()
            quotes += sum(token == b'"' for token in _QUOTES.findall(self._data, place, boundary))
            if quotes % 2:
                return boundary + 1
            place = boundary
        return None

    def _unfinished(self, start: int, dropped: int) -> bytes | Reason | None:
        """What the text ends in: a broken row, unless more than this one is missing."""
        self._at = len(self._data)
        size = dropped + self._at - start
        if self._is_inside or self._text.damage is not None or not size:
            return None
        return too_long(size, self._max_bytes) if size > self._max_bytes else bytes(self._data[start:])

    def _recover(self) -> None:
        """After a broken row: go to the next line that begins one, where rows begin lines."""
        if self._indent is None:
            return
        begins = re.compile(rb"\n" + re.escape(self._indent) + rb"\{")
        while (found := begins.search(self._data, self._at)) is None:
            # The end of the array may be in what is passed over, and the mark of a row in two pieces.
            keep = min(len(self._data) - self._at, len(self._indent) + 64)
            self._at = len(self._data) - keep
            self._drop(self._at)
            if not self._more():
                self._is_inside = self._is_inside and not self._data.rstrip().endswith(b"]")
                self._at = len(self._data)
                return
        self._at = found.start()
