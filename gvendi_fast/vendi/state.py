"""The mergeable state of G-Vendi: a `SecondMoment` that rows are added to, and all that it can compute.

A G-Vendi score grows with n: compare scores at equal n; `growth` forecasts that of more rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.differences import same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import changes, reading, reads
from gvendi_fast.base.tensor_files import LENGTH, load_tensors, save_tensors
from gvendi_fast.base.unit_length import BLOCK, Rows, check_matrix, is_double, unit_rows
from gvendi_fast.kernels import ops
from gvendi_fast.vendi import gains
from gvendi_fast.vendi.second_moment import SecondMoment

if TYPE_CHECKING:
    from gvendi_fast.vendi.jackknife import Interval

_KIND = "gvendi_fast.vendi_state"


def plain_spec(spec: dict | None) -> dict | None:
    """A spec as it is after saving and loading, which it must equal: JSON knows no tuples. GvendiError if it fails."""
    try:
        return None if spec is None else json.loads(json.dumps(spec))
    except TypeError as error:
        raise GvendiError(
            f"spec cannot be written as JSON ({error}); use str, numbers, lists, dicts"
        ) from None


class VendiState(SecondMoment):
    """The sum A of outer products of unit rows, and their number n: what G-Vendi needs, and it can be merged.

    dim: K, the width of the sketches.
    spec: a dict of JSON values that says how they were made (proxy, sketch); it is saved with the state, and states of
        different specs cannot be merged.
    device: where A is; rows are moved there.

    Any number of threads may read a state at once. `update` and `merge` want it alone: a call that meets one of another
    thread raises GvendiError and changes nothing. Give each thread a state of its own and merge them.
    """

    def __init__(self, dim: int, spec: dict | None = None, device: str | torch.device = "cpu"):
        dim = whole(dim, "dim", "the width of the sketches, an integer of at least 1", 1)
        self.spec = plain_spec(spec)
        super().__init__(dim, device)

    def __repr__(self) -> str:
        return f"VendiState(dim={self.dim}, n={self.n}, spec={self.spec})"

    @changes
    def update(self, rows: Rows) -> VendiState:
        """Add rows [N, K] of any float dtype and length (each counts with length 1). Returns self.

        Products are float32, which is what sketches are stored in, and float64 where the rows are.

        A wrong shape or dtype, or a row that is zero or not finite, raises GvendiError and leaves the state unchanged.
        """
        check_matrix(rows, self.dim)
        starts = range(0, len(rows), BLOCK)
        if len(starts) > 1:
            for i in starts:
                unit_rows(rows[i : i + BLOCK], self.matrix.device, i)
        for i in starts:
            unit = unit_rows(rows[i : i + BLOCK], self.matrix.device, i)
            if is_double(rows):
                self.matrix.addmm_(unit.T, unit)
            else:
                ops.covariance(unit.float().contiguous(), self.matrix)
        self._grown(len(rows))
        return self

    @changes
    def merge(self, other: VendiState) -> VendiState:
        """Add another state's rows (in place; returns self). A different dim or spec raises GvendiError.

        A state without rows and without a spec takes the other's spec.
        """
        if other.dim != self.dim:
            raise GvendiError(
                f"cannot merge states of dim {self.dim} and {other.dim}; sketch both with one dim"
            )
        with reading(*([] if other is self else [other]), doing="merge"):
            if self.n == 0 and self.spec is None:
                self.spec = other.spec
            if not same_spec(other.spec, self.spec):
                raise GvendiError(
                    f"cannot merge states of different specs; sketch both data sets with one spec\n"
                    f"  this:  {self.spec}\n  other: {other.spec}"
                )
            self.matrix += other.matrix.to(self.matrix.device)
            self._grown(other.n)
        return self

    @reads
    def save(self, path: str | os.PathLike) -> None:
        """Write the state to one safetensors file, which gets its name only when it is complete."""
        save_tensors(path, _KIND, {"matrix": self.matrix}, {"n": self.n, "spec": self.spec})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> VendiState:
        """Read a state written by `save`. Another kind of file, version or content raises GvendiError."""
        layout = {"matrix": (torch.float64, 2)}
        tensors, words = load_tensors(path, _KIND, "VendiState.save", layout, ("n", "spec"), _fault)
        state = cls(len(tensors["matrix"]), words["spec"], device)
        state.matrix.copy_(tensors["matrix"])
        state._grown(words["n"])
        return state

    @overload
    def gvendi(self, q: float = 1.0) -> float: ...
    @overload
    def gvendi(
        self, q: float = 1.0, *, ci: Literal["jackknife"], rows: Rows | Iterable[Rows], level: float = 0.95
    ) -> Interval: ...
    @reads
    def gvendi(
        self,
        q: float = 1.0,
        *,
        ci: str | None = None,
        rows: Rows | Iterable[Rows] | None = None,
        level: float = 0.95,
    ) -> float | Interval:
        """G-Vendi of order q, exp(H_q): between 1 and min(n, K), the number of equally used directions.

        ci="jackknife" returns an Interval (`jackknife.jackknife`, order 1) of the given level instead. It needs
        `rows`, [n, K] or blocks of them, from which the state was made: the state does not keep them.
        """
        if ci is None:
            return super().gvendi(q)
        if ci != "jackknife":
            raise GvendiError(f'ci is {ci!r}; wanted "jackknife" or None')
        if rows is None:
            raise GvendiError(
                "ci needs the rows that the state was made from, which it does not keep; give rows="
            )
        from gvendi_fast.vendi.jackknife import jackknife

        return jackknife(self, rows, level, q)

    @reads
    def gain(self, candidates: Rows, remove: bool = False) -> torch.Tensor:
        """What each row of candidates [N, K] alone adds to the entropy H_1: float64 [N] in nats, on the CPU.

        H_1 after adding the row to the state minus H_1 now; remove=True: after taking it out (n >= 2; a row that
        cannot be in the state raises GvendiError). Negative where the row makes the rows less diverse. H_1 of no rows
        counts as 0, so that every row adds 0 to an empty state. Source: docs/score.md.
        """
        return gains.gain(self, candidates, remove)

    @reads
    def block_gain(self, rows: Rows, boundaries: torch.Tensor) -> torch.Tensor:
        """What each block of rows adds to the entropy H_1 as a whole: float64 [G] in nats, on the CPU.

        Block g is rows boundaries[g] .. boundaries[g + 1] of rows [N, K], boundaries int64 [G + 1]; an empty one adds
        0. All products are float64. H_1 of no rows counts as 0.
        """
        return gains.block_gain(self, rows, boundaries)

    @reads
    def contributions(self, rows: Rows, kind: str = "surprisal") -> torch.Tensor:
        """Each row's share of the entropy H_1: float64 [N] in nats for rows [N, K], on the CPU.

        "surprisal": -z^T (ln Sigma) z >= 0, whose mean over the state's own rows is H_1: an additive share for
        samples, sources or clusters. A direction in which the state has no row counts with the eigenvalue 2^-52, so a
        row that is not in the state has at most 36 nats. "loo": H_1 minus H_1 without the row, -gain(remove=True).
        """
        return gains.contributions(self, rows, kind)


def _fault(matrix: torch.Tensor, n: Any, spec: Any) -> str | None:
    """What no second moment of n unit rows is."""
    if type(n) is not int or n < 0:
        return f"n is {n!r}"
    if not isinstance(spec, dict | None):
        return f"spec is {spec!r}"
    if matrix.shape[0] != matrix.shape[1]:
        return f"matrix is {tuple(matrix.shape)}"
    off = max(abs(matrix.trace() - n), (matrix - matrix.T).abs().max()) if matrix.numel() else 0
    # Not finite is not within it either.
    if not off <= n * LENGTH or (matrix.diagonal() < 0).any():
        return f"no {n:,} rows of length 1 have this second moment"
    return None
