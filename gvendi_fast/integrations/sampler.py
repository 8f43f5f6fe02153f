"""Batches of those candidates that bring the most that is new: a batch sampler over gradient sketches.

Of c = m B candidates X [c, K], rows of length 1, a batch takes B, one after another, each time the largest gain

    logdet   ln(1 + g(x)),  g(x) = x^T (A + eps)^-1 x        A = sum of z z^T over the window and the batch so far
    vendi    -(S(A + x x^T) - S(A)),  S(A) = tr(A ln A)      as `gvendi select --objective vendi`
logdet needs one factorisation and c x c numbers of a batch, A + eps = L L^T and P = (L^-1 X^T)^T (L^-1 X^T):
    pick j of the largest P_jj,  P -> P - p_j p_j^T / (1 + P_jj)
in K^3 / 3 + c K^2 + c^2 K + B^2 c multiplications and additions, and 2 B K^2 for the window: at K = 256, B = 32 and
m = 4 some 23 million.

Coordinates are rounded to multiples of 2^-20, whose products and sums float64 holds exactly up to a window of 8192
rows. So rows can leave A again without a trace, and A is the same to the bit whatever was added before, after a
resumption and on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.base.unit_length import has_direction
from gvendi_fast.data.pool import MatrixPool, PoolLike
from gvendi_fast.integrations.batches import BatchChooser, BatchEpoch
from gvendi_fast.integrations.candidates import Candidates, Sketching
from gvendi_fast.selection.greedy import lazy
from gvendi_fast.selection.problem import Problem
from gvendi_fast.vendi.state import VendiState

OBJECTIVES = ("logdet", "vendi")
_STEP = 2.0**20
# Gains closer than this count as equal: what rounding coordinates to 2^-20 may change.
_TIE = 1e-5
MOST_WINDOW = 8192
_MEMORY = 1 << 40


class GainSampler(BatchChooser):
    """A batch sampler that takes of every m x batch_size candidates the batch_size of the largest gain.

    sketches: of all rows of the data set, in their order: a matrix [N, K] of any float dtype (a tensor, an array, a
        memory map), a `Pool`, a run directory of `gvendi sketch` or its path; or a function from row numbers to
        sketches, such as `ProxySketches`.
    batch_size: rows of a batch of one process.
    m: how many candidates are looked at for each row that is taken. 1 is random sampling: the same batches, and no
        sketch is read.
    rows: how many rows the data set has; a run directory, which lacks the rows it rejected, and a function need it.
    steps: batches of an epoch; None is all, ceil(N / batch_size). ceil(N / (m batch_size)) looks at each row once.
    window: gains are against this many rows trained on last in the epoch, at most 8192; 0: against the batch alone.
    objective: one of those above. vendi takes a diagonalisation of A a batch in place of the factorisation, and a
        product for each of 14 to 36 nodes.
    eps: of logdet.
    dim: use the first coordinates of the sketches only, which are a sketch too; time and memory fall with it.
    seed: of the order of the rows.
    rank, world: this process's number, and how many there are. Every rank computes the choice of batch_size x world
        rows and takes every world-th of it, without any communication. Leave both alone where something else shares
        out whole batches, as Trainer and accelerate do.
    drop_last: leave out the last batch of an epoch if it is smaller. Without, it is filled up from its own beginning
        to a multiple of `world`, so that all ranks have as many batches.

    An epoch. Its rows stand in line in random order. A batch looks at the first m x batch_size, and those that it does
    not take go to the end of the line. So no row comes twice in an epoch, each has been looked at before one is looked
    at again, and an epoch of all steps is a permutation of the data set whose order alone was chosen: what is alike
    comes last. The choice tells where the steps are a budget, `steps` here or max_steps of a trainer. A row whose
    sketch is zero, not finite or missing has no gain: another one takes its place, and it comes when all others have.

    An epoch's batches depend on the sketches, the arguments and the epoch's number alone, as the window begins empty:
    a trainer that resumes by skipping batches skips the right ones. `set_epoch` gives the number; an epoch that was
    run through raises it by itself. `state_dict` and `load_state_dict`, of the sampler and of its iterators (as
    torchdata's StatefulDataLoader asks for them), resume in the midst of an epoch without a choice done again; a plain
    DataLoader with workers draws batches ahead of training, which the sampler's own state counts as done.

        loader = DataLoader(data, batch_sampler=GainSampler("runs/mine", 32, rows=len(data)), collate_fn=collate)
    Raises GvendiError, with the argument's name, for arguments that cannot be used.
    """

    def __init__(
        self,
        sketches: PoolLike | Sketching,
        batch_size: int,
        m: int = 4,
        *,
        rows: int | None = None,
        steps: int | None = None,
        window: int = 1024,
        objective: str = "logdet",
        eps: float = 0.1,
        dim: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, rank, world, drop_last)
        self.m = whole(m, "m", "how many candidates there are for each row that is taken, at least 1", 1)
        self.window = whole(window, "window", f"a number of rows from 0 to {MOST_WINDOW}", 0)
        self.objective, self.eps = objective, eps
        if self.window > MOST_WINDOW:
            raise GvendiError(f"window is {window}; wanted at most {MOST_WINDOW} rows, whose sums are exact")
        if objective not in OBJECTIVES:
            raise GvendiError(f"objective is {objective!r}; wanted one of {', '.join(OBJECTIVES)}")
        if not 1e-6 <= eps < float("inf"):
            raise GvendiError(f"eps is {eps}; wanted a finite number of at least 1e-6")
        self.candidates = Candidates(sketches, rows, dim)
        self.rows = self.candidates.rows
        taken = self.batch_size * self.world
        most = self.rows // taken if self.drop_last else -(-self.rows // taken)
        if self.rows == 0:
            raise GvendiError("sketches has no rows; give one sketch for each row of the data set")
        if most == 0:
            raise GvendiError(
                f"batch_size is {batch_size} on {self.world} processes, but there are only {self.rows} rows: with "
                "drop_last an epoch has no batch; lower batch_size"
            )
        self.steps = most if steps is None else whole(steps, "steps", "the number of batches of an epoch", 1)
        if self.steps > most:
            raise GvendiError(
                f"steps is {steps}; wanted at most {most}: {self.rows} rows give that many batches of {taken}, and no "
                "row comes twice in an epoch; run several epochs"
            )

    def _begin(self, epoch: int) -> _Epoch:
        return _Epoch(self, epoch)

    def settings(self) -> dict[str, Any]:
        """What decides the choice; a state of other ones does not fit."""
        return {
            "rows": self.rows,
            "batch_size x world": self.batch_size * self.world,
            "m": self.m,
            "steps": self.steps,
            "window": self.window,
            "objective": self.objective,
            "eps": self.eps,
            "dim": self.candidates.dim,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }


class _Epoch(BatchEpoch):
    """The line of rows, and the window."""

    _sampler: GainSampler

    def __init__(self, sampler: GainSampler, epoch: int) -> None:
        super().__init__(sampler, epoch)
        # A ring: what is not taken moves from its head to its end.
        self._line = order(stream("gain sampler", sampler.seed, epoch), sampler.rows)
        self._head, self._left = 0, sampler.rows
        # Rows without a direction, which come when all others have.
        self._last: list[int] = []
        self._window: torch.Tensor | None = None
        self._moment: torch.Tensor | None = None

    def _batch(self) -> list[int]:
        sampler = self._sampler
        want = min(sampler.batch_size * sampler.world, self._left + len(self._last))
        return self._pop(want).tolist() if sampler.m == 1 else self._choose(want)

    def _choose(self, want: int) -> list[int]:
        """The numbers of `want` rows, by falling gain."""
        looked = want * self._sampler.m
        numbers, rows = np.empty(0, np.int64), None
        while len(numbers) < looked and self._left:
            new = self._pop(min(looked - len(numbers), self._left))
            sketches = self._sampler.candidates.take(new)
            norm = torch.linalg.vector_norm(sketches, dim=1, keepdim=True)
            good = has_direction(norm)[:, 0]
            self._last += new[~good.numpy()].tolist()
            unit = (sketches[good] / norm[good]).mul_(_STEP).round_().div_(_STEP)
            numbers = np.concatenate([numbers, new[good.numpy()]])
            rows = unit if rows is None else torch.cat([rows, unit])
        picks: list[int] = []
        if rows is not None and len(rows):
            picks = self._greedy(rows, min(want, len(rows)))
            unpicked = np.ones(len(numbers), bool)
            unpicked[picks] = False
            self._push(numbers[unpicked])
            self._remember(rows[picks])
        rest, self._last = self._last[: want - len(picks)], self._last[want - len(picks) :]
        return numbers[picks].tolist() + rest

    def _greedy(self, rows: torch.Tensor, size: int) -> list[int]:
        """Places of `size` of the candidates float64 [c, K], ties to the first in line."""
        dim = rows.shape[1]
        if self._moment is None:
            self._moment, self._window = (
                torch.zeros(dim, dim, dtype=torch.float64),
                torch.empty(0, dim, dtype=torch.float32),
            )
        if self._sampler.objective == "vendi":
            return _most_entropy(self._moment, len(self._window), rows, size)
        return _most_logdet(self._moment, rows, size, self._sampler.eps)

    def _remember(self, rows: torch.Tensor) -> None:
        """The window moves on: A gains these rows, and loses those that are now too long ago."""
        keep = self._sampler.window
        if not keep:
            return
        rows = rows[-keep:]
        gone = max(0, len(self._window) + len(rows) - keep)
        old = self._window[:gone].double()
        self._moment -= old.T @ old
        self._moment += rows.T @ rows
        # Multiples of 2^-20 of at most 1 are float32 without a change.
        self._window = torch.cat([self._window[gone:], rows.float()])

    def _pop(self, count: int) -> np.ndarray:
        places = (self._head + np.arange(count)) % len(self._line)
        self._head, self._left = (self._head + count) % len(self._line), self._left - count
        return self._line[places]

    def _push(self, numbers: np.ndarray) -> None:
        self._line[(self._head + self._left + np.arange(len(numbers))) % len(self._line)] = numbers
        self._left += len(numbers)

    def _state(self) -> dict[str, Any]:
        left = self._line[(self._head + np.arange(self._left)) % len(self._line)]
        return {
            "line": torch.from_numpy(left.copy()),
            "last": list(self._last),
            "window": None if self._window is None else self._window.clone(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._left, self._head, self._last = len(state["line"]), 0, list(state["last"])
        self._line = np.zeros(self._sampler.rows, np.int64)
        self._line[: self._left] = state["line"].numpy()
        self._window, self._moment = state["window"], None
        if self._window is not None:
            rows = self._window.double()
            self._moment = rows.T @ rows


def _most_logdet(moment: torch.Tensor, rows: torch.Tensor, size: int, eps: float) -> list[int]:
    """Greedy places by ln(1 + x^T (A + eps)^-1 x)."""
    lower = torch.linalg.cholesky(moment + eps * torch.eye(len(moment), dtype=torch.float64))
    solved = torch.linalg.solve_triangular(lower, rows.T, upper=False)
    overlap = (solved.T @ solved).numpy()
    gains, falls = overlap.diagonal().copy(), np.empty((size, len(rows)))
    picks: list[int] = []
    for i in range(size):
        value = np.log1p(gains)
        pick = int(np.flatnonzero(value >= value.max() - _TIE)[0])
        fall = overlap[pick] - falls[:i, pick] @ falls[:i]
        falls[i] = fall / np.sqrt(1 + max(gains[pick], 0.0))
        gains = np.maximum(gains - falls[i] ** 2, 0)
        picks.append(pick)
        # Chosen once: no gain is below 0.
        gains[picks] = -0.5
    return picks


def _most_entropy(moment: torch.Tensor, count: int, rows: torch.Tensor, size: int) -> list[int]:
    """Greedy places by the entropy gain, by the engine of `select`."""
    given = VendiState(rows.shape[1])
    given.matrix.copy_(moment)
    given._grown(count)
    numbers = np.arange(len(rows))
    problem = Problem(
        pool=MatrixPool(rows),
        objective="vendi",
        numbers=numbers,
        size=size,
        rank=numbers,
        labels=None,
        limits=None,
        quality=None,
        given=given,
        targets=None,
        covered=None,
        eps=0.1,
        seed=0,
        memory=_MEMORY,
        progress=Silent(),
    )
    return lazy(problem).numbers.tolist()
