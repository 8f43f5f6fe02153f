"""Leaving rows out of a state: leave-one-out entropies, and the jackknife's correction and interval for G-Vendi.

row i leaves: Delta S_i = S(A - z_i z_i^T) - S(A) with S(A) = tr(A ln A)
              H_{-i} = ln(n - 1) - (S(A) + Delta S_i) / (n - 1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows
from gvendi_fast.vendi.gains import check_removable, removals, trace_log
from gvendi_fast.vendi.second_moment import SecondMoment

# From this many rows per G-Vendi on, the corrected value and its interval hold (measured on real sources).
ENOUGH = 3


@dataclass(frozen=True)
class Interval:
    """G-Vendi with its jackknife correction; all but `se` and `level` on the scale of G-Vendi.

    value: the plain score of these n rows; it is biased low and may lie below `low`.
    corrected: the estimate for unlimited data.
    low, high: the interval around `corrected`.
    se: standard error of the entropy, in nats.
    n: the rows.
    level: of confidence.
    """

    value: float
    corrected: float
    low: float
    high: float
    se: float
    n: int
    level: float = 0.95

    @property
    def reliable(self) -> bool:
        """Whether n is at least `ENOUGH` times G-Vendi: below, `corrected` still grows with n."""
        return self.n >= ENOUGH * self.value


def leave_one_out(state: SecondMoment, rows: Rows) -> torch.Tensor:
    """H_1 in nats of the state without one row, for each of rows [N, K] that are in it: float64 [N]; n >= 2.

    A row that cannot be in the state raises GvendiError.
    """
    check_removable(state)
    change = [change for change, _ in removals(state, rows)]
    left = trace_log(state) + torch.cat([*change, state.matrix.new_empty(0)])
    return (math.log(state.n - 1) - left / (state.n - 1)).cpu()


def jackknife(
    state: SecondMoment, rows: Rows | Iterable[Rows], level: float = 0.95, q: float = 1.0
) -> Interval:
    """G-Vendi corrected for its bias in n, with a confidence interval of the given level; order 1 only.

    rows: the sketches that the state was made from, [n, K] or blocks of them; memory does not grow with n.

        H_J = n H - (n-1) mean_i H_{-i} = n ln n - (n-1) ln(n-1) + mean_i Delta S_i
        SE^2 = (n-1)/n sum_i (H_{-i} - mean)^2 = var_i(Delta S_i) / n          (Quenouille 1956, Tukey 1958)

    The interval is exp(H_J -+ z SE), for rows drawn independently from one population, clipped to [1, K], the
    bounds of that population's value; n bounds only the sample's. The correction is of first order: below
    about n = 2 G-Vendi only more data helps, orthogonal rows even give se = 0, and up to about n = 3 G-Vendi the
    interval is too narrow, for se is the plain entropy's and the corrected one spreads more. To say whether two data
    sets differ, compare their plain values at equal n (`compare`). It cannot know what too few rows do not show: where
    a small share of the population spans more directions of its own than the sample has rows of it, too many intervals
    lie below the population's value. One row alone says nothing: corrected = 1, interval [1, K], se = inf.
    Raises GvendiError where the rows are not the state's, q is not 1 or level is not in (0, 1).
    """
    if q != 1:
        raise GvendiError(
            f"q is {q}; the jackknife exists for order 1 only: for the plain value use state.gvendi(q)"
        )
    if not 0 < level < 1:
        raise GvendiError(f"level is {level}; wanted a confidence level between 0 and 1, such as 0.95")
    n, dim, value = state.n, float(state.dim), state.gvendi()
    count, mean, spread, overlap = 0, 0.0, 0.0, 0.0
    for change, mu in removals(state, rows):
        # Chan's merge of (count, mean, sum of squared deviations).
        here, offset = len(change), float(change.mean()) - mean
        spread += float((change - change.mean()).square().sum()) + offset**2 * count * here / (count + here)
        mean += offset * here / (count + here)
        count += here
        overlap += float(mu.sum())
    # sum_i z_i^T A z_i = |A|_F^2 holds for the state's own rows.
    if count != n or not math.isclose(overlap, float(state.matrix.square().sum()), rel_tol=1e-4):
        raise GvendiError(
            f"rows ({count}) are not those of the state ({n}); give exactly the rows that it was made from"
        )
    if n == 1:
        return Interval(value, 1.0, 1.0, dim, math.inf, n, level)
    entropy = n * math.log(n) - (n - 1) * math.log(n - 1) + mean
    se = math.sqrt(spread / (n - 1) / n)
    reach = NormalDist().inv_cdf(0.5 + level / 2) * se
    # Clipped first, as exp of the wide interval of few rows would overflow.
    corrected, low, high = (
        math.exp(min(max(h, 0.0), math.log(dim))) for h in (entropy, entropy - reach, entropy + reach)
    )
    return Interval(value, corrected, low, high, se, n, level)
