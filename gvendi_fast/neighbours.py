"""The nearest rows of two pools by cosine, block by block: no matrix of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.errors import GvendiError
from gvendi_fast.pool import Pool

_BLOCK = 2048


@dataclass(frozen=True)
class Pair:
    """A row of either pool, by number and id, and their cosine."""

    first: int
    second: int
    first_id: str
    second_id: str
    cosine: float


@dataclass(frozen=True)
class Neighbours:
    """The nearest pairs, best first, and the share of either side's rows with a neighbour at the threshold."""

    pairs: list[Pair]
    share_of_first: float
    share_of_second: float


def nearest_pairs(
    a: Pool, rows_a: np.ndarray, b: Pool, rows_b: np.ndarray, count: int, threshold: float
) -> Neighbours:
    """The `count` pairs of the largest cosine between rows of a and of b; equal ones in order of the rows.

    Every row of either side is in at most one pair, its best, so that one text that stands everywhere does not fill the
    list. Memory: two blocks of 2,048 rows.
    """
    if count < 0:
        raise GvendiError(f"pairs is {count}; wanted 0 or more")
    best = torch.full((len(rows_a),), -2.0)
    partner = torch.zeros(len(rows_a), dtype=torch.int64)
    best_b = torch.full((len(rows_b),), -2.0)
    for first, block in _blocks(a, rows_a):
        here = slice(first, first + len(block))
        for other, against in _blocks(b, rows_b):
            cosine = (block @ against.T).clamp_(-1, 1)
            value, place = cosine.max(dim=1)
            # Strictly better only: the first of equal ones stays.
            better = value > best[here]
            partner[here] = torch.where(better, place + other, partner[here])
            best[here] = torch.maximum(best[here], value)
            there = slice(other, other + len(against))
            best_b[there] = torch.maximum(best_b[there], cosine.amax(dim=0))
    pairs, used = [], set()
    for i in torch.argsort(best, descending=True, stable=True).tolist():
        if len(pairs) == count:
            break
        j = int(partner[i])
        if j in used:
            continue
        used.add(j)
        one, two = int(rows_a[i]), int(rows_b[j])
        pairs.append(Pair(one, two, a.ids[one], b.ids[two], float(best[i])))
    return Neighbours(
        pairs, float((best >= threshold).float().mean()), float((best_b >= threshold).float().mean())
    )


def _blocks(pool: Pool, rows: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, len(rows), _BLOCK):
        yield first, pool.take(rows[first : first + _BLOCK])
