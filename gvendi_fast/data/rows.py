"""What one row of a corpus is: its three forms, its id and its group, and the reasons to reject a row."""

from __future__ import annotations

import decimal
import json
import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gvendi_fast.data.records import (
    MAX_DEPTH,
    Fields,
    Reason,
    Unread,
    decode_line,
    field_of,
    kind_of_value,
    lone_surrogate,
    nests_deeper,
    problem_in,
    surrogate_in,
    text_of,
)
from gvendi_fast.data.shapes import reader_of

__all__ = [
    "MAX_DEPTH",
    "MAX_NAME",
    "MAX_ROW_BYTES",
    "Fields",
    "Reason",
    "Rejected",
    "Row",
    "decode_line",
    "field_of",
    "kind_of_reason",
    "lone_surrogate",
    "nests_deeper",
    "parse_row",
    "record_group",
    "record_id",
    "row_reader",
]

# Bytes of a row, where nothing else is asked for: a longer one is refused before it is held in memory.
MAX_ROW_BYTES = 1 << 23
# Characters of an id and of a group's name, which are stored with every sketch.
MAX_NAME = 1 << 16
# The first integer that a float may stand for together with others.
_EXACT = 1 << 53


@dataclass(slots=True)
class Row:
    """One readable row; exactly one of the pair (`prompt`, `completion`), `messages` and `text` is set.

    row: its ordinal within the work unit.
    id: its own, or one made of file and line.
    group: the value of the field that makes groups, or "".
    file: the path of its file.
    line: its line (JSON lines) or row (Parquet) in the file, from 1.
    tools: JSON schemas of the tools that a conversation may call.
    """

    row: int
    id: str
    group: str
    file: str
    line: int
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None

    def texts(self) -> list[tuple[str, str]]:
        """(role, text) of each of its texts; outside a conversation the role is the field's name."""
        if self.messages is not None:
            return [(message["role"], message["content"]) for message in self.messages]
        if self.text is not None:
            return [("text", self.text)]
        return [("prompt", self.prompt), ("completion", self.completion)]


@dataclass(slots=True)
class Rejected:
    """A row that cannot be scored: where it is and why; `id` is None if it could not be read."""

    file: str
    line: int
    reason: str
    id: str | None = None


# What of a reason differs from row to row, and what stands in its place.
_DETAILS = [
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (r"(broken (?:JSON|CSV|Arrow)|invalid UTF-8|damaged (?:archive|file)): .*", r"\1"),
        (r"(chat template(?: refused the messages)?): .*", r"\1"),
        (r"too long: .*, (--[a-z-]+) is ([\d,]+)", r"too long (\1 is \2)"),
        (r"duplicate id .*", "duplicate id"),
        (r"message \d+(: '[a-z]+' is) .*; wanted 0 or 1, .*", r"a message\1 neither 0 nor 1"),
        (r"message \d+: unknown role .*", "a message of unknown role"),
        (r"message \d+(:? .*)", r"a message\1"),
        (r"token \d+ (of the tokenizer is beyond .*)", r"a token \1"),
        (r"(field .*) has [\d,]+ characters; .*", r"\1 is too long"),
        (r"(field .* has a value beyond Python's): .*", r"\1"),
    )
]


def kind_of_reason(reason: str) -> str:
    """The reason without what is one row's own (a column, an id, a size), so that it can be counted."""
    for pattern, kind in _DETAILS:
        if found := pattern.fullmatch(reason):
            return found.expand(kind)
    return reason


def record_id(record: dict, fields: Fields) -> str | Reason | None:
    """The row's own id, None when it has none, or why it cannot be used.

    A string, a whole number (also a float, as pandas writes them beside a null), or a UUID (also its 16 bytes).
    """
    value = record.get(fields.id)
    if value is None:
        return None
    if type(value) is str and value.isascii() and len(value) <= MAX_NAME:
        return value
    if isinstance(value, str):
        return surrogate_in(fields.id) if lone_surrogate(value) else _name(value, fields.id)
    return _plain_id(value, fields.id)


def _plain_id(value: Any, field: str) -> str | Reason | None:
    if isinstance(value, Unread):
        return value.reason
    if isinstance(value, bytes):
        # No UUID of the standard's variants is ASCII.
        if len(value) == 16 and not value.isascii():
            return str(uuid.UUID(bytes=value))
        text = text_of(value, field)
        return text if isinstance(text, Reason) else _name(text, field)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= _EXACT:
            return Reason(f"field '{field}' is a float from 2^53 on, which may have lost its last digits")
        return str(int(value))
    if isinstance(value, decimal.Decimal):
        # As many digits as Arrow has, so that an exponent does not write out more.
        is_whole = value.is_finite() and value.adjusted() < 80 and value == value.to_integral_value()
        return str(int(value)) if is_whole else _no_id(value, field)
    # NumPy's integers, too.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return _no_id(value, field)
    return _name(str(int(value)), field)


def _no_id(value: Any, field: str) -> Reason:
    return Reason(f"field '{field}' is not a string or an integer ({kind_of_value(value)})")


def record_group(record: dict, by: str | None) -> str | Reason:
    """The group of a row: a string as it is, another value as JSON, and "" where the field is missing or null."""
    if by is None:
        return ""
    value = field_of(record, by)
    if value is None:
        return ""
    if isinstance(value, bytes):
        # Bytes that are no text have made a group of their own, by the name that Python gives them.
        text = text_of(value, by)
        value = value if isinstance(text, Reason) else text
    problem = problem_in(value, by)
    if problem is not None:
        return problem
    return _name(
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str),
        by,
    )


def _name(value: str, field: str) -> str | Reason:
    if len(value) > MAX_NAME:
        return Reason(f"field '{field}' has {len(value):,} characters; wanted at most {MAX_NAME:,}")
    return value


def row_reader(fields: Fields) -> Callable[[dict | Reason, int, str, int], Row | Rejected]:
    """What makes (record, row, file, line) a row or its rejection with a short reason; made once for all rows.

    Raises GvendiError as `shapes.check_format` does.
    """
    content_of, by, key = reader_of(fields), fields.by, fields.id

    def read(record: dict | Reason, row: int, file: str, line: int) -> Row | Rejected:
        # A record, nearly always, whose own type is the fastest test.
        if type(record) is not dict and isinstance(record, Reason):
            return Rejected(file, line, str(record))
        own = record_id(record, fields) if key in record else None
        if type(own) is Reason:
            return Rejected(file, line, str(own))
        group = "" if by is None else record_group(record, by)
        content = group if type(group) is Reason else content_of(record)
        if type(content) is Reason:
            return Rejected(file, line, str(content), own)
        return Row(row, f"{file}:{line}" if own is None else own, group, file, line, *content)

    return read


def parse_row(record: dict | Reason, fields: Fields, row: int, file: str, line: int) -> Row | Rejected:
    """The row of one record, or its rejection with a short reason."""
    return row_reader(fields)(record, row, file, line)
