"""Batches of Arrow as records, one at a time: a row that cannot be one is refused alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gvendi_fast.data.arrow_values import is_plain, plain
from gvendi_fast.data.json_lines import too_long
from gvendi_fast.data.rows import Reason

# Rows of a table at a time, at most, and about how many bytes of them.
BATCH_ROWS, BATCH_BYTES = 256, 1 << 23


def records(batch: Any, max_bytes: int) -> Iterable[dict | Reason]:
    """The rows of a batch; one that is longer than `max_bytes`, is not UTF-8 or has no value in Python is a Reason."""
    import pyarrow

    if _at_most(batch) > max_bytes:
        return (_record(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows))
    try:
        return (batch if is_plain(batch.schema) else plain(batch)).to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        # Only the rows that hold the bad cells are lost, so this batch is read again one by one.
        return [_record(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows)]


def _record(row: Any, max_bytes: int) -> dict | Reason:
    import pyarrow

    size = _at_most(row)
    if size > max_bytes:
        return too_long(size, max_bytes)
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record.update(plain(row.select([name])).to_pylist()[0])
        except UnicodeDecodeError as error:
            return Reason(
                f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
            )
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            return Reason(f"field '{name}' ({column.type}) has a value beyond Python's: {first_line(error)}")
    return record


def _at_most(batch: Any) -> int:
    """Bytes of a batch's rows, at most: `nbytes` counts a dictionary once, however many rows repeat its values."""
    import pyarrow.types as types

    size = 0
    for column in batch.columns:
        if types.is_dictionary(column.type):
            column = column.dictionary_decode() if len(column) == 1 else column
            size += column.nbytes * (len(column) if types.is_dictionary(column.type) else 1)
        elif types.is_string_view(column.type) or types.is_binary_view(column.type):
            # The bytes of a view's values, which its slices share, can only be told from a copy.
            size += column.cast(
                "large_binary" if types.is_binary_view(column.type) else "large_string"
            ).nbytes
        else:
            size += column.nbytes
    return size


def depth(kind: Any) -> int:
    """How many levels an Arrow type nests."""
    levels, level = 0, [kind]
    while level:
        levels += 1
        level = [type_.field(index).type for type_ in level for index in range(type_.num_fields)]
    return levels


def first_line(error: Exception) -> str:
    """What a library says first."""
    return (str(error).splitlines() or [type(error).__name__])[0]
