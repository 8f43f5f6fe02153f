"""How many bytes of text the rows of a table hold: of each row by itself, however the file has them in batches."""

from __future__ import annotations

from typing import Any

import numpy as np

# Of a value of a type whose size depends on how it is stored.
_ANY = 8


def row_sizes(batch: Any) -> np.ndarray:
    """Bytes of the values of each row of a batch of Arrow, int64 [n]: texts as they are, a number's width, 0 for null.

    A batch that is not what it says has rows of 0 bytes: only reading a row by itself tells what is wrong with it.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        return np.zeros(batch.num_rows, np.int64)
    return sum((_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))


def _sizes(column: Any) -> np.ndarray:
    import pyarrow
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = column.type
    if isinstance(column, pyarrow.ExtensionArray):
        return _sizes(column.storage)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        column = column.cast("large_binary" if types.is_binary_view(kind) else "large_string")
        kind = column.type
    if (
        types.is_string(kind)
        or types.is_binary(kind)
        or types.is_large_string(kind)
        or types.is_large_binary(kind)
    ):
        return _counts(compute.binary_length(column))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        ends = np.cumsum(counts := _counts(compute.list_value_length(column)))
        until = _until(_sizes(column.flatten()))
        return until[ends] - until[ends - counts]
    if types.is_map(kind):
        # Which those functions do not take.
        ends, until = np.asarray(column.offsets), _until(_sizes(column.keys) + _sizes(column.items))
        return (until[ends[1:]] - until[ends[:-1]]) * _numbers(column.is_valid(), 0)
    if types.is_struct(kind):
        return sum(map(_sizes, column.flatten()), np.zeros(len(column), np.int64))
    if types.is_dictionary(kind):
        # One more for null.
        values = np.concatenate((_sizes(column.dictionary), [0]))
        return values[_numbers(column.indices.cast("int64"), len(values) - 1)]
    width = (kind.bit_width + 7) // 8 if types.is_primitive(kind) else _ANY
    return np.where(_numbers(column.is_valid(), 0), width, 0).astype(np.int64)


def _until(sizes: np.ndarray) -> np.ndarray:
    """Bytes of all values before each, and of all, int64 [n + 1]."""
    return np.concatenate(([0], np.cumsum(sizes)))


def _counts(lengths: Any) -> np.ndarray:
    return _numbers(lengths, 0).astype(np.int64)


def _numbers(column: Any, null: int) -> np.ndarray:
    return (column.fill_null(null) if column.null_count else column).to_numpy(zero_copy_only=False)
