"""What one row of a corpus is: its three forms, its id and its group, and the reasons to reject a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Bytes of a row, where nothing else is asked for: a longer one is refused before it is held in memory.
MAX_ROW_BYTES = 1 << 23
# Levels of objects and lists in a row. Python's own limit depends on its version and on who calls.
MAX_DEPTH = 64
# Characters of an id and of a group's name, which are stored with every sketch.
MAX_NAME = 1 << 16
# Digits of an integer: Python's limit, which older versions lack and an environment variable can lift.
_MAX_DIGITS = 4300
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING = re.compile(rb'"[^"]*"?')
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)


@dataclass(frozen=True)
class Fields:
    """Names of the fields a row is read from.

    A row is a prompt with its completion, else messages, else a text: the first form that is complete wins, and a
    field that is null counts as absent.

    prompt, completion: of a pair.
    messages: of a conversation.
    text: of a plain text.
    id: of the row's id; a row may lack it.
    by: of the row's group; it may be a dotted path such as "meta.task" (a field of exactly that name goes first).
    """

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    id: str = "id"
    by: str | None = None


@dataclass(slots=True)
class Row:
    """One readable row; exactly one of the pair (`prompt`, `completion`), `messages` and `text` is set.

    row: its ordinal within the work unit.
    id: its own, or one made of file and line.
    group: the value of the field that makes groups, or "".
    file: the path of its file.
    line: its line (JSON lines) or row (Parquet) in the file, from 1.
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
        (r"(broken JSON|invalid UTF-8|damaged archive|chat template(?: refused the messages)?): .*", r"\1"),
        (r"too long: .*, (--[a-z-]+) is ([\d,]+)", r"too long (\1 is \2)"),
        (r"duplicate id .*", "duplicate id"),
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


# How a row of a program, written as JSON, holds a value that JSON has not, and one that is no row (json_rows.py).
NOT_JSON, REFUSED = "not JSON", "refused: "


class Reason(str):
    """Why something cannot be used; a type of its own, so that it is never mistaken for data."""

    __slots__ = ()


def decode_line(raw: bytes) -> dict | Reason:
    """The JSON object of one line, or why there is none. Strict UTF-8: nothing is replaced or guessed.

    As Python has it, the last of equal keys counts, and NaN and Infinity are numbers.
    """
    # Most lines are decoded by the scanner alone; whatever it does not take as it is goes the long way from the start.
    if len(raw) <= _MAX_DIGITS and _opens_few(raw):
        try:
            text = raw.decode()
            record, end = _scan(text, 0)
        except (StopIteration, ValueError):
            return _decode_slowly(raw)
        if end == len(text) and type(record) is dict:
            return record
    return _decode_slowly(raw)


def _decode_slowly(raw: bytes) -> dict | Reason:
    if nests_deeper(raw, MAX_DEPTH):
        return Reason(f"broken JSON: nested too deeply, more than {MAX_DEPTH} levels")
    try:
        text = raw.decode("utf-8")
        if text.startswith("\ufeff"):
            return Reason("broken JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1")
        record = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Reason(f"invalid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        # Columns count from a line's beginning, and a carriage return begins none.
        if error.msg == "Extra data" and b"\r" in raw:
            return Reason(
                "broken JSON: several rows on one line; end lines with newlines, not carriage returns"
            )
        return Reason(f"broken JSON: {error.msg} at column {error.colno}")
    except _TooManyDigitsError:
        return Reason("broken JSON: an integer has too many digits")
    if not isinstance(record, dict):
        if isinstance(record, str) and record.startswith(REFUSED):
            return Reason(record.removeprefix(REFUSED))
        return Reason(f"broken JSON: an object is wanted, not {_kind(record)}")
    return record


class _TooManyDigitsError(Exception):
    """Of an integer."""


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _TooManyDigitsError
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
# For lines that are too short for an integer of too many digits.
_scan = json.JSONDecoder().scan_once


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


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted path such as "meta.score" (a field of exactly that name goes first), else None."""
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def record_id(record: dict, fields: Fields) -> str | Reason | None:
    """The row's own id, None when it has none, or why it cannot be used."""
    value = record.get(fields.id)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return Reason(f"field '{fields.id}' is not a string or an integer ({_kind(value)})")
    if lone_surrogate(value):
        return Reason(f"invalid Unicode: lone surrogate in field '{fields.id}'")
    return _name(str(value), fields.id)


def record_group(record: dict, by: str | None) -> str | Reason:
    """The group of a row: a string as it is, another value as JSON, and "" where the field is missing or null."""
    if by is None:
        return ""
    value = field_of(record, by)
    if value is None:
        return ""
    if lone_surrogate(value):
        return Reason(f"invalid Unicode: lone surrogate in field '{by}'")
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


def parse_row(record: dict | Reason, fields: Fields, row: int, file: str, line: int) -> Row | Rejected:
    """The row of one record, or its rejection with a short reason."""
    if isinstance(record, Reason):
        return Rejected(file, line, str(record))
    own = record_id(record, fields)
    if isinstance(own, Reason):
        return Rejected(file, line, str(own))
    group = "" if fields.by is None else record_group(record, fields.by)
    content = group if isinstance(group, Reason) else _content(record, fields)
    if isinstance(content, Reason):
        return Rejected(file, line, str(content), own)
    return Row(row, f"{file}:{line}" if own is None else own, str(group), file, line, *content)


def _content(record: dict, fields: Fields) -> tuple[Any, ...] | Reason:
    """Prompt, completion, messages and text, up to the last one that is set."""
    prompt, completion = record.get(fields.prompt), record.get(fields.completion)
    messages, text = record.get(fields.messages), record.get(fields.text)
    if prompt is not None and completion is not None:
        problem = _text_problem(prompt, fields.prompt) or _text_problem(completion, fields.completion)
        problem = problem or (None if completion.strip() else Reason("empty completion"))
        return problem or (prompt, completion)
    if messages is not None:
        cleaned = _clean_messages(messages, fields.messages)
        return cleaned if isinstance(cleaned, Reason) else (None, None, cleaned)
    if text is not None:
        problem = _text_problem(text, fields.text)
        problem = problem or (None if text.strip() else Reason(f"empty {fields.text}"))
        return problem or (None, None, None, text)
    if prompt is not None:
        return Reason(f"missing field '{fields.completion}'")
    if completion is not None:
        return Reason(f"missing field '{fields.prompt}'")
    return Reason(
        f"missing fields: none of '{fields.prompt}' with '{fields.completion}', '{fields.messages}', '{fields.text}'"
    )


def _clean_messages(messages: Any, field: str) -> list[dict[str, Any]] | Reason:
    if not isinstance(messages, list):
        return Reason(f"field '{field}' is not a list ({_kind(messages)})")
    cleaned = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return Reason(f"message {number} is not an object ({_kind(message)})")
        # Parquet gives every struct all fields, and templates ask only whether a field is there.
        message = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" in message:
            message.setdefault("content", "")
        for key in ("role", "content"):
            if key not in message:
                return Reason(f"message {number} has no '{key}'")
            if not isinstance(message[key], str):
                return Reason(f"message {number}: '{key}' is not a string ({_kind(message[key])})")
        cleaned.append(message)
    if lone_surrogate(cleaned):
        return Reason(f"invalid Unicode: lone surrogate in field '{field}'")
    assistant = [message for message in cleaned if message["role"] == "assistant"]
    if not assistant:
        return Reason("nothing supervised")
    if not any(message["content"].strip() or "tool_calls" in message for message in assistant):
        return Reason("empty completion")
    return cleaned


def _text_problem(value: Any, field: str) -> Reason | None:
    if type(value) is str and value.isascii():
        return None
    if not isinstance(value, str):
        return Reason(f"field '{field}' is not a string ({_kind(value)})")
    if lone_surrogate(value):
        return Reason(f"invalid Unicode: lone surrogate in field '{field}'")
    return None


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


def _kind(value: Any) -> str:
    if isinstance(value, dict) and list(value) == [NOT_JSON]:
        return str(value[NOT_JSON])
    return "null" if value is None else type(value).__name__
