"""Weights of rows that add up to 1, none above 1/size, with limits on groups: projection and best vertex.

In units of one chosen row, u = size * w: 0 <= u_i <= 1, sum u = size, and sum of u over a group at most its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvendi_fast.base.errors import GvendiError


@dataclass(frozen=True)
class Limits:
    """Groups as codes int64 [N] in 0..G-1, and the most rows [G] that may be chosen of each."""

    codes: np.ndarray
    most: np.ndarray

    def at(self, rows: np.ndarray) -> Limits:
        """The same limits on some of the rows."""
        return Limits(self.codes[rows], self.most)


def check_feasible(size: int, rows: int, limits: Limits | None) -> None:
    """GvendiError unless `size` of `rows` rows can be chosen within the limits."""
    if not 1 <= size <= rows:
        raise GvendiError(f"size is {size}; wanted 1 to {rows}, the number of rows to choose from")
    if limits is None:
        return
    there = np.bincount(limits.codes, minlength=len(limits.most))
    room = int(np.minimum(there, limits.most).sum())
    if room < size:
        raise GvendiError(
            f"size is {size}, but the quotas leave room for only {room} rows; raise a quota or lower size"
        )


def project(logits: np.ndarray, size: int, limits: Limits | None = None) -> np.ndarray:
    """log u of the feasible u nearest to exp(logits) in relative entropy: float64 [N] -> float64 [N], none above 0.

    u_i = min(1, exp(l_i - max(tau, tau_group))): one threshold for the total, and one more for a full group.
    """
    if limits is None:
        return np.minimum(logits - _threshold(logits, size), 0.0)
    own = np.full(len(limits.most), -np.inf)
    for code, members in _members(limits):
        most = int(limits.most[code])
        if most == 0:
            own[code] = np.inf
        elif most < len(members):
            own[code] = _threshold(logits[members], most)
    floor = own[limits.codes]
    low, high = float(logits.min()) - np.log(size) - 1.0, float(logits.max()) + np.log(len(logits)) + 1.0
    # 80 halvings narrow any range of logits to less than rounding.
    for _ in range(80):
        middle = 0.5 * (low + high)
        total = np.exp(np.minimum(logits - np.maximum(middle, floor), 0.0)).sum()
        low, high = (middle, high) if total > size else (low, middle)
    return np.minimum(logits - np.maximum(low, floor), 0.0)


def _threshold(logits: np.ndarray, size: int) -> float:
    """tau with sum_i min(1, exp(l_i - tau)) = size."""
    if size >= len(logits):
        return float(logits.min())
    descending = np.sort(logits)[::-1]
    tail = np.logaddexp.accumulate(descending[::-1])[::-1]
    # With k rows at the cap the others share size - k; the first k whose next row stays below the cap is right.
    tau = tail[:size] - np.log(size - np.arange(size))
    return float(tau[int(np.argmax(descending[:size] <= tau))])


def best_vertex(scores: np.ndarray, order: np.ndarray, size: int, limits: Limits | None = None) -> np.ndarray:
    """The `size` rows of the largest total score within the limits, best first; equal scores go by `order` [N]."""
    ranked = np.lexsort((order, -scores))
    if limits is None:
        return ranked[:size]
    # The r-th row of its group, in rank order, is allowed while r is below the limit.
    codes = limits.codes[ranked]
    by_group = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[by_group], np.arange(len(limits.most)))
    place = np.empty(len(ranked), np.int64)
    place[by_group] = np.arange(len(ranked)) - first[codes[by_group]]
    return ranked[place < limits.most[codes]][:size]


def _members(limits: Limits) -> Sequence[tuple[int, np.ndarray]]:
    by_group = np.argsort(limits.codes, kind="stable")
    bounds = np.searchsorted(limits.codes[by_group], np.arange(len(limits.most) + 1))
    return [(code, by_group[bounds[code] : bounds[code + 1]]) for code in range(len(limits.most))]
