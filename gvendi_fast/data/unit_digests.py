"""What the rows of a work unit were read from, as a checksum that the index takes and every later reading checks.

Text: CRC-32 over the numbers and contents of the work unit's lines, decompressed, without the ends of lines, or of its
rows, where they are no lines.
Tables: CRC-32 over those of the row groups that hold its rows and of the footer, as the file has them.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from zlib import crc32

from gvendi_fast.base.places import status_of
from gvendi_fast.data.rows import Fields
from gvendi_fast.data.sources import open_table


def line_digest(so_far: int, line: int, payload: bytes | str) -> int:
    """The checksum of lines (0 for none) with one more: its number, and its content or why it could not be read."""
    # Two shortcuts for the common case, as this is done for every line of a corpus, twice.
    if type(payload) is not bytes:
        payload = payload.encode("utf-8", "surrogatepass")
    return crc32(payload, so_far ^ line)


def shown(digest: int) -> str:
    """A checksum as `Unit.digest` has it."""
    return f"{digest:08x}"


def groups_digest(footer: int, groups: Sequence[int]) -> str:
    """`Unit.digest` of a table's rows by the checksums of its footer and of the row groups that hold them."""
    return shown(crc32(struct.pack(f"<{1 + len(groups)}I", footer, *groups)))


def groups_of(group_rows: Sequence[int], first: int, rows: int) -> range:
    """The row groups that hold `rows` rows from row `first` (from 0) of their file on."""
    ends = [*accumulate(group_rows)]
    return range(bisect_right(ends, first), bisect_left(ends, first + rows) + 1)


class GroupSums:
    """Checksums of a table's row groups, each read once as long as the system says that the file is the same.

    The time of a file's last change of status cannot be set back, as that of its content can.
    """

    def __init__(self, path: str, kind: str) -> None:
        self.path, self.kind = path, kind
        self._status: tuple[Any, ...] = ()
        self._footer = 0
        self._rows: list[int] = []
        self._sums: dict[int, int] = {}

    def digest(self, first: int, rows: int) -> str:
        """`Unit.digest` of `rows` rows from row `first` (from 0) on, as the file is now."""
        status = status_of(self.path)
        if status != self._status:
            with open_table(self.path, self.kind, Fields()) as source:
                self._rows, self._footer = source.group_rows, source.footer_sum()
            self._status, self._sums = status, {}
        wanted = groups_of(self._rows, first, rows)
        missing = [group for group in wanted if group not in self._sums and group < len(self._rows)]
        if missing:
            with open_table(self.path, self.kind, Fields()) as source:
                # Rows are read in order, so that the row groups before these are done with.
                self._sums = {group: self._sums[group] for group in wanted if group in self._sums}
                self._sums |= {group: source.group_sum(group) for group in missing}
        return groups_digest(self._footer, [self._sums.get(group, 0) for group in wanted])
