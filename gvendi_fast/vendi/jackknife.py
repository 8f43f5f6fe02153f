"""Leaving rows out of a state: leave-one-out entropies, and the interval of G-Vendi for another draw of as many rows.

row i leaves: Delta S_i = S(A - z_i z_i^T) - S(A) with S(A) = tr(A ln A)
              H_{-i} = ln(n - 1) - (S(A) + Delta S_i) / (n - 1)
rows i and j leave: I_ij = Delta S_ij - Delta S_i - Delta S_j
              = -int_0^inf ln(1 - g_ij^2 / ((1 - g_ii)(1 - g_jj))) dt,   g_ij(t) = z_i^T (A + t)^-1 z_j
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.draws import stream, subset
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import reads
from gvendi_fast.base.student import quantile
from gvendi_fast.base.unit_length import Rows
from gvendi_fast.kernels.spectrum import nodes
from gvendi_fast.vendi.gains import check_removable, removals, trace_log
from gvendi_fast.vendi.second_moment import SecondMoment

# Of two rows each leaves the same behind, and of three the few pairs hide what the rows do together.
LEAST_ROWS = 4
# Rows whose pairs say how much of the variance is of second order.
PAIRED = 128
# The most of the jackknife's variance that is taken off: half of it is the truth where the first order vanishes.
MOST_TAKEN = 0.3


@dataclass(frozen=True)
class Interval:
    """G-Vendi of n rows, and where that of n other rows from the same source would lie.

    value: the score of these n rows.
    low, high: the interval for the score of another draw of n rows.
    se: standard error of the entropy of one draw, in nats.
    n: the rows.
    level: of confidence.
    freedom: degrees of freedom of se, which a t quantile needs.
    """

    value: float
    low: float
    high: float
    se: float
    n: int
    level: float = 0.95
    freedom: float = math.inf


@reads
def leave_one_out(state: SecondMoment, rows: Rows) -> torch.Tensor:
    """H_1 in nats of the state without one row, for each of rows [N, K] that are in it: float64 [N]; n >= 2.

    A row that cannot be in the state raises GvendiError.
    """
    check_removable(state)
    change = [change for change, _, _ in removals(state, rows)]
    left = trace_log(state) + torch.cat([*change, state.matrix.new_empty(0)])
    return (math.log(state.n - 1) - left / (state.n - 1)).cpu()


@reads
def jackknife(
    state: SecondMoment, rows: Rows | Iterable[Rows], level: float = 0.95, q: float = 1.0
) -> Interval:
    """G-Vendi with the interval of the given level for another draw of n rows from the same source; order 1 only.

    rows: the sketches that the state was made from, [n, K] or blocks of them; memory does not grow with n.

        J    = (n-1)/n sum_i (H_{-i} - mean)^2 = var_i(Delta S_i) / n                  (Tukey 1958)
        P    = n (n-1) / 2 mean_{i<j} q_ij^2 / (n-2)^2,  q_ij = I_ij less its mean and its rows' effects
        SE^2 = max(J - P, 0.7 J, 0.7 P),   freedom = min(n - 1, 2n / (kurtosis_i(Delta S_i) - 1))
        low, high = exp(H -+ t_freedom sqrt(2) SE), clipped to [1, min(n, K)]

    Both draws vary, hence sqrt(2); on the scale of the entropy their difference is symmetric. With the variance in
    parts V_1 + V_2 + ... by how many rows act together, J is V_1 + 2 V_2 + 3 V_3 on average (Efron and Stein 1981)
    and P is V_2 + 3 V_3, estimated from all pairs of up to 128 rows. At most 0.3 J is taken off, as few rows seldom
    show what they lack; so a flat spectrum, of V_2 alone, is covered a little too often. J vanishes where all rows
    count alike by chance, such as two kinds of rows in equal numbers; P does not. Rows count as independent draws:
    where a source writes r rows of each kind together, the interval is too narrow by sqrt(r). Rows of a kind that no
    row shows are in no interval. It says nothing of more rows (`growth` does), and G-Vendi of one row is 1. Two or
    three rows do not show how far another draw lies: their interval is all that such rows can score, with SE infinite.
    Raises GvendiError where the rows are not the state's, q is not 1 or level is not in (0, 1).
    """
    if q != 1:
        raise GvendiError(
            f"q is {q}; the jackknife exists for order 1 only: for the plain value use state.gvendi(q)"
        )
    if not 0 < level < 1:
        raise GvendiError(f"level is {level}; wanted a confidence level between 0 and 1, such as 0.95")
    left = LeftOut(state, pairs_of(state.n))
    left.add(0, rows)
    return interval_of(state, [left.result()], level)


@dataclass
class Removed:
    """What `LeftOut` collects of some of a state's rows.

    moments: of Delta S. overlap: the sum of mu. pairs: unit rows [m, K] whose pairs count.
    """

    moments: _Moments
    overlap: float
    pairs: torch.Tensor


class LeftOut:
    """What `jackknife` needs of rows of a state, as sums of a pass; `pairs` as `pairs_of` gives them."""

    def __init__(self, state: SecondMoment, pairs: np.ndarray) -> None:
        self._state, self._pairs = state, pairs
        self._moments, self._overlap, self._seen = _Moments(), 0.0, 0
        self._chosen: list[torch.Tensor] = []

    def add(self, first: int, rows: Rows | Iterable[Rows], *along: object) -> None:
        """Take up rows [n, K], or blocks of them, numbered from `first`."""
        for change, mu, unit in removals(self._state, rows, first):
            self._moments.add(change)
            self._overlap += float(mu.sum())
            begin, end = np.searchsorted(self._pairs, [first, first + len(unit)])
            self._chosen.append(unit[torch.from_numpy(self._pairs[begin:end] - first).to(unit.device)])
            first += len(unit)

    def result(self) -> Removed:
        """What was collected."""
        empty = torch.empty(0, self._state.dim)
        return Removed(self._moments, self._overlap, torch.cat(self._chosen) if self._chosen else empty)


def pairs_of(n: int) -> np.ndarray:
    """Numbers of the rows, of n, whose pairs say how much of the variance is of second order; ascending."""
    return subset(stream("paired", n), n, min(n, PAIRED)) if n else np.empty(0, np.int64)


def interval_of(state: SecondMoment, removed: Iterable[Removed], level: float) -> Interval:
    """The interval of `jackknife` from what `LeftOut` has collected of all rows, in the order of the rows."""
    n = state.n
    moments, overlap, chosen = _Moments(), 0.0, []
    for part in removed:
        moments.merge(part.moments)
        overlap += part.overlap
        chosen.append(part.pairs)
    seen = moments.count
    # sum_i z_i^T A z_i = |A|_F^2 holds for the state's own rows.
    if seen != n or not math.isclose(overlap, float(state.matrix.square().sum()), rel_tol=1e-4):
        raise GvendiError(
            f"rows ({seen}) are not those of the state ({n}); give exactly the rows that it was made from"
        )
    if n == 1:
        return Interval(1.0, 1.0, 1.0, 0.0, n, level)
    entropy, most = state.entropy(), float(min(n, state.dim))
    if n < LEAST_ROWS:
        return Interval(state.gvendi(), 1.0, most, math.inf, n, level, 1.0)
    variance = moments.variance() / n
    second = _second_order(state, torch.cat(chosen))
    variance = max(variance - second, (1 - MOST_TAKEN) * max(variance, second))
    freedom = min(n - 1.0, 2 * n / max(moments.kurtosis() - 1, 1e-9))
    reach = quantile(level, freedom) * math.sqrt(2 * variance)
    # The exponent is bounded first, as few rows make the interval wide.
    low, high = (min(math.exp(min(max(h, 0.0), 50.0)), most) for h in (entropy - reach, entropy + reach))
    return Interval(state.gvendi(), low, high, math.sqrt(variance), n, level, freedom)


class _Moments:
    """Mean and central moments of a stream of numbers, merged block by block (Chan 1979, Pebay 2008)."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2, self.m3, self.m4 = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        if not len(values):
            return
        mean = float(values.mean())
        off = values - mean
        self._merge(len(values), mean, *(float(off.pow(k).sum()) for k in (2, 3, 4)))

    def merge(self, other: _Moments) -> None:
        if not self.count:
            vars(self).update(vars(other))
        elif other.count:
            self._merge(other.count, other.mean, other.m2, other.m3, other.m4)

    def _merge(self, b: int, mean: float, m2: float, m3: float, m4: float) -> None:
        a = self.count
        n = a + b
        d = mean - self.mean
        self.m4 += m4 + d**4 * a * b * (a * a - a * b + b * b) / n**3
        self.m4 += 6 * d * d * (a * a * m2 + b * b * self.m2) / n**2 + 4 * d * (a * m3 - b * self.m3) / n
        self.m3 += m3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * m2 - b * self.m2) / n
        self.m2 += m2 + d * d * a * b / n
        self.mean += d * b / n
        self.count = n

    def variance(self) -> float:
        return self.m2 / (self.count - 1)

    def kurtosis(self) -> float:
        """3 for a normal distribution, 1 at least."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 else 1.0


def interactions(state: SecondMoment, rows: torch.Tensor) -> torch.Tensor:
    """I_ij of the module's formula for all pairs of m unit rows of the state: float64 [m, m], zeros on the diagonal."""
    eigenvalues, vectors = state.eigenbasis()
    c = rows.double() @ vectors
    total = c.new_zeros(len(c), len(c))
    at, weights = nodes(eigenvalues, -1)
    # Far above every eigenvalue this integrand falls like t^-2, the one that the nodes are for like t^-3.
    weights[-1] = at[-1] / -math.expm1(-1)
    for t, weight in zip(at.tolist(), weights.tolist(), strict=True):
        scaled = c / (eigenvalues + t).sqrt()
        g = scaled @ scaled.T
        # A >= x x^T bounds g by 1 / (1 + t), so only rounding exceeds it; the same for two rows.
        left = (1 - g.diagonal()).clamp_min(t / (1 + t))
        share = (g.square() / torch.outer(left, left)).clamp_max(1 - 2.0**-40)
        total -= weight * torch.log1p(-share)
    return total.fill_diagonal_(0)


def _second_order(state: SecondMoment, rows: torch.Tensor) -> float:
    """P of `jackknife` from all pairs of m >= 4 rows of the state."""
    n, m = state.n, len(rows)
    pair = interactions(state, rows)
    mean = pair.sum() / (m * (m - 1))
    effect = (pair.sum(dim=1) / (m - 1) - mean) * (m - 1) / (m - 2)
    pure = (pair - mean - effect[:, None] - effect).fill_diagonal_(0)
    # Of m (m - 1) / 2 pairs, the mean and m - 1 effects leave m (m - 3) / 2 free.
    return n * (n - 1) / 2 * float(pure.square().sum()) / (m * (m - 3)) / (n - 2) ** 2
