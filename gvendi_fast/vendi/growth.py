"""How G-Vendi grows with n: of a quarter and half of the rows, of all, and a forecast for twice as many.

l eigenvalues of the covariance of n rows (trace 1), d_n(s) = sum l / (l + s)
    m rows of the same source:  d_m(s') = d_n(s)  at  s' = s (1 - d/m) / (1 - d/n)
    their entropy:              H_m = int_0^inf [d_m(s') - 1 / (1 + s')] ds'
The first line holds for many rows with independent coordinates (Marchenko and Pastur 1967; Silverstein 1995, both sides
of whose equation share the population's d at t = s / (1 - d/n)). Real rows are of unequal kinds and repeat each other,
and grow by more: how much more is read off the doubling that is known, from halves of the rows to all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.student import quantile
from gvendi_fast.data.passes import over_pool
from gvendi_fast.data.pool import PoolLike, as_pool
from gvendi_fast.vendi.jackknife import Interval, LeftOut, interval_of, pairs_of
from gvendi_fast.vendi.state import VendiState

# Fewer rows leave quarters too small to say anything.
LEAST_ROWS = 16
# Above this width the spectrum of a state takes many seconds.
LARGE_DIM = 2048
# Of the forecast's error, measured on real sources (docs/results.md): in units of the variance of one draw and of the
# forecast increase. The first would be 0.5 (half of twice the rows is new) if the last doubling were known exactly.
OF_DRAW, OF_INCREASE = 0.75, 0.04
# Where the last doubling grew by more than this multiple of the model's, the model says nothing.
MOST_SCALE = 4.0
# For unlimited data: each doubling must add at most this share of the one before, and all to come at most so many nats.
FALLING, LITTLE = 0.65, 0.1
# And from so many rows on: fewer seldom hold one of a rare kind, and growth then seems to be over.
UNLIMITED_ROWS = 32
# Error of what is added beyond twice the rows, as a share of it.
OF_BEYOND = 0.5


@dataclass(frozen=True)
class Point:
    """G-Vendi of subsets of n rows without replacement.

    n: rows of a subset.
    mean: over the subsets.
    low, high: the smallest and the largest; subsets share rows, so this is no interval.
    draws: how many subsets.
    """

    n: int
    mean: float
    low: float
    high: float
    draws: int


@dataclass(frozen=True)
class Forecast:
    """What more data of the same source would score.

    n: rows, those that were seen among them; None for unlimited data.
    value: the forecast.
    low, high: its band of the growth's level.
    """

    n: int | None
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Growth:
    """G-Vendi by the number of rows.

    points: of n / 4, n / 2 and n rows.
    forecast: of 2n rows: the n that were seen and n more of the same source.
    unlimited: of unlimited data; None where the rows do not say.
    why_not: the reason for that, in words; None where `unlimited` is given.
    level: of the bands.
    """

    points: list[Point]
    forecast: Forecast
    unlimited: Forecast | None
    why_not: str | None
    level: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def growth(
    source: PoolLike,
    interval: Interval | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    dim: int | None = None,
    state: VendiState | None = None,
    quarters: Sequence[VendiState] | None = None,
    engine: Engine | None = None,
) -> Growth:
    """G-Vendi of n / 4, n / 2 and n rows of a matrix [n, K], pool or run directory, with a forecast for 2n.

    interval: the `jackknife` of all rows at this level, if it is known already; else one more pass computes it.
    seed: of the draw that cuts the rows into quarters; halves are all six pairs of quarters, or two where a spectrum
        takes long (coordinates above 2048).
    dim: K of the sketches, where the rows are given in other coordinates (default: the width of the rows).
    state: of all rows, if it is there already: it keeps its spectrum, which takes longest.
    quarters: their states, if they are there already; else one pass makes them.
    engine: which processes read a run directory; None is this one.

        H_2n  = H_n + c (M(n -> 2n) - H_n),   c = (H_n - H_half) / (M(half -> n) - H_half), M as above
        error^2 = 0.75 SE^2 + (0.04 (H_2n - H_n))^2, SE that of one draw's entropy

    Twice the rows show directions that n rows cannot; M counts them by the tangent of d at its last known s', its
    least. Unlimited data is offered where doublings add ever less: the next at most 0.65 of the last, and all to come,
    as a geometric series, at most 10 %; and from 32 rows on. Of eigenvalues like k^-2 each doubling adds 0.7 of the
    one before, of slower ones more, so a heavy tail passes late, where K ends it. Nothing here knows of a kind of row
    that no row shows.
    Memory: eight K x K states. Raises GvendiError for fewer than 16 rows.
    """
    pool = as_pool(source)
    n, dim = len(pool), dim or pool.dim
    if n < LEAST_ROWS:
        raise GvendiError(
            f"source has {n} rows; growth needs at least {LEAST_ROWS}, as it scores quarters of them"
        )
    if state is not None and (state.n, state.dim) != (n, pool.dim):
        raise GvendiError(
            f"state is of {state.n} rows of width {state.dim}; wanted that of these {n} rows of width {pool.dim}"
        )
    if quarters is None:
        quarters = quarters_of(over_pool(engine, pool, partial(Quarters, pool.dim), [quarter_of(n, seed)]))
    pairs = list(itertools.combinations(quarters, 2))
    # The first pair and the last have no quarter in common.
    halves = [_joined(pair) for pair in (pairs if pool.dim <= LARGE_DIM else (pairs[0], pairs[-1]))]
    whole = _joined(quarters) if state is None else state
    if interval is None:
        whole.eigenbasis()
        removed = over_pool(engine, pool, partial(LeftOut, whole, pairs_of(n)))
        interval = interval_of(whole, removed, level)
    elif interval.n != n or interval.level != level:
        raise GvendiError(
            f"interval is of {interval.n} rows at level {interval.level}; wanted that of these {n} rows at {level}"
        )
    points = [
        _point(quarters if pool.dim <= LARGE_DIM else quarters[:1]),
        _point(halves),
        Point(n, interval.value, interval.value, interval.value, 1),
    ]
    entropy, half = whole.entropy(), float(np.mean([state.entropy() for state in halves]))
    seen = entropy - half
    model = float(np.mean([entropy_of_more(s.spectrum(), s.n, n, dim) for s in halves])) - half
    scale = min(max(seen / model, 0.0), MOST_SCALE) if model > 1e-9 else 1.0
    most = math.log(min(2 * n, dim))
    increase = scale * max(entropy_of_more(whole.spectrum(), n, 2 * n, dim) - entropy, 0.0)
    increase = max(min(increase, most - entropy), 0.0)
    t = quantile(level, interval.freedom)
    error = math.sqrt(OF_DRAW * interval.se**2 + (OF_INCREASE * increase) ** 2)
    forecast = _forecast(2 * n, entropy + increase, t * error, most)
    falling = increase / seen if seen > 1e-9 else 0.0
    beyond = increase * falling / (1 - falling) if falling < 1 else math.inf
    why_not = _why_not(n, seen, increase, falling, beyond)
    unlimited = None
    if why_not is None:
        # Of an endless draw nothing varies, so the whole error of this one counts.
        error = math.sqrt(
            (OF_DRAW + 0.5) * interval.se**2 + (OF_INCREASE * increase) ** 2 + (OF_BEYOND * beyond) ** 2
        )
        unlimited = _forecast(None, entropy + increase + beyond, t * error, math.log(dim))
    return Growth(points, forecast, unlimited, why_not, level)


def entropy_of_more(spectrum: torch.Tensor, n: int, m: int, dim: int) -> float:
    """H_1 of m >= n rows from the eigenvalues (trace 1) of n, by the module's formula; the least that it allows."""
    held = spectrum[: min(n, dim)].double()
    # Trapezoid in ln s; below 1e-9 eigenvalues are rounding.
    s = torch.exp(torch.arange(math.log(1e-9), math.log(1e5), 0.1, dtype=torch.float64))
    d = (held / (held + s[:, None])).sum(dim=1)
    # 1 - d/n without cancellation.
    left = ((s[:, None] / (held + s[:, None])).sum(dim=1) + (n - len(held))) / n
    moved = s * (1 - d / m) / left
    at = moved.log()
    term = (d - 1 / (1 + moved)) * moved
    integral = float(((term[1:] + term[:-1]) / 2 * at.diff()).sum())
    # Below the first node: d is convex, so its tangent lies below it; no more than min(m, K) directions exist.
    first, height = float(moved[0]), float(d[0])
    slope = float((d[4] - d[0]) / (moved[4] - moved[0]))
    area = min(height * first - slope * first**2 / 2, min(m, dim) * first)
    return integral + area - math.log1p(first)


class Quarters:
    """States of four parts of the rows, as the sums of a pass over them; which part a row is in goes along."""

    def __init__(self, dim: int) -> None:
        self._states = [VendiState(dim) for _ in range(4)]

    def add(self, first: int, rows: torch.Tensor, part: np.ndarray) -> None:
        """Take up rows [n, K] with the numbers of their parts [n]."""
        for i, state in enumerate(self._states):
            chosen = torch.from_numpy(np.flatnonzero(part == i))
            if len(chosen):
                state.update(rows[chosen])

    def result(self) -> list[VendiState]:
        """The states."""
        return self._states


def quarter_of(n: int, seed: int) -> np.ndarray:
    """Which of four random parts each of n rows is in, int8 [n]; their sizes differ by one at most."""
    part = np.empty(n, np.int8)
    part[order(stream("quarters", seed), n)] = np.arange(n) % 4
    return part


def quarters_of(chunks: Iterable[Sequence[VendiState]]) -> list[VendiState]:
    """The quarters' states from those of each chunk, in the order of the chunks."""
    states: list[VendiState] = []
    for more in chunks:
        states = (
            [state.merge(other) for state, other in zip(states, more, strict=True)] if states else list(more)
        )
    return states


def _joined(states: Sequence[VendiState]) -> VendiState:
    joined = VendiState(states[0].dim)
    for state in states:
        joined.merge(state)
    return joined


def _point(states: Sequence[VendiState]) -> Point:
    values = [state.gvendi() for state in states]
    return Point(states[0].n, float(np.mean(values)), min(values), max(values), len(values))


def _forecast(n: int | None, entropy: float, reach: float, most: float) -> Forecast:
    """`most`: of the entropy."""
    low, value, high = (math.exp(min(max(h, 0.0), most)) for h in (entropy - reach, entropy, entropy + reach))
    return Forecast(n, value, low, high)


def _why_not(n: int, seen: float, increase: float, falling: float, beyond: float) -> str | None:
    last, following = _percent(seen), _percent(increase)
    if n < UNLIMITED_ROWS:
        return f"fewer than {UNLIMITED_ROWS} rows are too few to say what many more of them would lead to"
    if falling > FALLING:
        return (
            f"the last doubling of the rows added {last} and the next is expected to add {following}: "
            "growth does not slow down enough to say where it ends"
        )
    if increase + beyond > LITTLE:
        return (
            f"twice the rows are expected to score {following} more, and more rows more still: too far from "
            "the end to say where it is"
        )
    return None


def _percent(nats: float) -> str:
    """By how much so many nats raise a score; small shares with a decimal, so that they are not shown as none."""
    share = 100 * math.expm1(nats)
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"
