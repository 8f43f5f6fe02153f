"""Groups of a run directory compared at equal n: the mean G-Vendi of several draws of n rows, with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from gvendi_fast.analysis.most import NEAR_MOST, near_most, what_can_tell
from gvendi_fast.base.draws import stream, subset
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.student import quantile
from gvendi_fast.base.unit_length import unit_rows
from gvendi_fast.data.distinct import Distinct
from gvendi_fast.data.parts import Part
from gvendi_fast.data.passes import over_run
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.checks import MAX_GROUP
from gvendi_fast.vendi.centered import RowMean, centre_rows
from gvendi_fast.vendi.jackknife import jackknife
from gvendi_fast.vendi.of_rows import gvendi, own_coordinates
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import of_spectrum

MAX_GROUPS = 10_000
# A group of fewer rows would pull the n of all others down to its own.
MIN_GROUP_ROWS = 32
# The name that smaller groups get together.
OTHERS = "(others)"
LEVEL = 0.95
# Draws from a group: those of up to MAX_GROUP rows are scored in one call, each larger one needs a matrix.
DRAWS, LARGE_DRAWS = 20, 5
# Bytes of sketches in memory at once, and of those copied into draws at once.
GROUP_BYTES, DRAW_BYTES = 1 << 30, 64 << 20


@dataclass(frozen=True)
class GroupScore:
    """G-Vendi of n rows of a group, by repeated draws.

    rows: how many the group has.
    n: rows of a draw.
    gvendi: the mean over the draws; None for a group that is too small to compare.
    low, high: the 95 % interval for the G-Vendi of n other rows from the group's source.
    draws: how many. A group of exactly n rows is drawn once, whole.
    unlimited_k: the mean as it would be for unlimited K: times the ratio of both in the first draw.
    centered: the mean of centred G-Vendi over the draws, by the reference of the whole run; None where no row of the
        group has a direction without that mean.
    """

    gvendi: float | None
    low: float | None
    high: float | None
    draws: int
    n: int
    rows: int
    unlimited_k: float | None = None
    centered: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def with_others(rows: Mapping[str, np.ndarray], n: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """The groups that are compared, by name, and the n to compare them at (default: the smallest of them).

    Groups of fewer than 32 rows (half the largest group's, where that is less; n, where n is given) are compared
    together, as "(others)", where there are two or more of them and their rows are enough.
    """
    least = min(MIN_GROUP_ROWS, max(1, max(map(len, rows.values())) // 2)) if n is None else n
    compared = {group: rows[group] for group in sorted(rows) if len(rows[group]) >= least}
    small = [numbers for numbers in rows.values() if len(numbers) < least]
    if len(small) > 1 and sum(map(len, small)) >= least:
        name = OTHERS
        while name in rows:
            name = f"({name})"
        compared[name] = np.sort(np.concatenate(small))
    return compared, n or min(map(len, compared.values()))


def pooled_sentence(by: Mapping[str, Any]) -> str | None:
    """What became of groups that are too small to compare; `by` holds GroupScore or Measures by group."""
    small = [score for group, score in by.items() if score.gvendi is None]
    if not small:
        return None
    least = min(score.rows for score in by.values() if score.gvendi is not None)
    counted = sum(score.rows for score in small)
    groups = f"{len(small)} group{'s' * (len(small) > 1)} with too few rows to compare"
    # Fewer rows than every compared group has are in none of them.
    pooled = [group for group in by if group.strip("()") == OTHERS.strip("()")]
    what = (
        f"counted together as {max(pooled, key=len)}"
        if len(small) > 1 and counted >= least
        else "not compared"
    )
    return f"{groups} ({counted:,} row{'s' * (counted > 1)} in all, fewer than {least:,} each): {what}"


def saturation_sentence(values: Iterable[float], n: int, dim: int) -> str | None:
    """What it means that scores of n rows lie near their most; None where none does."""
    values = list(values)
    near = sum(near_most(value, n, dim) for value in values)
    if not near:
        return None
    of = (
        "every score lies"
        if near == len(values)
        else f"{near} of {len(values)} scores lie{'s' * (near == 1)}"
    )
    within = f"{of} within {100 * (1 - NEAR_MOST):.0f} % of that"
    tell = f"{what_can_tell(n, dim)} how diverse such sets are"
    if n > dim:
        return f"sketches of K = {dim:,} cannot show more than {dim:,}: {within}; {tell}"
    rows = f"{n:,} row{'s' * (n > 1)} cannot show more than {n:,}"
    return f"{rows}: {within}, as those of any diverse data would at this n; {tell}"


def group_scores(
    run: RunDirectory, seed: int = 0, reference: RowMean | None = None, engine: Engine | None = None
) -> dict[str, GroupScore]:
    """G-Vendi of every group of a run at equal n, as `with_others` chooses groups and n.

    Rows are drawn without replacement, 20 times (5 times where n is above 256); a draw depends on seed, group and
    the group's rows alone. The interval is that of the first draw's `jackknife` around the mean of all D draws of a
    group of N rows, t sqrt(1 + n/N + (1 - n/N) / D) SE: what varies is a new draw, the group's rows and the choice of
    the D among them.
    reference: whose mean centred values leave out; without one there are none.
    engine: which processes read the run; None is this one.
    Memory: 8 bytes a row of the run, and GROUP_BYTES of sketches (or one draw, where that is more).
    """
    rows = _rows_of_groups(run, engine)
    sizes = {group: len(numbers) for group, numbers in rows.items()}
    compared, n = with_others(rows)
    dim = run.dim
    mean = None if reference is None else reference.vector()
    values_of: dict[str, list[float]] = {group: [] for group in compared}
    centred_of: dict[str, list[float]] = {group: [] for group in compared}
    firsts: dict[str, _First] = {}
    for batch in _batches(compared, n, seed, GROUP_BYTES // (4 * dim)):
        for (group, _), value, centred, drawn in zip(
            batch, *_score(run, batch, dim, mean, engine), strict=True
        ):
            values_of[group].append(value)
            if centred is not None:
                centred_of[group].append(centred)
            if group not in firsts:
                firsts[group] = _first(drawn)
    scores = {group: GroupScore(None, None, None, 0, 0, size) for group, size in sizes.items()}
    for group, values in values_of.items():
        size, value, first = len(compared[group]), statistics.fmean(values), firsts[group]
        share = n / size
        reach = first.se * math.sqrt(1 + share + (1 - share) / len(values))
        # The interval of one row is that row's score, 1.
        reach = quantile(LEVEL, first.freedom) * reach if reach else 0.0
        low, high = max(1.0, value * math.exp(-reach)), min(value * math.exp(min(reach, 50.0)), n, dim)
        scores[group] = GroupScore(
            gvendi=value,
            low=min(low, value),
            high=max(high, value),
            draws=len(values),
            n=n,
            rows=size,
            # Of other draws the ratio may be less.
            unlimited_k=min(value * first.of_unlimited_k, n),
            centered=statistics.fmean(centred_of[group]) if centred_of[group] else None,
        )
    return {group: scores[group] for group in [*sorted(sizes), *(g for g in compared if g not in sizes)]}


@dataclass(frozen=True)
class _First:
    """Of one draw: standard error of its entropy, degrees of freedom of that, and unlimited K's value over its own."""

    se: float
    freedom: float
    of_unlimited_k: float


def _first(rows: torch.Tensor) -> _First:
    """What a draw [n, K] stands for among those of its group."""
    n, dim = rows.shape
    distinct = Distinct().update(rows.numpy()).count()
    if n < dim:
        rows = own_coordinates(unit_rows(rows))
    state = VendiState(rows.shape[1]).update(rows)
    interval = jackknife(state, rows, LEVEL)
    of = of_spectrum(state.spectrum(), state.entropy(), n, dim, distinct=distinct)
    return _First(interval.se, interval.freedom, of.value / of.plain)


def _rows_of_groups(run: RunDirectory, engine: Engine | None) -> dict[str, np.ndarray]:
    """Each group's row numbers in ascending order."""
    members: dict[str, list[np.ndarray]] = {}
    for found in over_run(engine, run, ["group", "row"], _members):
        for name, rows in found.items():
            members.setdefault(name, []).append(rows)
        if len(members) > MAX_GROUPS:
            raise GvendiError(
                f"--by has more than {MAX_GROUPS} different values; choose a field with fewer, such as a source"
            )
    return {group: np.sort(np.concatenate(numbers)) for group, numbers in members.items()}


def _members(parts: Iterator[Part]) -> dict[str, np.ndarray]:
    """Each group's row numbers in some parts; at the first with too many groups they end, an error in any case."""
    members: dict[str, list[np.ndarray]] = {}
    for part in parts:
        names, codes = np.unique(np.array(part.groups, dtype=object), return_inverse=True)
        for code, name in enumerate(names):
            members.setdefault(name, []).append(part.rows[codes == code])
        if len(members) > MAX_GROUPS:
            break
    return {group: np.concatenate(numbers) for group, numbers in members.items()}


def band(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile: how much a draw matters."""
    low, high = np.percentile(values, (20, 80)).tolist()
    return low, high


def draws(rows: np.ndarray, n: int, key: str) -> Iterator[np.ndarray]:
    """n of the numbers `rows` in ascending order, once for each draw: 20 of them, 5 where n is above 256.

    Where there are exactly n, all of them, once. A draw depends on `key` and the number of rows alone.
    """
    if len(rows) == n:
        yield rows
        return
    words = stream(key)
    for _ in range(DRAWS if n <= MAX_GROUP else LARGE_DRAWS):
        yield rows[subset(words, len(rows), n)]


def _batches(
    rows: dict[str, np.ndarray], n: int, seed: int, most: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """(group, draw) in order, as many at a time as together have at most `most` different rows, or one."""
    batch: list[tuple[str, np.ndarray]] = []
    others = 0
    for group, numbers in rows.items():
        own = np.empty(0, np.int64)
        for drawn in draws(numbers, n, f"{seed}|{group}"):
            own = np.union1d(own, drawn)
            if batch and others + len(own) > most:
                yield batch
                batch, others, own = [], 0, drawn
            batch.append((group, drawn))
        others += len(own)
    yield batch


def _score(
    run: RunDirectory,
    batch: list[tuple[str, np.ndarray]],
    dim: int,
    mean: torch.Tensor | None,
    engine: Engine | None,
) -> tuple[list[float], list[float | None], Iterator[torch.Tensor]]:
    """G-Vendi of each draw of a batch, its centred value, and its rows; sketches are read in one pass over the run."""
    drawings = [drawn for _, drawn in batch]
    wanted, n = np.unique(np.concatenate(drawings)), len(drawings[0])
    held = np.empty((len(wanted), dim), np.float32)
    for found in over_run(engine, run, ["row", "sketch"], partial(_wanted_rows, wanted)):
        for places, rows in found:
            held[places] = rows
    sketches = torch.from_numpy(held)
    values: list[float] = []
    centred: list[float | None] = []
    step = max(1, DRAW_BYTES // (4 * n * dim)) if n <= MAX_GROUP else 1
    for first in range(0, len(drawings), step):
        places = np.searchsorted(wanted, np.concatenate(drawings[first : first + step]))
        drawn = sketches[torch.from_numpy(places)]
        counts = torch.full((len(drawn) // n,), n)
        values += [value for value in _values(drawn, counts) if value is not None]
        if mean is None:
            centred += [None] * len(counts)
        else:
            rows, some = centre_rows(unit_rows(drawn), mean)
            centred += _values(rows[some].float(), some.reshape(-1, n).sum(dim=1))
    return values, centred, (sketches[torch.from_numpy(np.searchsorted(wanted, drawn))] for drawn in drawings)


def _wanted_rows(wanted: np.ndarray, parts: Iterator[Part]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places among the wanted rows, their sketches) of each part; wanted is ascending."""
    found = []
    for part in parts:
        at = np.minimum(np.searchsorted(wanted, part.rows), len(wanted) - 1)
        here = wanted[at] == part.rows
        found.append((at[here], part.sketches[here]))
    return found


def _values(rows: torch.Tensor, counts: torch.Tensor) -> list[float | None]:
    """G-Vendi of consecutive groups of so many rows each, None of a group without any."""
    values: list[float | None] = [None] * len(counts)
    some = [i for i, count in enumerate(counts.tolist()) if count]
    if counts.max() > MAX_GROUP:
        (group,) = some
        values[group] = gvendi(rows)
    elif some:
        ends = torch.nn.functional.pad(counts[some].cumsum(0), (1, 0))
        for group, value in zip(some, ops.entropy(rows, ends).exp().tolist(), strict=True):
            values[group] = value
    return values
