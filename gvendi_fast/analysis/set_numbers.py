"""The numbers of one set of rows: what score, compare, report and a synthesis run say of it, the same everywhere.

Beside G-Vendi and the interval of another draw stand what unlimited K would make of it, its value without the mean of a
reference (centred), and how much of the rows lies in one direction. Each is defined in `gvendi_fast.vendi`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gvendi_fast.analysis.equal_n import NEAR_MOST
from gvendi_fast.base.shown import number
from gvendi_fast.base.unit_length import Rows
from gvendi_fast.kernels.sketch_matrix import MAX_DIM
from gvendi_fast.vendi.centered import Centered, RowMean, centered
from gvendi_fast.vendi.diagnosis import Diagnosis, diagnose
from gvendi_fast.vendi.growth import Growth
from gvendi_fast.vendi.jackknife import Interval, jackknife
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import NOTABLE, UnlimitedK, unlimited_k

# Reads all rows of a set, block by block; it is called once for each pass over them.
Blocks = Callable[[], Iterable[Rows]]


@dataclass(frozen=True, eq=False)
class SetNumbers:
    """What n rows score, and what limits it.

    interval: G-Vendi, the interval for another n rows of the same source, and n.
    entropy: in nats.
    dim: K.
    unlimited_k: what the exact gradients of these rows would score.
    centered: the value without the reference's mean.
    diagnosis: what one direction does to the score.
    distinct: different rows; no score is above their number.
    """

    interval: Interval
    entropy: float
    dim: int
    unlimited_k: UnlimitedK
    centered: Centered
    diagnosis: Diagnosis
    distinct: int

    @property
    def gvendi(self) -> float:
        """Of these rows."""
        return self.interval.value

    @property
    def n(self) -> int:
        """Rows."""
        return self.interval.n

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, by the names that a score has."""
        return {
            "gvendi": self.gvendi,
            "low": self.interval.low,
            "high": self.interval.high,
            "entropy": self.entropy,
            "n": self.n,
            "dim": self.dim,
            "unlimited_k": self.unlimited_k.to_dict(),
            "centered": self.centered.to_dict(),
            "diagnosis": self.diagnosis.to_dict(),
            "distinct": self.distinct,
        }


def numbers_of(
    state: VendiState,
    own: RowMean,
    blocks: Blocks,
    *,
    reference: RowMean,
    distinct: int,
    level: float = 0.95,
) -> SetNumbers:
    """The numbers of a state's rows, in two more passes over them.

    own: their mean. reference: the mean that the centred value leaves out. distinct: different rows. level: of the
    intervals. Raises GvendiError for a reference of another spec.
    """
    return SetNumbers(
        interval=jackknife(state, blocks(), level),
        entropy=max(state.entropy(), 0.0),
        dim=state.dim,
        unlimited_k=unlimited_k(state, distinct=distinct, level=level),
        centered=centered(blocks(), reference, state.spec),
        diagnosis=diagnose(state, own),
        distinct=distinct,
    )


def limits(numbers: SetNumbers, grown: Growth | None = None) -> list[str]:
    """What holds a score down or makes it say little, in sentences: its most, K, n and the proxy, in this order.

    grown: of the same rows, if it is known.
    """
    said = [_most(numbers), _dim(numbers), None if grown is None else _rows(numbers, grown)]
    return [sentence for sentence in (*said, numbers.diagnosis.sentence) if sentence is not None]


def _most(numbers: SetNumbers) -> str | None:
    n, dim, value = numbers.n, numbers.dim, numbers.gvendi
    most = min(n, dim, numbers.distinct)
    if most == 1 or value < NEAR_MOST * most:
        return None
    if most == dim < min(n, numbers.distinct):
        return f"K: no data scores above {dim:,}, the numbers of a sketch, and this is near it; sketch with a larger --dim"
    what = f"{n:,} rows" if most == n else f"{most:,} different rows of {n:,}"
    return f"n: {what} cannot score above {most:,}, and any diverse data comes near that; only more rows can tell"


def _dim(numbers: SetNumbers) -> str | None:
    of = numbers.unlimited_k
    if not of.is_notable:
        return None
    share = f"{100 * abs(of.bias):.0f} %"
    halves = (
        f"--dim {of.dim_to_halve} would halve that"
        if of.dim_to_halve <= MAX_DIM
        else "no --dim can halve that, for so many rows of such data"
    )
    if of.is_bound_only:
        return (
            f"K: exact gradients would score between {number(of.low)} and {number(of.high)}; of so many rows K = "
            f"{of.dim:,} shows too little to say more; {halves}"
        )
    way = "lowers" if of.bias < 0 else "raises"
    return f"K: the noise of sketches of {of.dim:,} numbers {way} the score by about {share}; {halves}"


def _rows(numbers: SetNumbers, grown: Growth) -> str | None:
    ahead = grown.forecast
    if ahead.value < (1 + NOTABLE) * numbers.gvendi:
        return None
    return (
        f"n: still growing; {ahead.n:,} rows of the same source would score about {number(ahead.value)} "
        f"({number(ahead.low)} to {number(ahead.high)})"
    )
