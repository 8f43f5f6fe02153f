"""The second moment of a set of unit rows, from the rows themselves where they are few and from their sum elsewhere.

Products are float64: directions without rows have eigenvalues of float64's rounding, as surprisal wants them.
"""

from __future__ import annotations

import math

import torch

from gvendi_fast.base.unit_length import BLOCK
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.state import VendiState


def given_state(matrix: torch.Tensor, n: int, spec: dict | None = None) -> VendiState:
    """The state whose sum of outer products is `matrix`, float64 [K, K], of n rows; it takes the matrix over."""
    state = VendiState(len(matrix), spec, matrix.device)
    state.matrix = matrix
    state._grown(n)
    return state


class Moment:
    """The second moment of n unit rows of width dim; what it computes is kept."""

    def __init__(self, rows: torch.Tensor, base: Moment | None = None) -> None:
        """Of float32 rows [n, K], after those of a base, whose sum is not done again."""
        self._added, self._base = rows, base
        self.n = len(rows) + (0 if base is None else base.n)
        self.dim = rows.shape[1]
        self._has_rows = True
        self._rows: torch.Tensor | None = None
        self._state: VendiState | None = None
        self._gram: torch.Tensor | None = None
        self._spectrum: torch.Tensor | None = None

    @classmethod
    def of_sum(cls, matrix: torch.Tensor, n: int) -> Moment:
        """Of n rows of which only the sum of outer products is known, float64 [K, K]; it takes the matrix over."""
        moment = cls(torch.empty(0, len(matrix), dtype=torch.float32, device=matrix.device))
        moment.n, moment._has_rows, moment._state = n, False, given_state(matrix, n)
        return moment

    def joined(self, rows: torch.Tensor) -> Moment:
        """The moment of these rows and more of them."""
        return Moment(rows, self)

    @property
    def rows(self) -> torch.Tensor:
        """The rows, float32 [n, K]; none where only their sum is known."""
        if self._rows is None:
            self._rows = self._added if self._base is None else torch.cat([self._base.rows, self._added])
        return self._rows

    @property
    def state(self) -> VendiState:
        """As a `VendiState`, which is not to be changed."""
        if self._state is None:
            self._state = VendiState(self.dim, device=self._added.device)
            if self._base is not None:
                self._state.merge(self._base.state)
            for block in self._added.split(BLOCK):
                self._state.update(block.double())
        return self._state

    def entropy(self, q: float = 1.0) -> float:
        """H_q in nats of at least one row, from the smaller of Gram and second moment."""
        if not self._is_small:
            return self.state.entropy(q)
        if q == 2:
            gram = self._own_gram()
            return -math.log(float(gram.square().sum() / gram.trace() ** 2))
        if self._spectrum is None:
            eigenvalues = torch.linalg.eigvalsh(self._own_gram()).cpu().clamp_min_(0)
            self._spectrum = eigenvalues / eigenvalues.sum()
        return renyi_entropy(self._spectrum, q)

    def similarity(self) -> float | None:
        """The mean squared cosine of two different rows, (|A|_F^2 - n) / (n (n - 1)); None for fewer than two rows."""
        if self.n < 2:
            return None
        products = self._own_gram() if self._is_small else self.state.matrix
        squares = float(products.square().sum()) - self.n
        return max(0.0, squares) / (self.n * (self.n - 1))

    def mean_form(self, matrix: torch.Tensor) -> float:
        """The mean of z^T M z over the rows, tr(A M) / n, for M symmetric float64 [K, K]; of at least one row."""
        if self._is_small:
            rows = self._unit()
            return float(((rows @ matrix) * rows).sum()) / self.n
        return float((self.state.matrix * matrix).sum()) / self.n

    @property
    def _is_small(self) -> bool:
        return self._has_rows and self.n < self.dim

    def _unit(self) -> torch.Tensor:
        rows = self.rows.double()
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)

    def _own_gram(self) -> torch.Tensor:
        if self._gram is None:
            rows = self._unit()
            self._gram = rows @ rows.T
        return self._gram
