"""Greedy selection: each pick is the candidate with the largest gain, ties by id.

Candidates keep the gain they had when they were last evaluated, an upper bound by submodularity; only those whose
bound reaches the best current gain are evaluated again (Minoux 1978), in blocks, from the highest bound down. So
the picks are those of plain greedy. A pool that does not fit into the memory budget is read in passes: each
renews all bounds and keeps the rows with the highest, which are picked from until a row outside may be better. Gains
are compared in float32, and close ones again in float64; the integral behind vendi's gains errs by up to 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.draws import random_words
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.passes import in_order
from gvendi_fast.data.pool import POOL_BLOCK, ChunkPool
from gvendi_fast.selection.objectives import Level, make_objective
from gvendi_fast.selection.problem import Problem

# Gains closer than this count as equal: float64 sums in another order differ by less.
TIE = 1e-9
FIRST_BLOCK = 256
# Bytes beside the rows for each row of the pool: its id's rank, bound, flags and place.
POOL_ROW_BYTES = 64


@dataclass(frozen=True, eq=False)
class Picks:
    """Rows of the pool int64 [size] in the order of picking, and the rise of the objective float64 [size]."""

    numbers: np.ndarray
    gains: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)


class Greedy:
    """One greedy selection in progress."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.objective, self.level = problem, make_objective(problem), Level(problem)
        n = len(problem.numbers)
        self.passes = self.evaluated = 0
        self.capacity = _capacity(problem, self.objective)
        # Upper bounds of the gains, and after how many picks each was exact.
        self._bound, self._stamp = torch.full((n,), torch.inf), torch.full((n,), -1)
        self._open, self._slot = torch.ones(n, dtype=torch.bool), torch.full((n,), -1)
        self._rank = torch.from_numpy(problem.rank[problem.numbers])
        self._labels = None if problem.labels is None else torch.from_numpy(problem.labels[problem.numbers])
        self._left = None if problem.limits is None else problem.limits.copy()
        if self._left is not None:
            self._open = torch.from_numpy(self._left > 0)[self._labels]

    def run(self, sample: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Picks:
        """Pick `size` rows; `sample` narrows the open candidates (bool [n] -> bool [n]) before each pick."""
        size, numbers = self.problem.size, self.problem.numbers
        chosen, gains = np.empty(size, np.int64), np.empty(size)
        for i in range(size):
            place, gain = self._next(self._open if sample is None else sample(self._open))
            chosen[i], row = numbers[place], self._row(place)
            gains[i] = self.level.rise(gain, chosen[i])
            if i + 1 < size:
                self.objective.add(row)
            self._open[place] = False
            if self._labels is not None:
                label = int(self._labels[place])
                self._left[label] -= 1
                if self._left[label] == 0:
                    self._open &= self._labels != label
            self.problem.progress.advance(1, 0, 0)
        share = self.evaluated / (size * len(numbers))
        return Picks(chosen, gains, {"passes": self.passes, "evaluated_share": share})

    def _next(self, allowed: torch.Tensor) -> tuple[int, float]:
        """Place among the candidates of the next pick, and its gain."""
        constant = self.objective.constant()
        if constant is not None:
            places = torch.nonzero(allowed)[:, 0]
            gains = torch.full((len(places),), constant, dtype=torch.float64)
            return self._first(places, self._keys_of(gains, places)), constant
        if self.passes == 0:
            self._read()
        while True:
            best = self._best_held(allowed)
            outside = allowed & (self._slot < 0)
            highest = float(self._keys(outside).max()) if bool(outside.any()) else -math.inf
            fresh = self._read_at == self.objective.picks
            if best is not None and (fresh or highest <= best[2]):
                return best[0], best[1]
            self._read()

    def _best_held(self, allowed: torch.Tensor) -> tuple[int, float, float] | None:
        """Place, gain and key of the best allowed candidate in memory; no rival's bound is above it."""
        picks, block = self.objective.picks, FIRST_BLOCK
        allowed = allowed & (self._slot >= 0)
        if not bool(allowed.any()):
            return None
        margin = self.objective.margin * self.level.scale()
        keys = self._keys(allowed)
        while True:
            fresh = self._stamp == picks
            best = float(torch.where(fresh, keys, -torch.inf).max())
            rivals = torch.nonzero((keys >= best - margin) & (keys > -torch.inf))[:, 0]
            stale = rivals[~fresh[rivals]]
            if len(stale) == 0:
                break
            if len(stale) > block:
                stale = stale[torch.topk(keys[stale], block).indices].sort().values
            # From the highest bound down, in ever larger blocks: at most twice the evaluations needed.
            block *= 2
            self._bound[stale] = self._evaluate(stale)
            self._stamp[stale] = picks
            keys[stale] = self._keys_of(self._bound[stale], stale)
        slots = self._slot[rivals].split(POOL_BLOCK)
        gains = torch.cat([self.objective.exact(self._rows[chunk]) for chunk in slots])
        exact = self._keys_of(gains, rivals)
        place = self._first(rivals, exact)
        here = int(torch.nonzero(rivals == place)[0, 0])
        return place, float(gains[here]), float(exact[here])

    def _evaluate(self, places: torch.Tensor) -> torch.Tensor:
        self.evaluated += len(places)
        slots, order = self._slot[places].sort()
        out = torch.empty(len(places))
        out[order] = self.objective.update(slots)
        return out

    def _keys(self, allowed: torch.Tensor) -> torch.Tensor:
        return self.level.keys(self._bound, self.problem.numbers).masked_fill(~allowed, -torch.inf)

    def _keys_of(self, gains: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.level.keys(gains, self.problem.numbers[places.numpy()])

    def _first(self, places: torch.Tensor, keys: torch.Tensor) -> int:
        """Of the places whose key ties with the highest, the one whose id comes first."""
        tied = places[keys >= keys.max() - TIE * self.level.scale()]
        return int(tied[self._rank[tied].argmin()])

    def _row(self, place: int) -> torch.Tensor:
        slot = int(self._slot[place])
        if slot < 0:
            return self.problem.pool.take(self.problem.numbers[[place]])[0]
        # A view would keep all rows in memory during the next pass.
        return self._rows[slot].clone()

    def _read(self) -> None:
        """One pass over the pool: keeps all candidates in memory, or those with the highest gains at present."""
        self.passes += 1
        self._read_at = self.objective.picks
        n = len(self._open)
        # Frees the rows of the last pass, or both would be in memory.
        self._rows = None
        self.objective.drop()
        self._rows = torch.empty(min(n, self.capacity), self.problem.pool.dim)
        if n <= self.capacity:
            for places, rows in self._blocks():
                self._rows[places[0] : places[-1] + 1] = rows
            self._slot = torch.arange(n)
        else:
            self._slot.fill_(-1)
            self._keep_best()
        self.objective.hold(self._rows)

    def _keep_best(self) -> None:
        self.objective.settle()
        held, keys = torch.empty(0, dtype=torch.int64), torch.empty(0)
        for places, rows in self._blocks():
            gains = self.objective.scan(rows)
            self.evaluated += len(rows)
            self._bound[places], self._stamp[places] = gains, self.objective.picks
            new = self._keys_of(gains, places).masked_fill(~self._open[places], -torch.inf)
            room = self.capacity - len(held)
            if room:
                self._rows[len(held) : len(held) + room][: len(rows)] = rows[:room]
                held, keys = torch.cat([held, places[:room]]), torch.cat([keys, new[:room]])
            rest, rest_keys, rest_places = rows[room:], new[room:], places[room:]
            if len(rest) == 0:
                continue
            top = torch.topk(torch.cat([keys, rest_keys]), self.capacity).indices
            free = torch.ones(self.capacity, dtype=torch.bool)
            free[top[top < self.capacity]] = False
            free, come = torch.nonzero(free)[:, 0], top[top >= self.capacity] - self.capacity
            self._rows[free], held[free], keys[free] = rest[come], rest_places[come], rest_keys[come]
        self._slot[held] = torch.arange(len(held))

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(places int64 [m], rows [m, K]) of the candidates, block by block."""
        for first, block in self.problem.pool.blocks():
            numbers = self.problem.numbers
            begin, end = np.searchsorted(numbers, [first, first + len(block)])
            for start in range(begin, end, POOL_BLOCK):
                stop = min(start + POOL_BLOCK, end)
                here = torch.from_numpy(numbers[start:stop]) - first
                yield torch.arange(start, stop), block[here]


def lazy(problem: Problem) -> Picks:
    """Lazy greedy; see the top of the file."""
    problem.progress.start(problem.size, 0)
    return Greedy(problem).run()


def stochastic(problem: Problem, epsilon: float = 0.1) -> Picks:
    """Before each pick draw (n / size) ln(1 / epsilon) candidates at random and take the best of them.

    Within 1 - 1/e - epsilon of the optimum in expectation, for a monotone submodular function (Mirzasoleiman et
    al. 2015, "Lazier Than Lazy Greedy"); drawn with replacement, for which their argument holds as well.
    """
    greedy, n = Greedy(problem), len(problem.numbers)
    if greedy.capacity < n:
        raise GvendiError(
            f"method 'stochastic' needs its {n:,} candidates in memory, and the budget holds only "
            f"{greedy.capacity:,} of them; raise memory, or use method 'two-round'"
        )
    problem.progress.start(problem.size, 0)
    by_rank = torch.from_numpy(np.argsort(problem.rank[problem.numbers]))
    count, drawn = math.ceil(n / problem.size * math.log(1 / epsilon)), 0

    def sample(allowed: torch.Tensor) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        candidates = by_rank[allowed[by_rank]]
        words = random_words(problem.seed, 1000 + drawn, count)
        out = torch.zeros_like(allowed)
        out[candidates[torch.from_numpy((words % np.uint64(len(candidates))).astype(np.int64))]] = True
        return out

    return greedy.run(sample)


def two_round(problem: Problem) -> Picks:
    """Greedy in random subsets of the pool that fit into memory, then greedy among what they picked.

    GreeDi (Mirzasoleiman et al. 2013). With random subsets, and the better of the last round and of the best subset,
    as here, it reaches (1 - 1/e) / 2 of the optimum in expectation for a monotone submodular function (Barbosa et al.
    2015, Mirrokni and Zadimoghaddam 2015). A subset is drawn by ids and seed alone; each costs a pass over the pool,
    and the workers of an engine do one each at a time, with the memory that the problem names.
    """
    n, capacity = len(problem.numbers), _capacity(problem, make_objective(problem))
    parts = max(2, math.ceil(n / capacity))
    part_of = problem.words(2)[problem.numbers] % np.uint64(parts)
    asked = [problem.part(problem.numbers[part_of == part]) for part in range(parts)]
    problem.progress.start(sum(part.size for part in asked) + problem.size, 0)
    rounds = _rounds(problem, [part for part in asked if part.size])
    passes = sum(picks.details["passes"] for picks in rounds)
    union = np.sort(np.concatenate([picks.numbers for picks in rounds]))
    final = Greedy(replace(problem, numbers=union)).run()
    whole = [picks for picks in rounds if len(picks.numbers) == problem.size]
    # F is the sum of its rises, so their sums compare the two results.
    best = max([final, *whole], key=lambda picks: picks.gains.sum())
    return Picks(best.numbers, best.gains, {"passes": passes + final.details["passes"], "parts": parts})


def _rounds(problem: Problem, parts: list[Problem]) -> list[Picks]:
    """What greedy picks in each of the parts of a problem."""
    engine, reader = problem.engine, problem.pool.reader()
    if engine is None or not engine.is_remote or reader.is_here:
        return [Greedy(part).run() for part in parts]
    sent = replace(problem, pool=ChunkPool(problem.pool), progress=Silent(), engine=None)
    found = []
    for part, picks in zip(
        parts, in_order(engine.map(partial(_Round, sent), [part.numbers for part in parts])), strict=True
    ):
        problem.progress.advance(part.size, 0, 0)
        found.append(picks)
    return found


class _Round:
    """Greedy among some rows of a problem, as a task."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, numbers: np.ndarray) -> Picks:
        return Greedy(self._problem.part(numbers)).run()


def _capacity(problem: Problem, objective: Any) -> int:
    """How many rows the memory budget holds."""
    fixed = objective.fixed_bytes + POOL_ROW_BYTES * len(problem.pool)
    rows = (problem.memory - fixed) // objective.row_bytes
    wanted = min(len(problem.numbers), 1024)
    if rows < wanted:
        least = fixed + wanted * objective.row_bytes
        raise GvendiError(
            f"memory is {problem.memory:,} bytes; this selection needs at least {least:,}, of which {fixed:,} are "
            "working memory beside the rows: raise memory"
        )
    return int(rows)
