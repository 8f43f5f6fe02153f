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
from zlib import crc32


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
