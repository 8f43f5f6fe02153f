"""A row of a program as a line of JSON: what JSON has not is written the obvious way, or refuses its row by name.

A value that has no text (an image, an object) becomes {"not JSON": its type}, which refuses its row where it is read,
and does no harm where nobody reads it. An item that is no row becomes a line that gives its reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

from gvendi_fast.data.records import MAX_DEPTH, NOT_JSON, REFUSED, Fields

_TEXT = Fields().text


class _RefusedError(Exception):
    """Why something is no row."""


def row_line(row: Any, text: str = _TEXT, messages: str = Fields().messages) -> bytes:
    """The line of one row, with its end.

    text: the field of a row that is a string. messages: that of a row that is a list of dicts.
    """
    if isinstance(row, str):
        row = {text: str(row)}
    elif isinstance(row, list) and row and all(isinstance(item, Mapping) for item in row):
        row = {messages: row}
    # Most rows are plain, and are written by the encoder alone.
    if type(row) is dict:
        try:
            return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError):
            pass
    try:
        record = _plain(row._asdict() if hasattr(row, "_asdict") else row, 0)
        if not isinstance(record, dict) or list(record) == [NOT_JSON]:
            raise _RefusedError(f"the row is no dict and no text ({_name_of(row)})")
        # Half a character can be spelled in ASCII only.
        return json.dumps(record, allow_nan=False).encode() + b"\n"
    except _RefusedError as error:
        return json.dumps(f"{REFUSED}{error}").encode() + b"\n"


def _plain(value: Any, depth: int) -> Any:
    """The value as JSON has it."""
    if depth > MAX_DEPTH:
        raise _RefusedError(f"the row is nested too deeply, more than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, depth + 1)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        # Python writes no longer ones, which nobody has to read.
        return int(value) if abs(value) < 1 << 4096 else {NOT_JSON: "int of too many digits"}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return _object(value, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _object({field.name: getattr(value, field.name) for field in fields}, depth)
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        # In an order that another process has as well.
        return sorted(
            (_plain(item, depth + 1) for item in value), key=lambda item: json.dumps(item, sort_keys=True)
        )
    return _leaf(value, depth)


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    found = {_key(key): _plain(item, depth + 1) for key, item in value.items()}
    if len(found) < len(value):
        raise _RefusedError("the row has two keys that are one as text")
    return found


def _key(key: Any) -> str:
    key = key.value if isinstance(key, enum.Enum) else key
    return json.dumps(key) if key is None or isinstance(key, bool) else str(key)


def _leaf(value: Any, depth: int) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {NOT_JSON: _name_of(value)}
    # What pandas has in place of a missing value.
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(os.fspath(value))
    package = type(value).__module__.split(".")[0]
    # An array, tensor or series, or one number of one; times are an int in it.
    if package == "numpy" and getattr(getattr(value, "dtype", None), "kind", "") in "mM":
        return value.astype(str).tolist() if value.shape else str(value)
    for name in ("tolist", "as_py", "to_pylist", "model_dump"):
        method = getattr(value, name, None)
        if callable(method) and package not in ("builtins", "PIL"):
            try:
                made = method()
            # A time that Python has not, or a tensor without memory.
            except (TypeError, ValueError, RuntimeError, OverflowError):
                break
            return {NOT_JSON: _name_of(value)} if type(made) is type(value) else _plain(made, depth + 1)
    return {NOT_JSON: _name_of(value)}


def _name_of(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
