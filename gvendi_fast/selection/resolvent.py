"""The resolvent (A + t)^-1 of a matrix that grows row by row, at fixed nodes t, for greedy selection.

    g_t(x) = x^T (A + t)^-1 x                       A float64 [K, K], x a unit row [K], t the J nodes
    A -> A + y y^T:   g_t(x) falls by (x^T u_t)^2,  u_t = (A + t)^-1 y / sqrt(1 + g_t(y))    (Sherman, Morrison 1950)
so that after a pick all J values of a candidate are renewed by one product with u [J, K]. They give entropy gains:
    S(A + x x^T) - S(A) = phi(mu + 1) - phi(mu) + int_0^inf [ln1p(1 / (mu + t)) - ln1p(g_t(x))] dt
with S(A) = tr(A ln A), phi(x) = x ln x, mu = x^T A x (docs/score.md; `spectrum.marginal_change`).
"""

from __future__ import annotations

import torch

from gvendi_fast.kernels.spectrum import nodes

# Products of this many picks are made at once, so that their result stays in the cache.
PICKS_AT_ONCE = 8
# A product of rows with fewer columns than a multiple of this runs at two thirds of its speed.
COLUMNS = 16


def entropy_nodes(matrix: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes t and weights, float64 [J] each, of int_0^inf dt for A = matrix and up to `rows` unit rows more.

    They reach from far below the smallest eigenvalue of A to far above the largest that it can have then.
    """
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp_min_(0) if bool(matrix.any()) else matrix.new_zeros(1)
    return nodes(eigenvalues, 1, rows + 1)


def entropy_gain(values: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """-(S(A + x x^T) - S(A)) in nats, [m], of values [m, J + 1]: g at the nodes t [J], then -x^T A x.

    Computed in the dtype of `values`; x has length 1.
    """
    mu = -values[:, -1:]
    bound = 1 / (mu + t)
    # One logarithm in place of two; at large t both are near 0, and only their difference matters.
    integral = torch.log1p((values[:, : len(t)].clamp_min(0) - bound) / (1 + bound)) @ weight
    phi = torch.special.xlogy
    return (phi(mu, mu) - phi(mu + 1, mu + 1))[:, 0] + integral


class Resolvent:
    """(A + t)^-1 for all nodes at once; `picks` counts the rows added.

    A = matrix + sum of the rows added. It is diagonalised every `period` rows; between, each added row leaves its
    u (above) in float64, and the last `period` or more of them also in float32 for products with many rows.
    """

    def __init__(self, matrix: torch.Tensor, t: torch.Tensor, period: int | None = None) -> None:
        self.dim, self.t = len(matrix), t
        self.period = period_of(self.dim) if period is None else period
        self.picks = self.base = self.oldest = 0
        self.matrix = matrix.double().clone()
        J = len(t)
        # The row itself is the last column, so that the same product gives x^T A x; then come zeros.
        self.width = padded(J + 1)
        self._u = torch.empty(J, self.period, self.dim, dtype=torch.float64)
        self._rows = torch.empty(self.period, self.dim, dtype=torch.float64)
        self._history = torch.zeros(2 * self.period, self.width, self.dim)
        self._diagonalise()

    @property
    def empty(self) -> bool:
        """Whether A is zero: every row then has the same g."""
        return self.picks == 0 and not bool(self.matrix.any())

    def start(self) -> torch.Tensor:
        """The values [J + 1] that every unit row has at A = 0: g_t = 1 / t and x^T A x = 0."""
        return torch.cat([1 / self.t, self.t.new_zeros(1)])

    def rebase(self) -> None:
        """Diagonalise A as it is now."""
        pending = self._rows[: self.picks - self.base]
        self.matrix.addmm_(pending.T, pending)
        self.base = self.picks
        self._diagonalise()

    def at_base(self, rows: torch.Tensor) -> torch.Tensor:
        """values [m, J + 1] of rows float32 [m, K] (or float64, then in float64) at the last diagonalised A."""
        vectors, weights = self._basis[rows.dtype]
        return ((rows @ vectors).square_() @ weights).double()

    def exact(self, rows: torch.Tensor) -> torch.Tensor:
        """values [m, J + 1] of rows [m, K] at A, all in float64."""
        x = unit(rows)
        out = self.at_base(x)
        pending = self.picks - self.base
        out[:, :-1] -= torch.matmul(self._u[:, :pending], x.T).square_().sum(1).T
        out[:, -1] -= (self._rows[:pending] @ x.T).square_().sum(0)
        return out

    def advance(self, rows: torch.Tensor, values: torch.Tensor, stamps: torch.Tensor) -> None:
        """Bring values [m, J + 1] of rows float32 [m, K] from `stamps` picks to `picks`, in place.

        stamps int64 [m] ascending, none below `oldest`.
        """
        m, J = values.shape[0], values.shape[1] - 1
        pick = int(stamps[0]) if m else self.picks
        while pick < self.picks:
            # The rows that have missed this pick come first.
            count = int(torch.searchsorted(stamps, pick, right=True))
            end = self.picks if count == m else int(stamps[count])
            end = min(end, pick + PICKS_AT_ONCE)
            u = self._history[pick - self.oldest : end - self.oldest].view(-1, self.dim)
            falls = (rows[:count] @ u.T).square_().view(count, end - pick, self.width)
            falls = falls[:, 0] if end - pick == 1 else falls.sum(1)
            values[:count] -= falls[:, : J + 1]
            pick = end

    def add(self, row: torch.Tensor) -> None:
        """A += y y^T of y [K], a unit row."""
        y = unit(row)
        pending = self.picks - self.base
        solved = (self._vectors.T @ y / (self._eigenvalues + self.t[:, None])) @ self._vectors.T
        u = self._u[:, :pending]
        solved -= torch.bmm((u @ y)[:, None], u)[:, 0]
        solved /= (1 + solved @ y).sqrt_()[:, None]
        self._u[:, pending], self._rows[pending] = solved, y
        if self.picks - self.oldest == len(self._history):
            self._history[: self.period] = self._history[self.period :].clone()
            self.oldest += self.period
        slot = self._history[self.picks - self.oldest]
        slot[: len(self.t)], slot[len(self.t)] = solved, y
        self.picks += 1
        if pending + 1 == self.period:
            self.rebase()

    def _diagonalise(self) -> None:
        if self.empty:
            eigenvalues, vectors = self.matrix.diagonal().clone(), torch.eye(self.dim, dtype=torch.float64)
        else:
            eigenvalues, vectors = torch.linalg.eigh(self.matrix)
        lam = self._eigenvalues = eigenvalues.clamp_min_(0)
        self._vectors = vectors
        weights = torch.cat([1 / (lam[:, None] + self.t), -lam[:, None]], dim=1)
        self._basis = {
            torch.float64: (vectors, weights),
            torch.float32: (vectors.float(), weights.float()),
        }


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows in float64 with length 1 to its precision.

    A length of 1 + d, such as float32 rounding leaves, is an error of d at every node, about 20 d in a gain.
    """
    rows = rows.double()
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def period_of(dim: int) -> int:
    """Rows between two diagonalisations: their products then cost about as much as the diagonalisation."""
    return min(max(16, dim // 8), 256)


def padded(columns: int) -> int:
    """columns, rounded up to a multiple of COLUMNS."""
    return -(-columns // COLUMNS) * COLUMNS


def resolvent_bytes(dim: int, nodes: int) -> int:
    """Bytes that a Resolvent takes, with the workspace of a diagonalisation."""
    period = period_of(dim)
    return dim * (dim * 56 + period * 8 * (nodes + 1) + 2 * period * 4 * padded(nodes + 1))
