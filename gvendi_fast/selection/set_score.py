"""What a set of rows scores, and what random sets of the same size score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.unit_length import unit_rows
from gvendi_fast.data.passes import over_pool, taken
from gvendi_fast.data.pool import POOL_BLOCK
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.selection.problem import Problem, raise_covered
from gvendi_fast.vendi.of_rows import own_coordinates
from gvendi_fast.vendi.state import VendiState

# Streams of random numbers from this one on belong to the random subsets.
FIRST_STREAM = 10
# Subsets of one pass, a bit each.
AT_ONCE = 64
# Tasks of a pass whose results are a K x K matrix a subset.
MOST_TASKS = 16


@dataclass(frozen=True)
class RandomBaseline:
    """Scores of `draws` random subsets of the same size, under the same quotas and given rows.

    value: mean of the objective.
    value_band: its lowest and highest value.
    gvendi: mean of G-Vendi.
    gvendi_band: its lowest and highest value.
    draws: how many subsets.
    centered: mean of centred G-Vendi; None where the selection was not centred.
    centered_band: its lowest and highest value.
    """

    value: float
    value_band: tuple[float, float]
    gvendi: float
    gvendi_band: tuple[float, float]
    draws: int
    centered: float | None = None
    centered_band: tuple[float, float] | None = None


class SubsetSums:
    """What the scores of a set depend on, of rows that come block by block: mergeable in the order of the rows.

    few: whether rows are kept as they are, as their Gram matrix is smaller than K x K.
    targets: the rows that facility location represents, if it counts.
    spec: of the rows.
    """

    def __init__(self, dim: int, few: bool, targets: torch.Tensor | None, spec: dict | None = None) -> None:
        self.rows: list[torch.Tensor] | None = [] if few else None
        self.state = None if few else VendiState(dim, spec)
        self.covered = None if targets is None else torch.zeros(len(targets))
        self._targets = targets

    def __getstate__(self) -> dict[str, Any]:
        # Targets are large, and only rows to come need them.
        return {**vars(self), "_targets": None}

    def add(self, rows: torch.Tensor) -> None:
        """Rows float32 [m, K]."""
        if self.rows is not None:
            self.rows.append(rows)
        else:
            self.state.update(rows)
        if self.covered is not None:
            raise_covered(self.covered, self._targets, rows)

    def merge(self, other: SubsetSums) -> SubsetSums:
        """Take up the rows behind; returns self."""
        if self.rows is not None:
            self.rows += other.rows
        else:
            self.state.merge(other.state)
        if self.covered is not None:
            torch.maximum(self.covered, other.covered, out=self.covered)
        return self


class Subsets:
    """The sums of several sets over a chunk: bit i of what goes along, uint64 a row, says whether it is in set i."""

    def __init__(
        self, sets: int, dim: int, few: bool, targets: torch.Tensor | None, spec: dict | None
    ) -> None:
        self._sets = [SubsetSums(dim, few, targets, spec) for _ in range(sets)]

    def add(self, first: int, rows: torch.Tensor, member: np.ndarray) -> None:
        """See `Sums`."""
        for number, one in enumerate(self._sets):
            here = np.flatnonzero(member >> np.uint64(number) & np.uint64(1))
            if len(here):
                one.add(rows[torch.from_numpy(here)])

    def result(self) -> list[SubsetSums]:
        """See `Sums`."""
        return self._sets


class GivenSums:
    """The sums of all of a chunk's rows, whose spec is known."""

    def __init__(self, dim: int, spec: dict | None, targets: torch.Tensor | None) -> None:
        self._sums = SubsetSums(dim, False, targets, spec)

    def add(self, first: int, rows: torch.Tensor) -> None:
        """See `Sums`."""
        self._sums.add(rows)

    def result(self) -> SubsetSums:
        """See `Sums`."""
        return self._sums


def _few(problem: Problem, count: int) -> bool:
    # The Gram matrix is the smaller one here.
    return problem.given.n == 0 and count < problem.pool.dim


def _scores(problem: Problem, numbers: np.ndarray, sums: SubsetSums) -> tuple[float, float]:
    """(value of the objective, G-Vendi) of the rows `numbers`, ascending, together with the given ones."""
    if sums.rows is not None:
        rows = torch.cat(sums.rows).double()
        eigenvalues = torch.linalg.eigvalsh(rows @ rows.T).clamp_min_(0)
    else:
        eigenvalues = sums.state.spectrum() * sums.state.n
    gvendi = math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), 1))
    if problem.objective == "logdet":
        return float(torch.log1p(eigenvalues / problem.eps).sum()), gvendi
    if problem.objective == "facility":
        return float(torch.maximum(sums.covered, problem.covered).mean()), gvendi
    if problem.objective == "quality":
        return float(problem.quality[numbers].mean()) * gvendi, gvendi
    return gvendi, gvendi


def score_chosen(problem: Problem, numbers: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Value, G-Vendi and each row's surprisal -z^T ln(Sigma) z in nats, float64, under the set's covariance.

    Sigma includes the given rows; without any, the mean of the surprisals is the set's entropy.
    """
    order = np.argsort(numbers)
    sums = SubsetSums(problem.pool.dim, _few(problem, len(numbers)), problem.targets)
    if sums.state is not None:
        sums.state = problem.begun()
    surprisal = np.empty(len(numbers))
    chunks = [order[start : start + POOL_BLOCK] for start in range(0, len(order), POOL_BLOCK)]
    # Read twice where they are too many to hold.
    held = None
    if 4 * problem.pool.dim * len(numbers) <= problem.memory // 4:
        held = taken(problem.engine, problem.pool, numbers)

    def rows_of(chunk: np.ndarray) -> torch.Tensor:
        if held is None:
            return taken(problem.engine, problem.pool, numbers[chunk])
        return held[torch.from_numpy(chunk)]

    for chunk in chunks:
        sums.add(rows_of(chunk))
    if sums.rows is not None:
        own = own_coordinates(unit_rows(torch.cat(sums.rows)))
        surprisal[order] = VendiState(len(own)).update(own).contributions(own).numpy()
    else:
        for chunk in chunks:
            surprisal[chunk] = sums.state.contributions(rows_of(chunk)).numpy()
    return *_scores(problem, numbers[order], sums), surprisal


def score_random(problem: Problem, draws: int) -> RandomBaseline | None:
    """Scores of random subsets; None without draws. Reads the pool once for as many draws as memory holds."""
    if draws < 1:
        return None
    each = 24 * problem.pool.dim**2 + 8 * problem.size
    at_once = max(1, min(draws, problem.memory // each, AT_ONCE))
    scores = []
    for start in range(0, draws, at_once):
        scores += _draw(problem, range(start, min(start + at_once, draws)))
    value, gvendi = np.array(scores).T
    bands = [(float(x.min()), float(x.max())) for x in (value, gvendi)]
    return RandomBaseline(float(value.mean()), bands[0], float(gvendi.mean()), bands[1], draws)


def _draw(problem: Problem, streams: range) -> list[tuple[float, float]]:
    member, sets = np.zeros(len(problem.pool), np.uint64), []
    for number, stream in enumerate(streams):
        sets.append(problem.random(FIRST_STREAM + stream))
        member[sets[-1]] |= np.uint64(1 << number)
    few = _few(problem, problem.size)
    whole = [SubsetSums(problem.pool.dim, few, problem.targets) for _ in sets]
    for sums in whole:
        if sums.state is not None:
            sums.state = problem.begun()
    begin = partial(Subsets, len(sets), problem.pool.dim, few, problem.targets, problem.given.spec)
    for chunk in over_pool(problem.engine, problem.pool, begin, [member], MOST_TASKS):
        whole = [sums.merge(more) for sums, more in zip(whole, chunk, strict=True)]
    return [_scores(problem, *of) for of in zip(sets, whole, strict=True)]
