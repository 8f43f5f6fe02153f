"""Rejected rows by kind of reason: how many there are of each, and the range of their sizes where one is named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gvendi_fast.data.remedies import remedies_of
from gvendi_fast.data.rows import Rejected, kind_of_reason

# Kinds that a sentence lists, and of which it says the remedies.
MOST_KINDS, MENDED = 40, 3
_SIZE = re.compile(r"(?:too long: |field .* has )\D*?([\d,]+) (tokens|bytes|characters)\b.*", re.DOTALL)


@dataclass
class Kind:
    """Rejected rows of one kind of reason.

    reason: the kind.
    count: how many.
    low, high: the smallest and the largest size that their reasons name; None where they name none.
    unit: of the sizes, "tokens", "bytes" or "characters"; "" where there is none.
    """

    reason: str
    count: int = 0
    low: int | None = None
    high: int | None = None
    unit: str = ""

    def __str__(self) -> str:
        size = ""
        if self.low is not None and self.high is not None:
            between = f"from {self.low:,} to {self.high:,}" if self.low < self.high else f"{self.low:,}"
            size = f", {between} {self.unit}"
        return f"{self.reason}: {self.count:,}{size}"


def kinds_of(items: Iterable[Rejected]) -> list[Kind]:
    """The kinds of these rows, most frequent first, of equally frequent ones in the order of their names."""
    kinds: dict[str, Kind] = {}
    for item in items:
        reason = kind_of_reason(item.reason)
        kind = kinds.setdefault(reason, Kind(reason))
        kind.count += 1
        if found := _SIZE.fullmatch(item.reason):
            size = int(found[1].replace(",", ""))
            kind.low = size if kind.low is None else min(kind.low, size)
            kind.high = size if kind.high is None else max(kind.high, size)
            kind.unit = found[2]
    return sorted(kinds.values(), key=lambda kind: (-kind.count, kind.reason))


def listed(kinds: Iterable[Kind]) -> str:
    """All kinds in one sentence; of the rows of data that make a kind for each row, the most frequent ones."""
    said = [str(kind) for kind in kinds]
    more = [f"and {len(said) - MOST_KINDS:,} more kinds"] if len(said) > MOST_KINDS else []
    return "; ".join(said[:MOST_KINDS] + more)


def remedies(kinds: Iterable[Kind]) -> str:
    """What mends the rows of the most frequent kinds."""
    return remedies_of(kind.reason for kind in list(kinds)[:MENDED])
