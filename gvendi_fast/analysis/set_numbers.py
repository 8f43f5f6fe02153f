"""The numbers of one set of rows: what score, compare, report and a synthesis run say of it, the same everywhere.

Beside G-Vendi and the interval of another draw stand what unlimited K would make of it, its value without the mean of a
reference (centred), and how much of the rows lies in one direction. Each is defined in `gvendi_fast.vendi`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from gvendi_fast.analysis.most import NEAR_MOST, what_can_tell
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.shown import number, shown
from gvendi_fast.base.unit_length import Rows, unit_rows
from gvendi_fast.data.distinct import Distinct
from gvendi_fast.data.passes import Sums, Together, over_pool
from gvendi_fast.data.pool import MatrixPool, Pool
from gvendi_fast.kernels.sketch_matrix import MAX_DIM
from gvendi_fast.vendi.centered import CenteredScore, CenteredSums, RowMean, centered, centered_of
from gvendi_fast.vendi.diagnosis import Diagnosis, diagnose
from gvendi_fast.vendi.growth import LEAST_ROWS, Growth, Quarters, growth, quarter_of, quarters_of
from gvendi_fast.vendi.jackknife import Interval, LeftOut, Removed, interval_of, pairs_of
from gvendi_fast.vendi.of_rows import own_coordinates
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import NOTABLE, UnlimitedK, of_spectrum

# Of fewer rows an interval is not to be relied on.
FEW = 16
# Tasks of a pass whose results are several K x K matrices.
MOST_TASKS = 64


@dataclass(frozen=True, eq=False)
class Sample:
    """n rows with what their numbers are made of, in K coordinates or, of fewer rows than K, in n + 1.

    state, own: of the rows. reference: the mean that centred values leave out. pool: the rows. dim: K. distinct:
    different rows.
    """

    state: VendiState
    own: RowMean
    reference: RowMean
    pool: Pool
    dim: int
    distinct: int

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        reference: RowMean | None = None,
        distinct: int | None = None,
    ) -> Sample:
        """Rows [n, K] in memory. reference: None for the rows' own mean. distinct: counted where not given.

        Where n < K the rows are given in coordinates along the eigenvectors of their Gram matrix, the reference's mean
        among them: the same angles, and spectra of n + 1 numbers in place of K.
        """
        n, dim = rows.shape
        if distinct is None:
            distinct = Distinct().update(torch.as_tensor(rows).numpy()).count()
        own = RowMean(dim).update(rows)
        if n >= dim:
            return cls(VendiState(dim).update(rows), own, reference or own, MatrixPool(rows), dim, distinct)
        mean = (reference or own).vector()
        coordinates = own_coordinates(torch.cat([unit_rows(rows), mean[None]]))
        here, there = coordinates[:n], coordinates[n]
        own = RowMean(n + 1).update(here)
        state = VendiState(n + 1).update(here)
        moved = own if reference is None else RowMean.of_vector(there, reference.n)
        return cls(state, own, moved, MatrixPool(here), dim, distinct)

    def unlimited_k(self, level: float = 0.95) -> UnlimitedK:
        """What the exact gradients of these rows would score."""
        of = self.state
        return of_spectrum(of.spectrum(), of.entropy(), of.n, self.dim, distinct=self.distinct, level=level)

    def centered(self) -> CenteredScore:
        """The value without the reference's mean."""
        return centered((rows for _, rows in self.pool.blocks()), self.reference).score()


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
    centered: CenteredScore
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


@dataclass(frozen=True, eq=False)
class SecondPass:
    """What a second pass over a sample's rows gives; the first one made its state and mean.

    removed: by chunk, for the jackknife. centered: the value without the reference's mean.
    quarters: states of random quarters of the rows; None where they were not asked for, or of too few rows.
    """

    removed: list[Removed]
    centered: CenteredScore
    quarters: list[VendiState] | None


def second_pass(sample: Sample, seed: int | None = None, engine: Engine | None = None) -> SecondPass:
    """Read a sample's rows once; seed: of the quarters, None for none. Memory: that of 16 states at most."""
    state, n = sample.state, sample.state.n
    # Made once, and the same on every machine.
    state.eigenbasis()
    begins: list[Callable[[], Sums]] = [
        partial(LeftOut, state, pairs_of(n)),
        partial(CenteredSums, sample.reference),
    ]
    along: list[np.ndarray] = []
    is_cut = seed is not None and n >= LEAST_ROWS
    if seed is not None and is_cut:
        begins.append(partial(Quarters, state.dim))
        along.append(quarter_of(n, seed))
    removed: list[Removed] = []
    centred: list[tuple[VendiState, int]] = []
    quarters: list[VendiState] | None = None
    for left, less, *parts in over_pool(engine, sample.pool, partial(Together, *begins), along, MOST_TASKS):
        removed.append(left)
        centred = [less] if not centred else [(centred[0][0].merge(less[0]), centred[0][1] + less[1])]
        if is_cut:
            quarters = quarters_of([*([] if quarters is None else [quarters]), *parts])
    return SecondPass(removed, centered_of(centred, sample.reference).score(), quarters)


def numbers_of(sample: Sample, level: float = 0.95, second: SecondPass | None = None) -> SetNumbers:
    """The numbers of a sample; level: of the intervals. second: if it is there already."""
    state = sample.state
    second = second_pass(sample) if second is None else second
    return SetNumbers(
        interval=interval_of(state, second.removed, level),
        entropy=max(0.0, state.entropy()),
        dim=sample.dim,
        unlimited_k=sample.unlimited_k(level),
        centered=second.centered,
        diagnosis=diagnose(state, sample.own),
        distinct=sample.distinct,
    )


def growth_of(
    sample: Sample, interval: Interval, seed: int = 0, second: SecondPass | None = None
) -> Growth | None:
    """G-Vendi of a quarter and half of a sample's rows, with a forecast for twice as many; None of too few rows.

    second: with quarters cut by this seed, if it is there already.
    """
    if sample.state.n < LEAST_ROWS:
        return None
    return growth(
        sample.pool,
        interval,
        level=interval.level,
        seed=seed,
        dim=sample.dim,
        state=sample.state,
        quarters=second and second.quarters,
    )


def limits(numbers: SetNumbers, grown: Growth | None = None) -> list[str]:
    """What holds a score down or makes it say little, in sentences: its most, K, n and the proxy, in this order.

    grown: of the same rows, if it is known.
    """
    said = [_most(numbers), _dim(numbers), None if grown is None else _rows(numbers, grown), _few(numbers)]
    direction = numbers.diagnosis.sentence
    said.append(direction and f"one direction: {direction}")
    return [sentence for sentence in said if sentence is not None]


def noise_sentence(values: Iterable[UnlimitedK]) -> str | None:
    """What K does to scores side by side; None where no bias is notable."""
    values = list(values)
    if not any(of.is_notable for of in values):
        return None
    ends = min(of.bias for of in values), max(of.bias for of in values)
    sign = "" if round(100 * ends[1]) <= 0 else "+"
    # The least that K takes off stands first.
    shares = [100 * end for end in ends] if sign else [-100 * end for end in reversed(ends)]
    low, high = (shown(share, f"{sign}.0f") for share in shares)
    about = f"{low} %" if low == high else f"{low} to {high} %"
    does = f"changes these scores by about {about}" if sign else f"takes about {about} off these scores"
    rough = ", known only roughly of so many rows," if any(of.is_bound_only for of in values) else ""
    return (
        f"the noise of sketches of K = {values[0].dim:,} numbers {does}; "
        f"values for unlimited K{rough} stand beside them"
    )


def _most(numbers: SetNumbers) -> str | None:
    n, dim, value = numbers.n, numbers.dim, numbers.gvendi
    most = min(n, dim, numbers.distinct)
    if most == 1 or value < NEAR_MOST * most:
        return None
    if most == dim < min(n, numbers.distinct):
        tell = what_can_tell(min(n, numbers.distinct), dim)
        return f"K: no data scores above {dim:,}, the numbers of a sketch, and this is near it; {tell}"
    what = f"{n:,} rows" if most == n else f"{most:,} different rows of {n:,}"
    tell = what_can_tell(most, dim)
    return f"n: {what} cannot score above {most:,}, and those of any diverse data come near that; {tell}"


def _dim(numbers: SetNumbers) -> str | None:
    of = numbers.unlimited_k
    if not of.is_notable:
        return None
    share = f"{100 * abs(of.bias):.0f} %"
    halves = (
        f"--dim {of.dim_to_halve} would at least halve the bias"
        if of.dim_to_halve <= MAX_DIM
        else f"to halve the bias takes more than the largest --dim, {MAX_DIM:,}"
    )
    if of.is_bound_only:
        return (
            f"K: exact gradients would score from about {number(of.low)} to {number(of.high)}; of so many rows K = "
            f"{of.dim:,} shows too little to say more; {halves}"
        )
    way = "lowers" if of.bias < 0 else "raises"
    return f"K: the noise of sketches of {of.dim:,} numbers {way} the score by about {share}; {halves}"


def _few(numbers: SetNumbers) -> str | None:
    # So few rows seldom hold one of a rare kind, or two of the same.
    if not 1 < numbers.n < FEW:
        return None
    return f"n: the interval of fewer than {FEW} rows may be too narrow, where some kinds of rows are rare"


def _rows(numbers: SetNumbers, grown: Growth) -> str | None:
    ahead = grown.forecast
    if ahead.value < (1 + NOTABLE) * numbers.gvendi:
        return None
    return (
        f"n: still growing; {ahead.n:,} rows of the same source would score about {number(ahead.value)} "
        f"({number(ahead.low)} to {number(ahead.high)})"
    )
