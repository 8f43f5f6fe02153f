"""Fields that the user named and no row has are told of before the corpus is sketched, not hours later."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.data.kinds import is_table
from gvendi_fast.data.manifest import Manifest
from gvendi_fast.data.rows import Fields, Rejected, Row
from gvendi_fast.data.sources import open_table, records_of_file
from gvendi_fast.data.work_units import UnitReader

# Rows whose fields are listed, and names that an error lists.
FIRST_ROWS, MOST_NAMES = 64, 20
# {field of `Fields`: whether a row was read with it}. A prompt that is a list of messages is a conversation.
_USED: dict[str, Callable[[Row], bool]] = {
    "prompt": lambda row: row.prompt is not None or row.messages is not None,
    "completion": lambda row: row.completion is not None or row.messages is not None,
    "messages": lambda row: row.messages is not None,
    "text": lambda row: row.text is not None,
    "id": lambda row: row.id != f"{row.file}:{row.line}",
    "by": lambda row: row.group != "",
}


def check_named_fields(manifest: Manifest) -> None:
    """Raise GvendiError for a named field that no readable row has (`fault_of_named_fields`)."""
    if (fault := fault_of_named_fields(manifest)) is not None:
        raise fault


def fault_of_named_fields(manifest: Manifest) -> GvendiError | None:
    """What is wrong with a field that was named, `by` or one other than the default, and that no readable row has.

    Reads up to the first row that has it, which is one row as a rule. A corpus without a readable row is not judged.
    """
    usual = Fields()
    names = {name: getattr(manifest.fields, name) for name in _USED}
    missing = [name for name, field in names.items() if field != getattr(usual, name)]
    is_readable = False
    for row in _rows(manifest) if missing else ():
        is_readable = True
        missing = [name for name in missing if not _USED[name](row)]
        if not missing:
            return None
    if not missing or not is_readable:
        return None
    name = missing[0]
    argument = name if name == "by" else f"{name}_field"
    # Another form of the row may have come before.
    what = "which no row has" if name in ("by", "id") else "and no row was read from it"
    return GvendiError(f"{argument} is {names[name]!r}, {what}; {_advice(manifest, names[name])}")


def _rows(manifest: Manifest) -> Iterator[Row]:
    with UnitReader(manifest) as reader:
        for unit in manifest.units:
            for row in reader.read(unit):
                if not isinstance(row, Rejected):
                    yield row


def _advice(manifest: Manifest, field: str) -> str:
    """What the first rows have instead."""
    seen = list(dict.fromkeys(name for record in _records(manifest) for name in _names(record)))
    if not seen:
        return "name a field of the rows"
    near = difflib.get_close_matches(field, seen, 1)
    more = f" and {len(seen) - MOST_NAMES} more" if len(seen) > MOST_NAMES else ""
    meant = f"; did you mean '{printable(near[0])}'?" if near else ""
    return f"the first rows have {printable(', '.join(seen[:MOST_NAMES]))}{more}{meant}"


def _records(manifest: Manifest) -> list[Any]:
    source = manifest.files[0]
    path = source.here or source.path
    if is_table(source.kind):
        with open_table(path, source.kind, manifest.fields) as table:
            # Of a table all columns, not only those in use.
            rows = table.rows(columns=table.usable(table.present))
            return [record for _, record in islice(rows, FIRST_ROWS)]
    return [record for _, record in islice(records_of_file(path, source.kind, manifest.fields), FIRST_ROWS)]


def _names(record: Any) -> Iterator[str]:
    """The fields of a row, and those of its objects as dotted paths."""
    for name, value in record.items() if isinstance(record, dict) else ():
        yield name
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else ()
