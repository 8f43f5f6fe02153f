"""What G-Vendi would be for unlimited K, that is of the exact gradients, from what the sketch of one K shows.

Order 1: degrees_of_freedom.py. Order 2 needs no spectrum: of unit rows with cosine c, sketched and scaled to length 1
again, the expected squared cosine is c^2 + (1 - c^2)(1 - 2 c^2) / K + O(1 / K^2); so with S = exp(-H_2), the mean of
c^2 over all pairs of n rows,
    E S_K = S + (1 - 3 S + 2 S') / K,   S' = mean of c^4, between S^2 and S
S' = S^2 is taken, which errs by less than S / (2 K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import reads
from gvendi_fast.vendi.degrees_of_freedom import DegreesOfFreedom
from gvendi_fast.vendi.second_moment import SecondMoment

# A bias beyond this share is told beside the score.
NOTABLE = 0.05
# If what K does not show leaves the value open by more than this share, the value is hardly more than its bounds.
WIDE = 0.1
# K Var |z|^2 of the Hadamard sketch, measured on models (docs/sketch.md); 2 for dense random signs.
SKETCH_VARIANCE = 2.3
Lost = Callable[[int], float]
# Doublings of K that are looked through for the one that halves the bias.
_DOUBLINGS = 40


@dataclass(frozen=True)
class UnlimitedK:
    """G-Vendi for unlimited K beside that of the sketches; n is the same for both.

    value: the estimate for exact gradients.
    low, high: its interval over sketch matrices, together with the bounds of what K does not show.
    plain: G-Vendi at K, as the paper defines it.
    dim: K.
    n: rows.
    dim_to_halve: the smallest K * 2^j whose bias would be at most half of this one; it may be above what a sketch can
        have.
    unseen: by what share the bounds of what K does not show lie apart, before the noise of the sketch; 0 for n <= K.
    se: standard error of ln(value) over sketch matrices.
    q: the order, 1 or 2.
    level: of confidence.
    """

    value: float
    low: float
    high: float
    plain: float
    dim: int
    n: int
    dim_to_halve: int
    unseen: float
    se: float
    q: float = 1.0
    level: float = 0.95

    @property
    def bias(self) -> float:
        """By what share K lowers the score: plain / value - 1, mostly negative."""
        return self.plain / self.value - 1

    @property
    def is_notable(self) -> bool:
        """Whether the bias is beyond `NOTABLE`."""
        return abs(self.bias) > NOTABLE

    @property
    def is_bound_only(self) -> bool:
        """Whether K shows so little that `low` and `high` say more than `value` does."""
        return self.unseen > WIDE

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self),
            "bias": self.bias,
            "is_notable": self.is_notable,
            "is_bound_only": self.is_bound_only,
        }


@reads
def unlimited_k(
    state: SecondMoment, *, q: float = 1.0, distinct: int | None = None, level: float = 0.95
) -> UnlimitedK:
    """G-Vendi of order 1 or 2 for unlimited K, from a state's matrix and n alone.

    distinct: how many of the n rows differ, if that is known: their number bounds the value.
    level: of confidence.
    It takes the spectrum, which the state keeps, and about 1,000 sums over it: 0.02 s at K = 1024.
    Raises GvendiError for a state without rows, another order, and a `distinct` or a level out of range.
    """
    entropy = state.entropy(q) if q in _LOST else 0.0
    return of_spectrum(state.spectrum(), entropy, state.n, state.dim, q=q, distinct=distinct, level=level)


def of_spectrum(
    spectrum: torch.Tensor,
    entropy: float,
    n: int,
    dim: int,
    *,
    q: float = 1.0,
    distinct: int | None = None,
    level: float = 0.95,
) -> UnlimitedK:
    """As `unlimited_k`, from the eigenvalues (sum 1) of n rows of K = dim sketches, and their entropy of order q."""
    if q not in _LOST:
        raise GvendiError(
            f"q is {q}; the value for unlimited K exists for orders 1 and 2 only: for the plain one use state.gvendi(q)"
        )
    if not 0 < level < 1:
        raise GvendiError(f"level is {level}; wanted a confidence level between 0 and 1, such as 0.95")
    if distinct is not None and not 1 <= distinct <= n:
        raise GvendiError(f"distinct is {distinct}; wanted the number of different rows, from 1 to n = {n}")
    most = distinct or n
    lost, bounds = _LOST[q](spectrum, dim, most)
    exact = entropy + lost(dim)
    se = _ERROR[q](spectrum, exact, lost(dim), dim)
    reach = NormalDist().inv_cdf(0.5 + level / 2) * se
    value, low, high = (
        min(math.exp(min(max(h, 0.0), math.log(most))), most)
        for h in (exact, entropy + bounds[0] - reach, entropy + bounds[1] + reach)
    )
    return UnlimitedK(
        value=value,
        low=low,
        high=high,
        plain=math.exp(entropy),
        dim=dim,
        n=n,
        dim_to_halve=_halving(lost, dim),
        unseen=math.expm1(bounds[1] - bounds[0]),
        se=se,
        q=float(q),
        level=level,
    )


def _lost_1(spectrum: torch.Tensor, dim: int, rank: int) -> tuple[Lost, tuple[float, float]]:
    degrees = DegreesOfFreedom(spectrum, dim, rank)
    return degrees.lost, degrees.lost_bounds(dim)


def _lost_2(spectrum: torch.Tensor, dim: int, rank: int) -> tuple[Lost, tuple[float, float]]:
    """From E S_K = S + (1 - S)(1 - 2 S) / K, solved for S."""
    seen = float(spectrum.square().sum())
    # 2 S^2 / K + S (1 - 3 / K) + 1 / K - S_K = 0
    linear, constant = 1 - 3 / dim, 1 / dim - seen
    exact = -2 * constant / (linear + math.sqrt(max(linear**2 - 8 * constant / dim, 0.0)))
    exact = min(max(exact, 1 / rank), 1.0)

    def lost(other: int) -> float:
        at = seen if other == dim else exact + (1 - exact) * (1 - 2 * exact) / other
        return math.log(at / exact)

    return lost, (lost(dim), lost(dim))


def _error_1(spectrum: torch.Tensor, entropy: float, lost: float, dim: int) -> float:
    """Standard error of H_1 over sketch matrices.

    An eigenvalue l of the exact matrix shows as l (1 + x), Var x = SKETCH_VARIANCE / K, which changes the entropy by
    -(ln l + H) l x. Noise alone adds 1 / K to the sum of (ln l + H)^2 l^2, and the terms of second order have a
    variance of at most 1 / K^2.
    """
    p = spectrum[spectrum > 0]
    change = p * (p.log() + _entropy_around(p, entropy, lost, dim))
    first = SKETCH_VARIANCE / dim * max(float(change.square().sum()) - 1 / dim, 0.0)
    return math.sqrt(first + 1 / dim**2)


def _error_2(spectrum: torch.Tensor, entropy: float, lost: float, dim: int) -> float:
    """Standard error of H_2 over sketch matrices, as `_error_1`: here H_2 changes by -2 (l / S - 1) l x."""
    p = spectrum[spectrum > 0]
    change = 2 * p * (p * _entropy_around(p, entropy, lost, dim).exp() - 1)
    first = SKETCH_VARIANCE / dim * max(float(change.square().sum()) - 4 / dim, 0.0)
    return math.sqrt(first + 4 / dim**2)


def _entropy_around(spectrum: torch.Tensor, entropy: float, lost: float, dim: int) -> torch.Tensor:
    """The entropy to hold each eigenvalue against: of one near 1 / K most is noise, whose entropy is H_K."""
    return entropy - lost * (1 / (dim * spectrum)).clamp_max(1)


def _halving(lost: Lost, dim: int) -> int:
    """The smallest dim * 2^j, j > 0, where the share of the score that is lost is at most half of that at dim."""
    half = abs(math.expm1(-lost(dim))) / 2
    for doublings in range(1, _DOUBLINGS):
        if abs(math.expm1(-lost(dim << doublings))) <= half:
            return dim << doublings
    return dim << _DOUBLINGS


_LOST = {1.0: _lost_1, 2.0: _lost_2}
_ERROR = {1.0: _error_1, 2.0: _error_2}
