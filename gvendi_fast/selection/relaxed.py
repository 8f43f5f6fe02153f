"""Relaxed selection: weights on a pool's rows that make its entropy largest, with a certificate, then whole rows.

    maximise f(w) = H_1(Sigma_w) [+ ln <w, quality>],   Sigma_w = (A_0 + size * sum_i w_i z_i z_i^T) / (n_0 + size)
    over sum w = 1, 0 <= w_i <= 1/size (and limits on groups); A_0, n_0: rows that are chosen already
f is concave; its gradient is, up to a constant, c_i = s * surprisal_i [+ quality_i / <w, quality>] with
s = size / (n_0 + size) and surprisal_i = -z_i^T (ln Sigma_w) z_i. Exponentiated gradient: w_i ~ w_i exp(eta c_i) with
the projection of `capped_simplex`. H_1 is 1-smooth relative to the entropy of w, since D(Sigma_v || Sigma_w) <=
KL(v || w), so eta = 1/s always rises (the Blahut-Arimoto iteration) where no quality counts, and a larger eta is kept
while that inequality holds.

    gap = max over feasible v of <c, v - w>,   f* <= f(w) + gap
Few rows carry weight, so the iteration runs on an active set in memory; a pass over the whole pool computes the gap
and brings in the rows that the active set misses, with a step towards the best v (Frank and Wolfe 1956).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from gvendi_fast.base.draws import random_words
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.shown import shown
from gvendi_fast.data.passes import over_pool, taken
from gvendi_fast.data.pool import Pool
from gvendi_fast.data.strings import rank_of
from gvendi_fast.kernels.spectrum import entropy_and_surprise
from gvendi_fast.selection.capped_simplex import Limits, best_vertex, check_feasible, project
from gvendi_fast.selection.problem import MAX_PASSES, checked_quality
from gvendi_fast.vendi.state import VendiState

# Rows of one product: it stays in the cache, and fp32 sums are as long as this before float64 takes them.
_BLOCK = 4096
# The active set starts with this many rows for each row to choose.
_ACTIVE_SHARE, _ACTIVE_LEAST = 4, 8192
_INNER_STEPS = 60
# Below this eigenvalue (of trace 1) a direction counts as empty: rows outside the range have no finite gradient.
_EMPTY = 1e-10
# A row without weight enters with this share of a chosen row's, where it is not among the best.
_ENTRY = 1e-4
# Shares of all weight that the best rows enter with, whichever raises the objective most.
_TOWARD = (0.03, 0.1, 0.3)
# Gaps on the active rows are closed to this share of the last gap on the pool: more would fit rows that are to go.
_AIM, _FIRST_GAP = 0.1, 0.2


@dataclass(frozen=True)
class Relaxation:
    """The result of `relaxed_weights`.

    weights: float64 [N], sum 1.
    entropy: H_1 of the weighted rows, in nats.
    objective: entropy, plus the logarithm of the mean quality if there is one.
    gap: `bound` minus objective; `bound` limits every feasible weighting, so every choice of `size` rows.
    passes: how often the whole pool was read.
    steps: gradient steps on the active set.
    """

    weights: np.ndarray
    entropy: float
    objective: float
    gap: float
    passes: int
    steps: int

    @property
    def bound(self) -> float:
        """No feasible weighting has a larger objective."""
        return self.objective + self.gap


@dataclass
class _Problem:
    """What all iterations have in common; `order` [N] breaks ties."""

    pool: Pool
    size: int
    quality: np.ndarray | None
    include: VendiState | None
    limits: Limits | None
    order: np.ndarray
    engine: Engine | None

    @property
    def share(self) -> float:
        return self.size / (self.size + (self.include.n if self.include else 0))

    @property
    def least_step(self) -> float:
        """A step size that always raises the objective, up to rounding."""
        return 1 / self.share if self.quality is None else 1e-6

    def bonus(
        self, weights: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[float, np.ndarray | float]:
        """ln of the rows' mean quality under weights that sum to 1, and its gradient."""
        if self.quality is None:
            return 0.0, 0.0
        quality = self.quality[rows]
        mean = float(weights @ quality)
        return math.log(mean), quality / mean

    def sigma(self, moment: torch.Tensor) -> torch.Tensor:
        """Sigma_w from sum_i w_i z_i z_i^T."""
        if self.include is None or self.include.n == 0:
            return moment
        fixed = self.include.matrix.cpu() / self.include.matrix.trace().cpu()
        return (1 - self.share) * fixed + self.share * moment


class _Point:
    """Sigma_w diagonalised: its entropy and the matrix of the gradient."""

    def __init__(self, sigma: torch.Tensor) -> None:
        eigenvalues, self.entropy, surprise = entropy_and_surprise(sigma / sigma.trace(), _EMPTY)
        self.lowest, self.surprise = float(eigenvalues[0]), surprise.float()


def _surprisal(rows: torch.Tensor, surprise: torch.Tensor) -> np.ndarray:
    """-z^T (ln Sigma) z of rows float32 [n, K]: float32 [n]."""
    return (rows @ surprise).mul_(rows).sum(dim=1).numpy()


class _Surprisals:
    """`_surprisal` of a chunk's rows, as the sums of a pass."""

    def __init__(self, surprise: torch.Tensor) -> None:
        self._surprise, self._found = surprise, [np.empty(0, np.float32)]

    def add(self, first: int, rows: torch.Tensor) -> None:
        for strip in rows.split(_BLOCK):
            self._found.append(_surprisal(strip, self._surprise))

    def result(self) -> np.ndarray:
        return np.concatenate(self._found)


class _Moments:
    """`_moment` of a chunk's rows, as the sums of a pass; their weights go along."""

    def __init__(self, dim: int) -> None:
        self._total = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, first: int, rows: torch.Tensor, weights: np.ndarray) -> None:
        root = torch.from_numpy(np.sqrt(weights)).float()
        for strip, roots in zip(rows.split(_BLOCK), root.split(_BLOCK), strict=True):
            _add_moment(self._total, strip, roots)

    def result(self) -> torch.Tensor:
        return self._total


def relaxed_weights(
    pool: Pool,
    size: int,
    *,
    quality: np.ndarray | None = None,
    include: VendiState | None = None,
    limits: Limits | None = None,
    tolerance: float = 5e-3,
    max_passes: int = MAX_PASSES,
    memory: int = 2 << 30,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    order: np.ndarray | None = None,
    engine: Engine | None = None,
) -> Relaxation:
    """The best weights for choosing `size` rows, to a gap of `tolerance` nats or `max_passes` passes over the pool.

    quality: float [N] above 0; the logarithm of its weighted mean is added to the entropy.
    include: rows that are chosen already.
    limits: on groups.
    memory: bytes for the active set; with too few, every step reads the whole pool.
    seed: of the first active set.
    order: `rank_of` the pool's ids, if it is known.
    engine: which processes read a run directory; None is this one. The weights are the same to the bit.
    Raises GvendiError where no `size` rows can be chosen.
    """
    check_feasible(size, len(pool), limits)
    quality = None if quality is None else checked_quality(quality, pool)
    # Neither the start nor a tie depends on the order of rows: ids decide.
    order = rank_of(pool.ids) if order is None else order
    problem = _Problem(pool, size, quality, include, limits, order, engine)
    active = _first_active(problem, memory, seed)
    fitting = _fitting(problem, memory)
    if progress and len(active) > fitting:
        progress(
            f"{fitting:,} rows fit in memory and {2 * size:,} are wanted, two for each one to choose: "
            "every step reads the whole pool, and more memory would spare that"
        )
    log_u = project(np.zeros(len(active)), size, limits and limits.at(active))
    best: Relaxation | None = None
    steps, eta = 0, 1 / problem.share
    entering: np.ndarray | None = None
    for number in range(1, max_passes + 1):
        rows = _Rows(problem, active, memory)
        if entering is not None:
            log_u = _toward(problem, rows, log_u, entering)
        ahead = 0.0 if len(active) == len(pool) else _FIRST_GAP if best is None else best.gap
        aim = max(tolerance / 2, _AIM * ahead)
        log_u, point, more, eta = _ascend(problem, rows, log_u, eta, aim)
        steps += more
        # Or the next active rows would be in memory beside them.
        del rows
        weights = np.zeros(len(pool))
        weights[active] = np.exp(log_u) / size
        objective = point.entropy + problem.bonus(weights)[0]
        scores = _pass(problem, weights, point)
        bound = min(scores.bound, math.inf if best is None else best.bound)
        here = Relaxation(weights, point.entropy, objective, max(bound - objective, 0.0), number, steps)
        best = here if best is None or objective > best.objective else best
        best = Relaxation(
            best.weights, best.entropy, best.objective, max(bound - best.objective, 0.0), number, steps
        )
        if progress:
            # Weights may be on more rows than will be chosen, and have more entropy than whole rows can.
            progress(
                f"pass {number}: weights of entropy {shown(best.entropy, '.4f')} nats, "
                f"at most {best.gap:.4f} below the best weights"
            )
        if best.gap <= tolerance:
            break
        active, log_u, entering = _next_active(problem, weights, scores.values, memory)
    return best


@dataclass(frozen=True)
class _Scores:
    values: np.ndarray
    bound: float


def _pass(problem: _Problem, weights: np.ndarray, point: _Point) -> _Scores:
    """c of every row of the pool, and the bound that follows.

    Where Sigma_w has empty directions the gradient is that of w mixed with a little of the whole pool, whose range
    holds every row; the bound is taken at that point and holds as well.
    """
    if point.lowest < _EMPTY:
        uniform = project(np.zeros(len(weights)), problem.size, problem.limits)
        weights = (1 - 1e-4) * weights + 1e-4 * np.exp(uniform) / problem.size
        point = _Point(problem.sigma(_pool_moment(problem, weights)))
    values = _pool_surprisals(problem, point)
    bonus, slope = problem.bonus(weights)
    values = problem.share * values + slope
    chosen = best_vertex(values, problem.order, problem.size, problem.limits)
    objective = point.entropy + bonus
    gap = float(values[chosen].mean() - values @ weights)
    return _Scores(values, objective + gap)


def _pool_moment(problem: _Problem, weights: np.ndarray) -> torch.Tensor:
    """sum_i w_i z_i z_i^T over the pool, in a pass: float64 [K, K]."""
    begin = partial(_Moments, problem.pool.dim)
    return functools.reduce(torch.Tensor.add_, over_pool(problem.engine, problem.pool, begin, [weights]))


def _pool_surprisals(problem: _Problem, point: _Point) -> np.ndarray:
    """-z^T (ln Sigma) z of every row of the pool, in a pass: float64 [N], of float32 products (errors about 1e-6)."""
    values, first = np.empty(len(problem.pool)), 0
    for found in over_pool(problem.engine, problem.pool, partial(_Surprisals, point.surprise)):
        values[first : first + len(found)] = found
        first += len(found)
    return values


def _toward(problem: _Problem, rows: _Rows, log_u: np.ndarray, entering: np.ndarray) -> np.ndarray:
    """The weights after a step towards the best vertex, `entering`, where there is one that helps: log u."""
    size = problem.size
    weights, vertex = np.exp(log_u) / size, entering / entering.sum()
    here, there = rows.moment(weights), rows.moment(vertex)
    best, found = -math.inf, log_u
    for share in (0.0, *_TOWARD):
        mixed = (1 - share) * weights + share * vertex
        point = _Point(problem.sigma((1 - share) * here + share * there))
        value = point.entropy + problem.bonus(mixed, rows.numbers)[0]
        # The objective is concave.
        if value <= best:
            break
        best, found = value, np.minimum(np.log(mixed * size), 0.0)
    return found


def _ascend(
    problem: _Problem, rows: _Rows, log_u: np.ndarray, eta: float, tolerance: float
) -> tuple[np.ndarray, _Point, int, float]:
    """Gradient steps on the active rows until their own gap is below the tolerance."""
    limits = problem.limits and problem.limits.at(rows.numbers)
    order, size, least = problem.order[rows.numbers], problem.size, problem.least_step

    def at(log_u: np.ndarray) -> tuple[_Point, float]:
        weights = np.exp(log_u) / size
        point = _Point(problem.sigma(rows.moment(weights)))
        return point, point.entropy + problem.bonus(weights, rows.numbers)[0]

    point, value = at(log_u)
    for step in range(_INNER_STEPS):
        surprisal = rows.surprisals(point)
        weights = np.exp(log_u) / size
        scores = problem.share * surprisal + problem.bonus(weights, rows.numbers)[1]
        vertex = best_vertex(scores, order, size, limits)
        if float(scores[vertex].mean() - scores @ weights) <= tolerance:
            return log_u, point, step, eta
        while True:
            moved = project(log_u + eta * scores, size, limits)
            after, risen = at(moved)
            ahead = np.exp(moved) / size
            # Mirror ascent's own condition, which the least step always meets, up to rounding.
            held = ahead > 0
            divergence = float(ahead[held] @ (moved[held] - log_u[held]))
            promised = float(scores @ (ahead - weights)) - divergence / eta
            if risen >= value + promised - 1e-9 or eta <= least:
                break
            eta = max(eta / 2, least)
        if risen <= value:
            return log_u, point, step, eta
        log_u, point, value, eta = moved, after, risen, 1.5 * eta
    return log_u, point, _INNER_STEPS, eta


class _Rows:
    """The active rows: in memory where they fit, else the whole pool, of which each sum is a pass."""

    def __init__(self, problem: _Problem, numbers: np.ndarray, memory: int) -> None:
        self.numbers, self._problem = numbers, problem
        fits = len(numbers) <= _fitting(problem, memory)
        assert fits or len(numbers) == len(problem.pool)
        self._kept = taken(problem.engine, problem.pool, numbers) if fits else None

    def moment(self, weights: np.ndarray) -> torch.Tensor:
        """sum_i w_i z_i z_i^T: float64 [K, K]."""
        if self._kept is None:
            return _pool_moment(self._problem, weights)
        moments = _Moments(self._problem.pool.dim)
        moments.add(0, self._kept, weights)
        return moments.result()

    def surprisals(self, point: _Point) -> np.ndarray:
        """-z^T (ln Sigma) z of each row: float64, of float32 products (errors about 1e-6)."""
        if self._kept is None:
            return _pool_surprisals(self._problem, point)
        # Written in place: a list of small results between large blocks would fragment the heap.
        out = np.empty(len(self._kept))
        for first in range(0, len(out), _BLOCK):
            strip = slice(first, first + _BLOCK)
            out[strip] = _surprisal(self._kept[strip], point.surprise)
        return out


def _add_moment(total: torch.Tensor, rows: torch.Tensor, root: torch.Tensor) -> None:
    """Add sum_i root_i^2 z_i z_i^T of rows float32 [n, K]: a float32 product, added in float64."""
    if bool((root > 0).any()):
        scaled = rows * root[:, None]
        total += scaled.T @ scaled


def _fitting(problem: _Problem, memory: int) -> int:
    """How many rows are in float32 in so many bytes."""
    return memory // (4 * problem.pool.dim)


def _capacity(problem: _Problem, memory: int) -> int:
    """Size of the active set: several rows for each one to choose; the pool where memory has not two of each."""
    wanted = max(_ACTIVE_SHARE * problem.size, _ACTIVE_LEAST, 4 * problem.pool.dim)
    fitting = _fitting(problem, memory)
    if 2 * problem.size > fitting:
        return len(problem.pool)
    return min(wanted, fitting, len(problem.pool))


def _first_active(problem: _Problem, memory: int, seed: int) -> np.ndarray:
    capacity = _capacity(problem, memory)
    rank = random_words(seed, 2, len(problem.pool))[problem.order]
    # A random set may lack rows of a group that the limits need, so each group gives its share first.
    chosen = best_vertex(-rank.astype(np.float64), problem.order, problem.size, problem.limits)
    rest = np.ones(len(rank), bool)
    rest[chosen] = False
    return np.sort(np.lexsort((rank, rest))[:capacity])


def _next_active(
    problem: _Problem, weights: np.ndarray, scores: np.ndarray, memory: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the best vertex, rows that carry weight, and those of the largest scores, as many as memory holds.

    Also their log u, and which are of the best vertex.
    """
    carrying = weights * problem.size > 1e-5
    wanted = best_vertex(scores, problem.order, problem.size, problem.limits)
    capacity = _capacity(problem, memory)
    if capacity < len(weights):
        # Where those with weight and those that come do not fit together, the least weights go.
        needed = int(carrying.sum()) + problem.size
        capacity = max(capacity, min(needed, _fitting(problem, memory)))
        comes = np.zeros(len(weights), bool)
        comes[wanted] = True
        ranked = np.lexsort((problem.order, -scores, -np.where(carrying, weights, 0.0), ~comes))
        active = np.sort(ranked[:capacity])
    else:
        active = np.arange(len(weights))
    log_u = np.log(np.maximum(weights[active] * problem.size, _ENTRY))
    log_u = project(log_u, problem.size, problem.limits and problem.limits.at(active))
    return active, log_u, np.isin(active, wanted)
