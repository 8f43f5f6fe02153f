"""A few of many items, spread over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
