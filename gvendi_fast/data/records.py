"""The record of a row before anyone knows its shape: names of its fields, the object of a JSON line, and plain texts.

What cannot be read (bytes that are no UTF-8, an integer of too many digits, what nests too deeply) spoils the field
that holds it and no other: an `Unread` lies in its place, and whoever wants that field refuses the row with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvendi_fast.data import json_scanner
from gvendi_fast.data.json_scanner import scan

# Levels of objects and lists in a row. Python's own limit depends on its version and on who calls.
MAX_DEPTH = 64
# Digits of an integer: Python's limit, which older versions lack and an environment variable can lift.
_MAX_DIGITS = 4300
# Bytes of a line that cannot hold a longer one.
MAX_SCANNED = _MAX_DIGITS
_SURROGATE = re.compile("[\ud800-\udfff]")
# How "surrogateescape" writes bytes that are no UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_STRING = re.compile(rb'"[^"]*"?')
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)


@dataclass(frozen=True)
class Fields:
    """Names of the fields a row is read from, and the shape of its rows.

    A row is a prompt with its completion, else messages, else a text: the first form that is complete wins, and a
    field that is null counts as absent. Another shape is named by `format`, or recognised (see shapes.py).

    prompt, completion: of a pair.
    messages: of a conversation.
    text: of a plain text.
    id: of the row's id; a row may lack it.
    by: of the row's group; it may be a dotted path such as "meta.task" (a field of exactly that name goes first).
    format: "auto", "fields" (the forms above), or a name of `shapes.SHAPES`.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    id: str = "id"
    by: str | None = None
    format: str = "auto"


# How a row of a program, written as JSON, holds a value that JSON has not, and one that is no row (json_rows.py).
NOT_JSON, REFUSED = "not JSON", "refused: "


class Reason(str):
    """Why something cannot be used; a type of its own, so that it is never mistaken for data."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Unread:
    """In the place of a value that could not be read, with the reason to refuse a row that needs it."""

    reason: Reason


_TOO_DEEP = Reason(f"broken JSON: nested too deeply, more than {MAX_DEPTH} levels")
_TOO_MANY_DIGITS = Reason("broken JSON: an integer has too many digits")
# An integer that stands for what was cut out, as it is read by `_integer` like any other of too many digits.
_CUT = "7" * (_MAX_DIGITS + 1)


def decode_line(raw: bytes) -> dict | Reason:
    """The JSON object of one line, or why there is none. Strict UTF-8: nothing is replaced or guessed.

    As Python has it, the last of equal keys counts, and NaN and Infinity are numbers.
    """
    # Most lines are decoded by the scanner alone; whatever it does not take as it is goes the long way from the start.
    if len(raw) <= MAX_SCANNED and _opens_few(raw):
        try:
            record = scan(raw)
        except json_scanner.REFUSED:
            return _decode_slowly(raw)
        if type(record) is dict:
            return record
    return _decode_slowly(raw)


def decode_lines(lines: Sequence[bytes], are_simple: Sequence[bool]) -> Iterator[dict | Reason]:
    """`decode_line` of each; are_simple: whether it has at most MAX_SCANNED bytes and opens at most MAX_DEPTH times."""
    refused = json_scanner.REFUSED
    for raw, is_simple in zip(lines, are_simple, strict=True):
        record = None
        if is_simple:
            try:
                record = scan(raw)
            except refused:
                record = None
        yield record if type(record) is dict else _decode_slowly(raw)


def _decode_slowly(raw: bytes) -> dict | Reason:
    record = _decoded(raw)
    if isinstance(record, dict | Reason):
        return record
    if isinstance(record, str) and record.startswith(REFUSED):
        return Reason(record.removeprefix(REFUSED))
    return Reason(f"broken JSON: an object is wanted, not {kind_of_value(record)}")


def _decoded(raw: bytes) -> Any:
    """Whatever JSON holds, or a Reason."""
    whole, bad = raw, None
    if nests_deeper(raw, MAX_DEPTH):
        whole, bad = _without_depths(raw), _TOO_DEEP
        if whole is None:
            return bad
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError:
        bad = _no_utf8(raw) or bad
        text = whole.decode("utf-8", "surrogateescape")
    if text.startswith("\ufeff"):
        return Reason("broken JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1")
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if bad is not None:
            return bad
        # Columns count from a line's beginning, and a carriage return begins none.
        if error.msg == "Extra data" and b"\r" in raw:
            return Reason(
                "broken JSON: several rows on one line; end lines with newlines, not carriage returns"
            )
        return Reason(f"broken JSON: {error.msg} at column {error.colno}")
    return record if bad is None else _with_unread(record, bad)


def _no_utf8(raw: bytes) -> Reason | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reason(f"invalid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}")
    return None


def _with_unread(value: Any, reason: Reason) -> Any:
    """The value with an Unread for every string that holds bytes which are no UTF-8."""
    if isinstance(value, str):
        return Unread(reason) if not value.isascii() and _ESCAPED_BYTE.search(value) else value
    if isinstance(value, dict):
        return {key: _with_unread(item, reason) for key, item in value.items()}
    return [_with_unread(item, reason) for item in value] if isinstance(value, list) else value


def _integer(digits: str) -> int | Unread:
    if len(digits) > _MAX_DIGITS:
        return Unread(_TOO_DEEP if digits == _CUT else _TOO_MANY_DIGITS)
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def _opens_few(raw: bytes) -> bool:
    """Whether at most MAX_DEPTH objects and lists can open in a line."""
    # One object and no list is what most lines are, and a search costs a fifth of a count.
    return (b"[" not in raw and raw.rfind(b"{") <= 0) or raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH


def nests_deeper(raw: bytes, depth: int) -> bool:
    """Whether JSON nests objects and lists more than `depth` levels; told from its brackets, without recursion."""
    if raw.count(b"[") + raw.count(b"{") <= depth:
        return False
    # Brackets inside strings do not count; without escapes a string ends at the next quote.
    bare = _STRING.sub(b"", raw.replace(b"\\\\", b"").replace(b'\\"', b""))
    level = 0
    for byte in bare.translate(None, _NO_BRACKETS):
        level += 1 if byte in b"[{" else -1
        if level > depth:
            return True
    return False


def _without_depths(raw: bytes) -> bytes | None:
    """The JSON with `_CUT` for each value that lies too deep; None where one of them never ends."""
    kept, start, level = [], 0, 0
    for token in _TOKEN.finditer(raw):
        byte = raw[token.start()]
        if byte in b"[{":
            level += 1
            if level == MAX_DEPTH + 1:
                kept += [raw[start : token.start()], _CUT.encode()]
        elif byte in b"]}":
            if level == MAX_DEPTH + 1:
                start = token.end()
            level -= 1
    return None if level > MAX_DEPTH else b"".join([*kept, raw[start:]])


def decode_value(text: str, field: str) -> Any:
    """What a field holds that is JSON written as a string, such as a list of messages; a Reason for anything else."""
    value = _decoded(text.encode("utf-8", "surrogatepass"))
    return Reason(f"field '{field}' is a string that is no JSON") if isinstance(value, Reason) else value


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted path such as "meta.score" (a field of exactly that name goes first), else None."""
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if isinstance(value, Unread):
            return value
        value = value.get(step) if isinstance(value, dict) else None
    return value


def text_of(value: Any, field: str) -> str | Reason:
    """The text that a field holds, also as bytes of UTF-8, or why it is none."""
    if type(value) is str and value.isascii():
        return value
    if isinstance(value, bytes):
        return _no_utf8(value) or value.decode("utf-8")
    if not isinstance(value, str):
        return (
            value.reason
            if isinstance(value, Unread)
            else Reason(f"field '{field}' is not a string ({kind_of_value(value)})")
        )
    return surrogate_in(field) if lone_surrogate(value) else value


def surrogate_in(field: str) -> Reason:
    """Why a field with half a character cannot be used."""
    return Reason(f"invalid Unicode: lone surrogate in field '{field}'")


def problem_in(value: Any, field: str) -> Reason | None:
    """Why a value cannot be used somewhere in its depth: half a character, or what could not be read."""
    if isinstance(value, Unread):
        return value.reason
    if isinstance(value, str):
        return surrogate_in(field) if lone_surrogate(value) else None
    if isinstance(value, dict):
        for key, item in value.items():
            # Most keys and values are ASCII, for which no call is made.
            if type(item) is str and item.isascii() and type(key) is str and key.isascii():
                continue
            problem = problem_in(key, field) or problem_in(item, field)
            if problem is not None:
                return problem
    elif isinstance(value, list | tuple):
        return next(filter(None, (problem_in(item, field) for item in value)), None)
    return None


def unread_in(value: Any) -> Iterator[Unread]:
    """Whatever of a value could not be read."""
    if isinstance(value, Unread):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from unread_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from unread_in(item)


def readable(record: dict) -> dict:
    """A record without the fields of which something could not be read."""
    spoiled = [name for name, value in record.items() if next(unread_in(value), None) is not None]
    return {name: value for name, value in record.items() if name not in spoiled} if spoiled else record


def lone_surrogate(value: Any) -> bool:
    """JSON escapes can spell half a character, which no tokenizer and no file can take."""
    if isinstance(value, str):
        return not value.isascii() and _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        for key, item in value.items():
            # Most keys and values are ASCII, for which no call is made.
            if not (type(item) is str and item.isascii()) and lone_surrogate(item):
                return True
            if not (type(key) is str and key.isascii()) and lone_surrogate(key):
                return True
        return False
    return isinstance(value, (list, tuple)) and any(map(lone_surrogate, value))


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null, at every depth: Parquet gives every struct all fields."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of_value(value: Any) -> str:
    """The type of a value, as reasons name it."""
    if isinstance(value, dict) and list(value) == [NOT_JSON]:
        return str(value[NOT_JSON])
    return "null" if value is None else type(value).__name__
