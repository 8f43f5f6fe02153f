"""Data sets side by side: G-Vendi at equal n, what each adds to the others, and their nearest rows.

All sets are compared by n rows each, drawn by id. With Sigma_k of those rows and Sigma the mean over m sets:
    difference of A and B: G_A - G_B of G = exp(H_1), at this n; its interval is for the difference of what n rows of
        each source score on average. The samples are independent: se^2 of H_A - H_B is the sum of both, its degrees of
        freedom are Welch's (1947), and the limits of G_A - G_B follow from each one's own (Zou and Donner 2008)
    between-source entropy: H(Sigma) - mean_k H(Sigma_k), from 0 to ln m (nothing in common). It is above 0 for one
        population too: its mean over random partitions of the same rows into m sets says how much
    what k adds: G-Vendi of n rows drawn in equal parts from all sets, less that of n rows from all sets but k
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from gvendi_fast.analysis.most import near_most
from gvendi_fast.analysis.neighbours import Pair, nearest_pairs
from gvendi_fast.analysis.set_numbers import Sample, numbers_of
from gvendi_fast.base.differences import PARAMETERS, comparable, differences, same_spec
from gvendi_fast.base.draws import numbered_stream, order, places_by_id
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.student import outside, quantile
from gvendi_fast.data.pool import Pool, PoolLike, as_pool
from gvendi_fast.data.sketched_parameters import differing_runs
from gvendi_fast.vendi.centered import CenteredScore, RowMean, centred_spec, equal_mean
from gvendi_fast.vendi.diagnosis import Diagnosis
from gvendi_fast.vendi.jackknife import Interval
from gvendi_fast.vendi.of_rows import gvendi
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import UnlimitedK

# More rows of a set would cost memory and add nothing to the comparison.
MOST_ROWS = 50_000
# With fewer rows an interval says nothing.
LEAST_ROWS = 8
# Random partitions that the between-source entropy is compared with.
PARTITIONS = 10


@dataclass(frozen=True)
class SetScore:
    """One data set, scored by n of its rows.

    rows: how many it has.
    n: how many were compared.
    gvendi: of these n rows.
    low, high: the interval for the G-Vendi of another draw of n rows from the same source.
    entropy_se: standard error of the entropy, in nats.
    unlimited_k: what the exact gradients of these rows would score.
    centered: their value without the mean of the reference, the same for all sets.
    diagnosis: what one direction does to the score.
    saturated: whether n rows (or K) leave no room to differ upwards: `gvendi` is at least 90 % of min(n, K).
    adds: G-Vendi of n rows drawn equally from all sets, minus that of n rows from all other sets; None for a single
        set.
    """

    rows: int
    n: int
    gvendi: float
    low: float
    high: float
    entropy_se: float
    adds: float | None
    saturated: bool
    unlimited_k: UnlimitedK
    centered: CenteredScore
    diagnosis: Diagnosis

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        nested = ("unlimited_k", "centered", "diagnosis")
        return {**vars(self), **{name: getattr(self, name).to_dict() for name in nested}}


@dataclass(frozen=True)
class Difference:
    """How the G-Vendi of n rows of one set differs from that of n rows of another.

    first, second: names of the sets.
    difference: G-Vendi of `first` minus that of `second`.
    low, high: the interval of the difference of what n rows of either source score on average.
    ratio: G-Vendi of `first` over that of `second`.
    ratio_low, ratio_high: the interval of the ratio.
    p_value: two-sided, of equal entropies at this n.
    real: whether the interval of the ratio excludes 1.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    p_value: float
    real: bool


@dataclass(frozen=True)
class Overlap:
    """What two sets have in common, by the rows that were compared.

    first, second: names of the sets.
    threshold: cosine from which two rows count as neighbours.
    share_of_first: share of the rows of `first` with a neighbour in `second`.
    share_of_second: share of the rows of `second` with a neighbour in `first`.
    same_ids: ids that are in both sets.
    same_sketches: rows of `first` whose sketch is also in `second`, up to rounding.
    compared: rows of either set that were compared.
    pairs: the nearest pairs, best first.
    """

    first: str
    second: str
    threshold: float
    share_of_first: float
    share_of_second: float
    same_ids: int
    same_sketches: int
    compared: tuple[int, int]
    pairs: list[Pair]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; entropies are in nats.

    n: rows of each set.
    dim: K.
    level: of all intervals.
    sets: {name: score}.
    differences: of each two sets.
    union: G-Vendi of all drawn rows together (m times n of them).
    between: the between-source entropy.
    between_chance: its mean over random partitions of the same rows.
    between_share: where `between` lies from `between_chance` (0) to sets with nothing in common (1); below 0 for sets
        that share rows.
    overlaps: of each two sets.
    """

    n: int
    dim: int
    level: float
    sets: dict[str, SetScore]
    differences: list[Difference]
    union: float
    between: float
    between_chance: float
    between_share: float
    overlaps: list[Overlap]

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi compare --json` prints."""
        return {**asdict(self), "sets": {name: found.to_dict() for name, found in self.sets.items()}}


def compare(
    sets: Mapping[str, PoolLike],
    *,
    n: int | None = None,
    pairs: int = 10,
    threshold: float = 0.95,
    level: float = 0.95,
    seed: int = 0,
    mean: RowMean | None = None,
) -> Comparison:
    """Compare two or more data sets by their sketches.

    sets: by name, each a run directory or its path, a matrix [N, K] or a pool, all of one kind of sketch.
    n: rows of each set (default: those of the smallest set, at most 50,000).
    pairs: nearest pairs to report for each two sets.
    threshold: cosine from which two rows count as near duplicates.
    level: of all intervals.
    seed: of the draws, which depend on ids and this seed alone.
    mean: the reference that centred values leave out (default: the mean of the rows compared, each set weighing the
        same).
    Raises GvendiError for sets that cannot be compared, and for a mean of another spec.
    """
    if not 0 < level < 1:
        raise GvendiError(f"level is {level}; wanted a confidence level between 0 and 1, such as 0.95")
    pools = _pools(sets)
    smallest = min(len(pool) for pool in pools.values())
    name = min(pools, key=lambda name: len(pools[name]))
    if smallest < LEAST_ROWS:
        raise GvendiError(
            f"{name!r} has {smallest} rows; a comparison needs at least {LEAST_ROWS} of every set"
        )
    if n is None:
        n = min(smallest, MOST_ROWS)
    if not LEAST_ROWS <= n <= smallest:
        raise GvendiError(
            f"n is {n}; wanted {LEAST_ROWS} to {smallest}, the rows of the smallest set ({name!r})"
        )
    places = {name: places_by_id(pool.ids, n, seed) for name, pool in pools.items()}
    # Read in the pool's order, in which `score` reads them: all rows of a set score the same in both.
    drawn = {name: pool.take(np.sort(places[name])) for name, pool in pools.items()}
    shuffled = {name: torch.from_numpy(np.argsort(np.argsort(here))) for name, here in places.items()}
    dim = next(iter(drawn.values())).shape[1]
    if mean is None:
        mean = equal_mean(RowMean(rows.shape[1]).update(rows) for rows in drawn.values())
    else:
        centred_spec(next((pool.spec for pool in pools.values() if pool.spec is not None), None), mean, dim)
    samples = {name: Sample.of_rows(rows, mean) for name, rows in drawn.items()}
    numbers = {name: numbers_of(sample, level) for name, sample in samples.items()}
    scores = {name: found.interval for name, found in numbers.items()}
    adds = _adds(drawn, shuffled, n)
    union = _of_union(drawn, samples)
    within = sum(sample.state.entropy() for sample in samples.values()) / len(samples)
    between = max(0.0, math.log(union) - within)
    chance = _between_by_chance(list(drawn.values()), list(shuffled.values()), math.log(union), seed)
    room = math.log(len(pools)) - chance
    names = list(pools)
    together = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return Comparison(
        n=n,
        dim=dim,
        level=level,
        sets={
            name: SetScore(
                rows=len(pools[name]),
                n=n,
                gvendi=f.value,
                low=f.low,
                high=f.high,
                entropy_se=f.se,
                adds=adds.get(name),
                saturated=near_most(f.value, n, dim),
                unlimited_k=numbers[name].unlimited_k,
                centered=numbers[name].centered,
                diagnosis=numbers[name].diagnosis,
            )
            for name, f in scores.items()
        },
        differences=[difference(a, scores[a], b, scores[b]) for a, b in together],
        union=union,
        between=between,
        between_chance=chance,
        # All rows are orthogonal to each other, so random sets have nothing in common either.
        between_share=(between - chance) / room if room > 1e-6 else 0.0,
        overlaps=[_overlap(a, pools[a], b, pools[b], pairs, threshold, seed) for a, b in together],
    )


def _of_union(drawn: Mapping[str, torch.Tensor], samples: Mapping[str, Sample]) -> float:
    """G-Vendi of all rows drawn, from the smaller of Gram and covariance matrix."""
    rows = list(drawn.values())
    dim = rows[0].shape[1]
    if sum(map(len, rows)) < dim:
        return gvendi(torch.cat(rows))
    union = VendiState(dim)
    for name, here in drawn.items():
        # Of fewer rows than K a sample's state is in coordinates of its own.
        own = samples[name].state
        union.merge(own if len(here) >= dim else VendiState(dim).update(here))
    return union.gvendi()


def difference(first: str, a: Interval, second: str, b: Interval) -> Difference:
    """The difference of two samples' G-Vendi at their n; its interval is of what such samples score on average.

    The samples are taken to be independent; rows that are in both make the interval too wide, not too narrow.
    """
    gap = math.log(a.value) - math.log(b.value)
    se = math.hypot(a.se, b.se)
    freedom = _freedom(a, b)
    z = quantile(a.level, freedom)
    low, high = gap - z * se, gap + z * se
    # Distances from each value to its own limits.
    a_down, a_up = -a.value * math.expm1(-z * a.se), a.value * math.expm1(z * a.se)
    b_down, b_up = -b.value * math.expm1(-z * b.se), b.value * math.expm1(z * b.se)
    return Difference(
        first=first,
        second=second,
        difference=a.value - b.value,
        low=a.value - b.value - math.hypot(a_down, b_up),
        high=a.value - b.value + math.hypot(a_up, b_down),
        ratio=math.exp(gap),
        ratio_low=math.exp(low),
        ratio_high=math.exp(high),
        p_value=_p_value(gap, se, freedom),
        real=not low <= 0 <= high,
    )


def _freedom(a: Interval, b: Interval) -> float:
    """Welch's degrees of freedom of the two standard errors together."""
    known = sum(interval.se**4 / interval.freedom for interval in (a, b) if interval.se > 0)
    return math.hypot(a.se, b.se) ** 4 / known if known > 0 else math.inf


def _p_value(gap: float, se: float, freedom: float) -> float:
    if se == 0:
        return 1.0 if gap == 0 else 0.0
    return outside(gap / se, freedom)


def _pools(sets: Mapping[str, Any]) -> dict[str, Pool]:
    if not sets:
        raise GvendiError("sets is empty; give at least one data set")
    pools = {name: as_pool(source) for name, source in sets.items()}
    (first, reference), *others = pools.items()
    for name, pool in others:
        if pool.dim != reference.dim:
            raise GvendiError(
                f"{first!r} has sketches of dim {reference.dim} and {name!r} of dim {pool.dim}; use one --dim"
            )
        if pool.spec is not None and reference.spec is not None and not same_spec(pool.spec, reference.spec):
            pair = comparable(reference.spec, pool.spec)
            differing = sorted(differences(*pair, "(absent)"), key=itemgetter(0))
            renamed = _renamed(reference, pool, first, name)
            lines = "\n".join(
                renamed if key == PARAMETERS and renamed else f"  {key}: {one} and {other}"
                for key, one, other in differing
            )
            raise GvendiError(
                f"{first!r} and {name!r} were sketched with different settings:\n{lines}\n"
                "such sketches cannot be compared; sketch both with the same settings"
            )
    return pools


def _renamed(one: Pool, other: Pool, first: str, second: str) -> str | None:
    """Which parameters differ, of pools that are run directories with their parameters beside them."""
    runs = [getattr(pool, "run", None) for pool in (one, other)]
    if None in runs:
        return None
    places = [(run.path, run.sketch_spec) for run in runs]
    return differing_runs(*places, f"in {first!r}", f"in {second!r}")


def _adds(
    drawn: Mapping[str, torch.Tensor], shuffled: Mapping[str, torch.Tensor], n: int
) -> dict[str, float]:
    if len(drawn) < 2:
        return {}

    def mixed(names: list[str]) -> float:
        rows = [
            drawn[name][shuffled[name][: n // len(names) + (i < n % len(names))]]
            for i, name in enumerate(names)
        ]
        dim = rows[0].shape[1]
        if n < dim:
            return gvendi(torch.cat(rows))
        state = VendiState(dim)
        for here in rows:
            state.update(here)
        return state.gvendi()

    names = list(drawn)
    everything = mixed(names)
    return {name: everything - mixed([other for other in names if other != name]) for name in names}


def _between_by_chance(
    drawn: list[torch.Tensor], shuffled: list[torch.Tensor], union: float, seed: int
) -> float:
    """Mean between-source entropy of random partitions of all rows into as many sets of the same size."""
    if len(drawn) == 1:
        return 0.0
    sets, n = len(drawn), len(drawn[0])
    words = numbered_stream(seed)
    within = 0.0
    for _ in range(PARTITIONS):
        # Each row's random set, n rows a set.
        label = order(words, sets * n).reshape(sets, n) % sets
        label = torch.from_numpy(label)
        for k in range(sets):
            part = torch.cat([rows[shuffled[i][label[i] == k]] for i, rows in enumerate(drawn)])
            within += math.log(gvendi(part)) / (sets * PARTITIONS)
    return union - within


def _overlap(first: str, a: Pool, second: str, b: Pool, pairs: int, threshold: float, seed: int) -> Overlap:
    picked = [np.sort(places_by_id(pool.ids, min(len(pool), MOST_ROWS), seed)) for pool in (a, b)]
    nearest = nearest_pairs(a, picked[0], b, picked[1], pairs, threshold)
    return Overlap(
        first=first,
        second=second,
        threshold=threshold,
        share_of_first=nearest.share_of_first,
        share_of_second=nearest.share_of_second,
        same_ids=len(set(a.ids) & set(b.ids)) if a.spec is not None and b.spec is not None else 0,
        same_sketches=nearest.identical,
        compared=(len(picked[0]), len(picked[1])),
        pairs=nearest.pairs,
    )
