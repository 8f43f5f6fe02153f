"""What the two kinds of tables, Parquet and Arrow, have in common: which columns are read, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from gvendi_fast.data.arrow_rows import depth
from gvendi_fast.data.listing import SKIP, UnreadableFileError
from gvendi_fast.data.rows import MAX_DEPTH, Fields, Reason
from gvendi_fast.data.shapes import columns_of


class Table(Protocol):
    """Rows that can be read from any of them on, for one thread at a time: what an index and a work unit need.

    path: how the table is called.
    present: names of all columns.
    columns: those that a row's fields are read from, where the table has them.
    group_rows: how many rows lie in each of its groups, whose bytes have a checksum each.
    remarks: sentences on what is odd about the file, which go on "corpus: 'path' ...".
    """

    path: str
    present: list[str]
    columns: list[str]
    group_rows: list[int]
    remarks: list[str]

    def __enter__(self) -> Table: ...

    def __exit__(self, *_: object) -> None: ...

    def usable(self, names: Iterable[str]) -> list[str]:
        """Those that are columns, one each, and nest no deeper than rows may."""

    def rows(
        self, start: int = 0, columns: Iterable[str] | None = None
    ) -> Iterator[tuple[int, dict | Reason]]:
        """(1-based row number, record) from row `start` (0-based) on; columns: None for `columns`, else any."""

    def picked(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(number, batch of one row with all columns) of the rows with these ascending numbers, from 0."""

    def check(self, limit: int | None, look: Callable[[Any], None] | None = None) -> int:
        """How many rows there are, up to `limit`; UnreadableFileError where the columns in use of them are damaged.

        look: called with each batch of these columns, from the first row to the last one, and perhaps more.
        """

    def fingerprint(self, rows: int, digest: Any) -> tuple[int, list[int]]:
        """Update `digest` with the bytes that hold the first `rows` rows; CRC-32 of the rest and of each group."""

    def footer_sum(self) -> int:
        """The first checksum of `fingerprint`, of the file as it is now."""

    def group_sum(self, index: int) -> int:
        """The checksum of a group, of the file as it is now."""


def wanted_columns(path: str, schema: Any, fields: Fields) -> list[str]:
    """The columns of an Arrow schema that rows are read from.

    Raises UnreadableFileError where one of them is there twice, or nests too deeply.
    """
    present = list(schema.names)
    wanted = [*columns_of(fields), fields.id]
    if fields.by is not None:
        wanted.append(fields.by if fields.by in present else fields.by.split(".")[0])
    columns = [name for name in dict.fromkeys(wanted) if name in present]
    for name in columns:
        if present.count(name) > 1:
            raise UnreadableFileError(
                f"corpus: '{path}' has {present.count(name)} columns '{name}'; keep one"
            )
        if depth(schema.field(name).type) > MAX_DEPTH:
            raise UnreadableFileError(
                f"corpus: column '{name}' of '{path}' nests more than {MAX_DEPTH} levels deep; flatten it"
            )
    return columns


def usable_columns(schema: Any, names: Iterable[str]) -> list[str]:
    """`Table.usable` of an Arrow schema."""
    present = list(schema.names)
    return [
        name
        for name in dict.fromkeys(names)
        if present.count(name) == 1 and depth(schema.field(name).type) <= MAX_DEPTH
    ]


def unreadable(path: str, what: str, why: str) -> UnreadableFileError:
    """The error of a table that cannot be read."""
    return UnreadableFileError(
        f"corpus: '{path}' is not a readable {what} file ({why}); fetch or write it again, or {SKIP}"
    )
