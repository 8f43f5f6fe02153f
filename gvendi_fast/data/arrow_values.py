"""Arrow columns as values of Python that are the same on every machine.

pyarrow gives nanoseconds as a type of pandas where that is installed, whose text is another one, and needs a database
of time zones for the local time of a moment. Here nanoseconds are microseconds, and a moment is one of UTC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def is_plain(schema: Any) -> bool:
    """Whether `plain` changes nothing in batches of this schema."""
    return all(_type(field.type, _micros) == field.type for field in schema)


def plain(batch: Any) -> Any:
    """A record batch with microseconds for nanoseconds, and UTC; ArrowInvalid where that would lose digits."""
    return _moved(batch, _micros)


def spelled(batch: Any) -> Any:
    """A record batch with texts in place of times: those that Python has no value for can be written, too."""
    return _moved(batch, _text)


def undecoded(batch: Any) -> Any:
    """A record batch with bytes in place of texts: those that are no UTF-8 can be had, too."""
    return _moved(batch, _bytes)


def _moved(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    import pyarrow

    types = [_type(field.type, leaf) for field in batch.schema]
    if all(new == field.type for new, field in zip(types, batch.schema, strict=True)):
        return batch
    columns = [
        column if new == column.type else _cast(column, new)
        for column, new in zip(batch.columns, types, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cast(column: Any, new: Any) -> Any:
    import pyarrow
    import pyarrow.types as of

    if of.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    if len(column) == 1:
        # A slice of a list holds all of its list's items, and the cast would look at those of other rows.
        column = column.take(pyarrow.array([0]))
    return column.cast(new)


def _micros(kind: Any) -> Any:
    import pyarrow
    import pyarrow.types as of

    if of.is_timestamp(kind):
        unit = "us" if kind.unit == "ns" else kind.unit
        # A name would be looked up in a database that some machines lack.
        zone = None if kind.tz is None else "+00:00"
        return kind if (unit, zone) == (kind.unit, kind.tz) else pyarrow.timestamp(unit, zone)
    if of.is_time64(kind) and kind.unit == "ns":
        return pyarrow.time64("us")
    if of.is_duration(kind) and kind.unit == "ns":
        return pyarrow.duration("us")
    return kind


def _text(kind: Any) -> Any:
    import pyarrow
    import pyarrow.types as of

    return pyarrow.string() if of.is_temporal(kind) and not of.is_interval(kind) else kind


def _bytes(kind: Any) -> Any:
    import pyarrow
    import pyarrow.types as of

    is_text = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    return pyarrow.large_binary() if is_text else kind


def _type(kind: Any, leaf: Callable[[Any], Any]) -> Any:
    """A type with `leaf` of its times, wherever they are nested; the same object where none changes."""
    import pyarrow
    import pyarrow.types as of

    if of.is_dictionary(kind):
        new = _type(kind.value_type, leaf)
        return kind if new == kind.value_type else new
    if isinstance(kind, pyarrow.BaseExtensionType):
        storage = kind.storage_type
        new = _type(storage, leaf)
        return kind if new == storage else new
    if kind.num_fields == 0:
        return leaf(kind)
    fields = [kind.field(index) for index in range(kind.num_fields)]
    moved = [field.with_type(_type(field.type, leaf)) for field in fields]
    if moved == fields:
        return kind
    if of.is_struct(kind):
        return pyarrow.struct(moved)
    if of.is_map(kind):
        return pyarrow.map_(kind.key_field.with_type(_type(kind.key_type, leaf)), _item(kind, leaf))
    if of.is_fixed_size_list(kind):
        return pyarrow.list_(moved[0], kind.list_size)
    if of.is_large_list(kind):
        return pyarrow.large_list(moved[0])
    # A view of a list is one of its values, too.
    return (
        pyarrow.large_list(moved[0]) if str(kind).startswith("large_list_view") else pyarrow.list_(moved[0])
    )


def _item(kind: Any, leaf: Callable[[Any], Any]) -> Any:
    return kind.item_field.with_type(_type(kind.item_type, leaf))
