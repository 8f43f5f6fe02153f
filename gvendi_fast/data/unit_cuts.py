"""Where the rows of a file are cut into work units, and how units.json says it.

A work unit ends with the row that makes it `rows` rows, or before the one that would make it more than `bytes` bytes; a
single larger row is a work unit of its own. The size of a row of text is that of its JSON, without a line's end (0 if
it is refused unread), and that of a table's row the sum of its values in the columns in use (row_sizes.py). So where a
work unit ends depends on the rows up to its end and the one behind it alone.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# A work unit is to take about so long. With fewer bytes there are too many parts, with more a kill loses too much.
_SECONDS = 60
_LEAST, _MOST = 1 << 14, 1 << 26
_RUN = re.compile(r"[1-9]\d*(\*[1-9]\d*)?", re.ASCII)
# What a file can have bytes of.
_COUNTED = 1 << 63


@dataclass(frozen=True, slots=True)
class Cut:
    """How large a work unit is, at most.

    rows: of rows.
    bytes: of their text; None: whatever it is.
    """

    rows: int
    bytes: int | None = None


def bytes_of_a_unit(rate: float) -> int:
    """The `Cut.bytes` with which a work unit takes about a minute where `rate` bytes of rows take a second.

    It is the nearest power of two from 16 KiB to 64 MiB, so that rates that are nearly the same give the same one.
    """
    wanted = min(max(rate * _SECONDS, _LEAST), _MOST)
    return 1 << round(log2(wanted))


def fitting(ends: np.ndarray, start: int, rows: int, size: int | None) -> int:
    """How many rows from row `start` on have at most `size` bytes (None: any) together, `rows` of them at most.

    ends: the bytes of all rows up to the end of each, int64 [n].
    """
    stop = min(start + rows, len(ends))
    if size is not None:
        before = int(ends[start - 1]) if start else 0
        stop = min(stop, int(ends.searchsorted(before + size, side="right")))
    return max(0, stop - start)


class Cutter:
    """The rows of each work unit of consecutive rows, by their sizes."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._whole: list[int] = []
        self._rows = self._bytes = 0

    def take(self, sizes: np.ndarray) -> None:
        """The bytes of the rows that come next, int64 [n]."""
        ends, start, most = sizes.cumsum(), 0, self._cut.bytes
        while start < len(ends):
            left = None if most is None else most - self._bytes
            count = fitting(ends, start, self._cut.rows - self._rows, left)
            if not count and self._rows:
                self._end()
                continue
            stop = start + max(1, count)
            self._rows += stop - start
            self._bytes += int(ends[stop - 1]) - (int(ends[start - 1]) if start else 0)
            start = stop
            if self._rows == self._cut.rows:
                self._end()

    def _end(self) -> None:
        self._whole.append(self._rows)
        self._rows = self._bytes = 0

    def units(self) -> list[int]:
        """How many rows each work unit has."""
        return [*self._whole, *([self._rows] if self._rows else [])]


def written(rows: Iterable[int]) -> str:
    """The rows of consecutive work units as one text: "512*3 40" for 512, 512, 512 and 40."""
    runs = ((count, sum(1 for _ in same)) for count, same in groupby(rows))
    return " ".join(f"{count}*{times}" if times > 1 else str(count) for count, times in runs)


def runs_of(text: str) -> list[tuple[int, int]]:
    """(rows, how many work units in turn have so many) of a text that `written` gave. Raises ValueError for another."""
    runs = []
    for item in text.split(" ") if text else ():
        if not _RUN.fullmatch(item):
            raise ValueError(f"{item[:20]!r} is no count of rows")
        rows, _, times = item.partition("*")
        runs.append((int(rows), int(times or 1)))
    if any(one[0] == other[0] for one, other in pairwise(runs)):
        raise ValueError("equal counts of rows stand apart")
    return runs


def even_runs(rows: int, per_unit: int) -> list[tuple[int, int]]:
    """As `runs_of`, of so many rows that are cut by rows alone."""
    whole, rest = divmod(rows, per_unit)
    return [(count, times) for count, times in ((per_unit, whole), (rest, 1)) if count and times]


class UnitRanges:
    """The rows of each work unit of a corpus, from the runs of its pieces; `units` and `rows` of all.

    Raises ValueError for more rows than can be counted.
    """

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        units = [0, *accumulate(times for _, times in runs)]
        rows = [0, *accumulate(count * times for count, times in runs)]
        self.units, self.rows = units[-1], rows[-1]
        if max(self.units, self.rows) >= _COUNTED:
            raise ValueError("its work units have more rows than a file can hold")
        # Of each run: its rows a unit, its first unit and its first row.
        self._each = array("q", (count for count, _ in runs))
        self._units, self._rows = array("q", units), array("q", rows)

    def of(self, unit: int) -> tuple[int, int]:
        """(first row, rows) of a work unit of the corpus."""
        run = bisect_right(self._units, unit) - 1
        return self._rows[run] + (unit - self._units[run]) * self._each[run], self._each[run]
