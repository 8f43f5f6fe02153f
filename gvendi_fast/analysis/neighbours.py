"""The nearest rows of two pools by cosine, block by block: no matrix of all pairs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import cosine_blocks
from gvendi_fast.data.pool import Pool

_BLOCK = 2048
# From this cosine on two sketches differ by rounding only.
IDENTICAL = 1 - 1e-5


@dataclass(frozen=True)
class Pair:
    """A row of each of two pools.

    first, second: their numbers in the pools.
    first_id, second_id: their ids.
    cosine: of their sketches.
    """

    first: int
    second: int
    first_id: str
    second_id: str
    cosine: float


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of two pools.

    pairs: the nearest pairs, best first.
    share_of_first, share_of_second: share of each side's rows with a neighbour at the threshold or above.
    identical: rows of the first side with a neighbour at a cosine of 0.99999 or above.
    """

    pairs: list[Pair]
    identical: int
    share_of_first: float
    share_of_second: float


def nearest_pairs(
    a: Pool, rows_a: np.ndarray, b: Pool, rows_b: np.ndarray, count: int, threshold: float
) -> Neighbours:
    """The `count` pairs of the largest cosine between rows of a and of b, each row in one pair at most, best first.

    A greedy matching, so that one text that occurs everywhere does not fill the list. Memory: the rows of both sides,
    `count` neighbours of each row of a, and the cosines of 2,048 with 2,048 rows.
    """
    if count < 0:
        raise GvendiError(f"pairs is {count}; wanted 0 or more")
    # A run reads a whole part for any row of it, so each side is taken once.
    left, right = a.take(rows_a), b.take(rows_b)
    # When it is a row's turn, fewer than `count` rows of b are taken, so one of its `count` nearest is free.
    keep = min(max(count, 1), len(right))
    cosines, places = torch.empty(len(left), keep), torch.empty(len(left), keep, dtype=torch.int64)
    best_b = torch.full((len(right),), -1.0)
    for first in range(0, len(left), _BLOCK):
        here = slice(first, first + _BLOCK)
        near, place = torch.empty(len(left[here]), 0), torch.empty(len(left[here]), 0, dtype=torch.int64)
        for other, cosine in cosine_blocks(left[here], right, _BLOCK):
            there = slice(other, other + _BLOCK)
            cosine.clamp_(-1, 1)
            best_b[there] = torch.maximum(best_b[there], cosine.amax(dim=0))
            value, column = cosine.topk(min(keep, cosine.shape[1]), dim=1)
            value, column = torch.cat([near, value], dim=1), torch.cat([place, column + other], dim=1)
            near, order = value.topk(min(keep, value.shape[1]), dim=1)
            place = column.gather(1, order)
        cosines[here], places[here] = near, place
    best = cosines[:, 0]
    pairs = []
    for i, j, cosine in _matched(cosines, places, count):
        one, two = int(rows_a[i]), int(rows_b[j])
        pairs.append(Pair(one, two, a.ids[one], b.ids[two], cosine))
    return Neighbours(
        pairs,
        int((best >= IDENTICAL).sum()),
        float((best >= threshold).float().mean()),
        float((best_b >= threshold).float().mean()),
    )


def _matched(cosines: torch.Tensor, places: torch.Tensor, count: int) -> Iterator[tuple[int, int, float]]:
    """(row of a, row of b, cosine) of up to `count` pairs, from each row's neighbours [N, keep], best first."""
    turns = [(-value, i, 0) for i, value in enumerate(cosines[:, 0].tolist())]
    heapq.heapify(turns)
    used: set[int] = set()
    while turns and len(used) < count:
        value, i, rank = heapq.heappop(turns)
        j = int(places[i, rank])
        if j not in used:
            used.add(j)
            yield i, j, -value
        elif rank + 1 < cosines.shape[1]:
            heapq.heappush(turns, (-float(cosines[i, rank + 1]), i, rank + 1))
