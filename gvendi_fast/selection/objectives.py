"""What a selection maximises: the gain of every candidate, kept current while rows are picked.

    vendi     F(S) = -tr(A ln A)             A = sum of z z^T over the chosen rows: entropy at a fixed number of rows
    logdet    F(S) = ln det(I + A / eps)
    facility  F(S) = mean_i max(0, max_{j in S} cos(z_i, z_j)) over represented rows i
    quality   F(S) = ln(mean quality of S) + H_1(S), the logarithm of mean quality x G-Vendi
The first three are submodular: a gain of some picks ago is an upper bound of the present one. The fourth is not, but
the only term of it that changes with the picks is vendi's gain, so that upper bounds hold as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from gvendi_fast.data.pool import POOL_BLOCK
from gvendi_fast.selection.resolvent import Resolvent, entropy_gain, entropy_nodes, resolvent_bytes

if TYPE_CHECKING:
    from gvendi_fast.selection.problem import Problem

OBJECTIVES = ("vendi", "logdet", "facility", "quality")
CHUNK = 2048
# Rows in float64 with their products at once.
EXACT_CHUNK = 256


class Objective(Protocol):
    """Gains of candidates held in memory."""

    # Gains of `update` differ from those of `exact` by less than this.
    margin: float
    # Bytes that it keeps for each held row, and in addition.
    row_bytes: int
    fixed_bytes: int

    @property
    def picks(self) -> int:
        """How many rows were added."""

    def constant(self) -> float | None:
        """The gain that all rows have at present, or None if they differ."""

    def hold(self, rows: torch.Tensor) -> None:
        """Take rows float32 [M, K] as the candidates that `update` knows by number; keeps the tensor."""

    def drop(self) -> None:
        """Forget the held rows."""

    def update(self, where: torch.Tensor) -> torch.Tensor:
        """Gains float32 [m] of held rows int64 [m], ascending, at the present set."""

    def scan(self, rows: torch.Tensor) -> torch.Tensor:
        """Gains float32 [m] of rows float32 [m, K] that are not held, at the present set."""

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        """Gains float64 [m] of rows [m, K], computed in float64."""

    def add(self, row: torch.Tensor) -> None:
        """Choose a row [K]."""

    def settle(self) -> None:
        """Make `scan` as fast as it can be, before many rows are scanned."""


class Spectral:
    """vendi and quality (eps None) and logdet, whose gain ln(1 + x^T (A + eps)^-1 x) needs one node only."""

    def __init__(self, problem: Problem, eps: float | None = None) -> None:
        matrix = problem.given.matrix
        if eps is None:
            t, self._weight = entropy_nodes(matrix, problem.size)
        else:
            t, self._weight = torch.tensor([eps], dtype=torch.float64), None
        self._t, self._eps = t, eps
        self.resolvent = Resolvent(matrix, self._t)
        # Twenty standard deviations of the rounding measured; logdet's g begins at 1 / eps and keeps that rounding.
        self.margin = 2e-5 if eps is None else 2e-6 * max(1.0, 1 / eps)
        self.row_bytes = 4 * problem.pool.dim + 8 * (len(t) + 2)
        self.fixed_bytes = resolvent_bytes(problem.pool.dim, len(t)) + reading_bytes(problem.pool.dim)

    @property
    def picks(self) -> int:
        return self.resolvent.picks

    def constant(self) -> float | None:
        if not self.resolvent.empty:
            return None
        return 0.0 if self._eps is None else math.log1p(1 / self._eps)

    def hold(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._values = torch.empty(len(rows), len(self._t) + 1, dtype=torch.float64)
        self._stamps = torch.full((len(rows),), -1)
        if self.resolvent.empty:
            self._values[:] = self.resolvent.start()
            self._stamps.zero_()

    def drop(self) -> None:
        self._rows = self._values = self._stamps = None

    def update(self, where: torch.Tensor) -> torch.Tensor:
        resolvent, gains = self.resolvent, torch.empty(len(where))
        # The gain of a candidate that missed more picks than this is cheaper to compute anew.
        oldest = max(resolvent.oldest, resolvent.base - resolvent.dim // resolvent.width)
        stamps = self._stamps[where]
        anew = torch.nonzero(stamps < oldest)[:, 0]
        for chunk in anew.split(CHUNK):
            self._values[where[chunk]] = resolvent.at_base(_pick(self._rows, where[chunk]))
        stamps[anew] = resolvent.base
        # Ascending stamps let one product serve all rows that missed the same pick.
        order = torch.argsort(stamps, stable=True)
        for chunk in order.split(CHUNK):
            here = where[chunk]
            values = self._values[here]
            resolvent.advance(_pick(self._rows, here), values, stamps[chunk])
            self._values[here] = values
            gains[chunk] = self._gain(values.float()).float()
        self._stamps[where] = resolvent.picks
        return gains

    def scan(self, rows: torch.Tensor) -> torch.Tensor:
        gains = []
        for chunk in rows.split(CHUNK):
            values = self.resolvent.at_base(chunk)
            self.resolvent.advance(chunk, values, torch.full((len(chunk),), self.resolvent.base))
            gains.append(self._gain(values.float()))
        return torch.cat(gains)

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._gain(self.resolvent.exact(chunk)) for chunk in rows.split(EXACT_CHUNK)])

    def add(self, row: torch.Tensor) -> None:
        self.resolvent.add(row)

    def settle(self) -> None:
        if self.resolvent.picks > self.resolvent.base:
            self.resolvent.rebase()

    def _gain(self, values: torch.Tensor) -> torch.Tensor:
        if self._weight is None:
            return values[:, 0].clamp_min(0).log1p()
        return entropy_gain(values, self._t.to(values.dtype), self._weight.to(values.dtype))


class Facility:
    """How well the chosen rows represent the rows [R, K]."""

    def __init__(self, problem: Problem) -> None:
        targets = problem.targets
        self._targets, self._exact_targets = targets, targets.double()
        self._best = problem.covered.double()
        self.picks, self.margin = 0, 2e-6
        self.row_bytes = 4 * problem.pool.dim
        self._chunk = max(1, min(CHUNK, (32 << 20) // (4 * len(targets))))
        self.fixed_bytes = 12 * targets.numel() + reading_bytes(problem.pool.dim) + (64 << 20)

    def constant(self) -> float | None:
        return None

    def hold(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def drop(self) -> None:
        self._rows = None

    def update(self, where: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.scan(_pick(self._rows, chunk)) for chunk in where.split(self._chunk)])

    def scan(self, rows: torch.Tensor) -> torch.Tensor:
        best = self._best.float()
        return torch.cat(
            [(chunk @ self._targets.T).sub_(best).clamp_min_(0).mean(1) for chunk in rows.split(self._chunk)]
        )

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                (chunk.double() @ self._exact_targets.T).sub_(self._best).clamp_min_(0).mean(1)
                for chunk in rows.split(self._chunk)
            ]
        )

    def add(self, row: torch.Tensor) -> None:
        self._best = torch.maximum(self._best, self._exact_targets @ row.double())
        self.picks += 1

    def settle(self) -> None:
        """Nothing to do: a scan asks for one product whatever was picked."""


class Level:
    """From a row's gain to the key that greedy ranks by, and to the reported rise of the objective.

    quality: F = ln(mean q) + ln n + E / n with E = -tr(A ln A) of the n rows, given ones included; the mean is of
    the chosen rows alone. A row's key is the part of F that depends on it: ln(sum q + q_x) + gain / (n + 1).
    """

    def __init__(self, problem: Problem) -> None:
        self._quality = problem.quality if problem.objective == "quality" else None
        self._n, self._chosen, self._total, self._entropic, self._value = problem.given.n, 0, 0.0, 0.0, 0.0
        if self._quality is not None and self._n:
            lam = torch.linalg.eigvalsh(problem.given.matrix).clamp_min(0)
            self._entropic = -float(torch.special.xlogy(lam, lam).sum())

    def scale(self) -> float:
        """How much the key changes with the gain: their ratio."""
        return 1.0 if self._quality is None else 1 / (self._n + 1)

    def keys(self, gains: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """What greedy ranks by, [m], of the gains [m] of rows of the pool int64 [m]."""
        if self._quality is None:
            return gains
        return gains * self.scale() + torch.from_numpy(np.log(self._total + self._quality[numbers]))

    def rise(self, gain: float, number: int) -> float:
        """The row is chosen: by how much the objective rises (for quality the first rise is F itself)."""
        if self._quality is None:
            return gain
        self._total, self._entropic = self._total + self._quality[number], self._entropic + gain
        self._n, self._chosen = self._n + 1, self._chosen + 1
        before = self._value
        self._value = math.log(self._total / self._chosen) + math.log(self._n) + self._entropic / self._n
        return self._value - before


def reading_bytes(dim: int) -> int:
    """Memory for reading a block of a pool and scaling it to length 1, and for a chunk of products."""
    return 40 * POOL_BLOCK * dim + 16 * CHUNK * dim


def make_objective(problem: Problem) -> Objective:
    """The objective that the problem names, with the given rows in it."""
    if problem.objective == "facility":
        return Facility(problem)
    return Spectral(problem, problem.eps if problem.objective == "logdet" else None)


def _pick(rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """rows[where], without a copy where they are consecutive."""
    if len(where) and int(where[-1] - where[0]) == len(where) - 1 and bool((where.diff() == 1).all()):
        return rows[int(where[0]) : int(where[-1]) + 1]
    return rows[where]
