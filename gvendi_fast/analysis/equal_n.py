"""Groups of a run directory compared at equal n: the mean G-Vendi of several draws of n rows, with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.draws import stream, subset
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.checks import MAX_GROUP
from gvendi_fast.vendi.of_rows import gvendi

MAX_GROUPS = 10_000
# A group of fewer rows would pull the n of all others down to its own.
MIN_GROUP_ROWS = 32
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
    low, high: the 20th and the 80th percentile of the draws. They say how much the choice of n rows matters, not how
        sure the score of the group is: draws share rows, the more the nearer n is to `rows`.
    draws: how many. A group of exactly n rows is drawn once, whole, and its low and high are that value.
    """

    gvendi: float | None
    low: float | None
    high: float | None
    draws: int
    n: int
    rows: int


def equal_n(sizes: Collection[int]) -> tuple[int, int]:
    """The least rows that a group needs (32, or the median where most have fewer), and the n to compare at."""
    least = min(MIN_GROUP_ROWS, statistics.median_low(sizes))
    return least, min(size for size in sizes if size >= least)


def group_scores(run: RunDirectory, seed: int = 0) -> dict[str, GroupScore]:
    """G-Vendi of every group of a run at equal n: that of the smallest group with at least 32 rows.

    Rows are drawn without replacement, 20 times (5 times where n is above 256); a draw depends on seed, group and
    the group's rows alone. Where most groups have fewer than 32 rows, the median size takes the place of 32.
    Memory: 8 bytes a row of the run, and GROUP_BYTES of sketches (or one draw, where that is more).
    """
    rows = _rows_of_groups(run)
    sizes = {group: len(numbers) for group, numbers in rows.items()}
    least, n = equal_n(sizes.values())
    compared = {group: rows[group] for group in sorted(rows) if sizes[group] >= least}
    dim = run.spec["sketch"]["dim"]
    values_of: dict[str, list[float]] = {group: [] for group in compared}
    for batch in _batches(compared, n, seed, GROUP_BYTES // (4 * dim)):
        for (group, _), value in zip(batch, _score(run, batch, dim), strict=True):
            values_of[group].append(value)
    scores = {group: GroupScore(None, None, None, 0, 0, size) for group, size in sizes.items()}
    for group, values in values_of.items():
        low, high = band(values)
        scores[group] = GroupScore(statistics.fmean(values), low, high, len(values), n, sizes[group])
    return {group: scores[group] for group in sorted(scores)}


def _rows_of_groups(run: RunDirectory) -> dict[str, np.ndarray]:
    """Each group's row numbers in ascending order."""
    members: dict[str, list[np.ndarray]] = {}
    for part in run.iterate(["group", "row"]):
        names, codes = np.unique(np.array(part.groups, dtype=object), return_inverse=True)
        for code, name in enumerate(names):
            members.setdefault(name, []).append(part.rows[codes == code])
        if len(members) > MAX_GROUPS:
            raise GvendiError(
                f"--by has more than {MAX_GROUPS} different values; choose a field with fewer, such as a source"
            )
    return {group: np.sort(np.concatenate(numbers)) for group, numbers in members.items()}


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


def _score(run: RunDirectory, batch: list[tuple[str, np.ndarray]], dim: int) -> list[float]:
    """G-Vendi of each draw of a batch, whose sketches are read in one pass over the run."""
    drawings = [drawn for _, drawn in batch]
    wanted, n = np.unique(np.concatenate(drawings)), len(drawings[0])
    held = np.empty((len(wanted), dim), np.float32)
    for part in run.iterate(["row", "sketch"]):
        at = np.minimum(np.searchsorted(wanted, part.rows), len(wanted) - 1)
        here = wanted[at] == part.rows
        held[at[here]] = part.sketches[here]
    sketches, values = torch.from_numpy(held), []
    step = max(1, DRAW_BYTES // (4 * n * dim)) if n <= MAX_GROUP else 1
    for first in range(0, len(drawings), step):
        places = np.searchsorted(wanted, np.concatenate(drawings[first : first + step]))
        drawn = sketches[torch.from_numpy(places)]
        if n <= MAX_GROUP:
            values += ops.entropy(drawn, torch.arange(0, len(drawn) + 1, n)).exp().tolist()
        else:
            values.append(gvendi(drawn))
    return values
