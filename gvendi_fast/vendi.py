"""G-Vendi of sketched gradients: the mergeable state, its entropies, and a jackknife interval.

    A = sum_i z_i z_i^T of unit rows z_i [K],  Sigma = A / n,  lambda its eigenvalues (trace 1, not centred)
    H_1 = -sum lambda ln lambda,   H_q = ln(sum lambda^q) / (1 - q),   G-Vendi = exp(H)
    row i leaves: Delta S_i = S(A - z_i z_i^T) - S(A) with S(A) = tr(A ln A)
                  H_{-i} = ln(n - 1) - (S(A) + Delta S_i) / (n - 1)
A G-Vendi score grows with n: compare scores at equal n, or their corrected values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gvendi_fast import ops
from gvendi_fast.errors import GvendiError
from gvendi_fast.spectrum import marginal_change, renyi_entropy

Rows = torch.Tensor | np.ndarray

_FORMAT, _VERSION = "gvendi_fast.vendi_state", "1"
_BLOCK = 4096


@dataclass(frozen=True)
class Interval:
    """G-Vendi with its jackknife correction, all on the scale of G-Vendi but `se` (of the entropy, in nats).

    `low` and `high` enclose `corrected`, the estimate for unlimited data. `value`, the plain score of these
    n rows, is biased low and may lie below both.
    """

    value: float
    corrected: float
    low: float
    high: float
    se: float
    n: int
    level: float = 0.95


class VendiState:
    """The sum A of outer products of unit rows, and their number n: what G-Vendi needs, and it can be merged.

    dim: K, the width of the rows. spec: a dict of JSON values that says how the rows were made (proxy,
    sketch); it travels with the state, and states of different specs do not mix. device: where A lives; rows
    are moved there.
    """

    def __init__(self, dim: int, spec: dict | None = None, device: str | torch.device = "cpu"):
        if dim < 1:
            raise GvendiError(f"dim is {dim}; wanted the width of the rows, an integer of at least 1")
        try:
            # JSON knows no tuples: a spec must equal itself after saving and loading.
            self.spec = None if spec is None else json.loads(json.dumps(spec))
        except TypeError as error:
            raise GvendiError(
                f"spec cannot be written as JSON ({error}); use str, numbers, lists, dicts"
            ) from None
        self.dim, self.n = int(dim), 0
        self.matrix = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)
        self._spectrum: torch.Tensor | None = None
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return f"VendiState(dim={self.dim}, n={self.n}, spec={self.spec})"

    def update(self, rows: Rows) -> VendiState:
        """Add rows [N, K] of any float dtype and length (each counts with length 1). Returns self.

        A wrong shape or dtype, or a row that is zero or not finite, raises and leaves the state as it was.
        """
        _check_matrix(rows, self.dim)
        starts = range(0, len(rows), _BLOCK)
        if len(starts) > 1:
            for i in starts:
                _unit_rows(rows[i : i + _BLOCK], self, i)
        for i in starts:
            unit = _unit_rows(rows[i : i + _BLOCK], self, i)
            ops.covariance(unit.float().contiguous(), self.matrix)
        return self._grown(len(rows))

    def merge(self, other: VendiState) -> VendiState:
        """Add another state's rows (in place; returns self). A different dim or spec raises GvendiError.

        A state without rows and without a spec takes the other's spec.
        """
        if other.dim != self.dim:
            raise GvendiError(
                f"cannot merge states of dim {self.dim} and {other.dim}; sketch both with one dim"
            )
        if self.n == 0 and self.spec is None:
            self.spec = other.spec
        if other.spec != self.spec:
            raise GvendiError(
                f"cannot merge states of different specs; sketch both data sets with one spec\n"
                f"  this:  {self.spec}\n  other: {other.spec}"
            )
        self.matrix += other.matrix.to(self.matrix.device)
        return self._grown(other.n)

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to one safetensors file, which appears under its name only when complete."""
        path = Path(path)
        meta = {"format": _FORMAT, "version": _VERSION, "n": str(self.n), "spec": json.dumps(self.spec)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file({"matrix": self.matrix.cpu()}, partial, metadata=meta)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> VendiState:
        """Read a state written by `save`. Another kind of file, or another version, raises GvendiError."""
        wanted = f"wanted a file written by VendiState.save ({_FORMAT} version {_VERSION})"
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                meta = file.metadata() or {}
                if (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
                    raise GvendiError(
                        f"{path} holds {meta.get('format')} version {meta.get('version')}; {wanted}"
                    )
                matrix = file.get_tensor("matrix")
        except SafetensorError as error:
            raise GvendiError(f"{path} is not a safetensors file ({error}); {wanted}") from None
        state = cls(len(matrix), json.loads(meta["spec"]), device)
        state.matrix.copy_(matrix)
        return state._grown(int(meta["n"]))

    def spectrum(self) -> torch.Tensor:
        """Eigenvalues of A / n in descending order: float64 [K] on the CPU, none negative, sum 1."""
        if self._spectrum is None:
            eigenvalues = torch.linalg.eigvalsh(self._trace_one()).cpu().flip(0).clamp_min_(0)
            # The rank is at most n: what stands behind is rounding.
            eigenvalues[self.n :] = 0
            self._spectrum = eigenvalues / eigenvalues.sum()
        return self._spectrum.clone()

    def entropy(self, q: float = 1.0) -> float:
        """Renyi entropy H_q in nats, any order q > 0 or inf; q = 1 is von Neumann's. n = 0 raises.

        H_2 needs no eigenvalues. At q < 1, eigenvalues below 2^-22 do not count: they may be rounding.
        """
        if q == 2:
            return -math.log(float(self._trace_one().square().sum()))
        return renyi_entropy(self.spectrum(), q)

    def gvendi(self, q: float = 1.0) -> float:
        """G-Vendi of order q, exp(H_q): between 1 and min(n, K), the number of equally used directions."""
        return math.exp(self.entropy(q))

    def effective_spectrum(self, shares: Iterable[float] = (0.5, 0.9, 0.99)) -> dict[float, int]:
        """For each share in (0, 1], how many of the largest eigenvalues hold it (to 1e-6 of the trace)."""
        held, counts = self.spectrum().cumsum(0), {}
        for share in shares:
            if not 0 < share <= 1:
                raise GvendiError(f"shares holds {share}; wanted parts of the trace in (0, 1], such as 0.9")
            counts[share] = int(torch.searchsorted(held, share - 1e-6)) + 1
        return counts

    def eigenbasis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A = Q diag(l) Q^T, not divided by n: l float64 [K] ascending, none negative; Q float64 [K, K]."""
        if self._basis is None:
            eigenvalues, vectors = torch.linalg.eigh(self._trace_one())
            self._basis = eigenvalues.clamp_min_(0) * self.n, vectors
        return self._basis

    def _trace_one(self) -> torch.Tensor:
        if self.n == 0:
            raise GvendiError(
                "the state holds no rows (n = 0), so it has no spectrum; call update(rows) first"
            )
        return self.matrix / self.matrix.trace()

    def _grown(self, rows: int) -> VendiState:
        self.n += rows
        self._spectrum = self._basis = None
        return self


def gvendi(rows: Rows, q: float = 1.0) -> float:
    """G-Vendi of order q of rows [n, K], from the smaller of Gram [n, n] and covariance [K, K] matrix."""
    _check_matrix(rows)
    n, dim = rows.shape
    state = VendiState(dim)
    if n == 0 or n >= dim:
        return state.update(rows).gvendi(q)
    unit = _unit_rows(rows, state, 0)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T).clamp_min_(0)
    return math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), q))


def leave_one_out(state: VendiState, rows: Rows) -> torch.Tensor:
    """H_1 in nats of the state without one row, for each of rows [N, K] that are in it: float64 [N]; n >= 2.

    A row that cannot be in the state raises GvendiError.
    """
    if state.n < 2:
        raise GvendiError(f"the state has n = {state.n}; leaving a row out needs at least 2")
    eigenvalues = state.eigenbasis()[0]
    total = torch.special.xlogy(eigenvalues, eigenvalues).sum()
    change = [_removal(state, unit, first)[0] for first, unit in _unit_blocks(state, rows)]
    left = total + torch.cat([*change, total.new_empty(0)])
    return (math.log(state.n - 1) - left / (state.n - 1)).cpu()


def jackknife(
    state: VendiState, rows: Rows | Iterable[Rows], level: float = 0.95, q: float = 1.0
) -> Interval:
    """G-Vendi corrected for its bias in n, with a confidence interval of the given level; order 1 only.

    rows: the rows that the state was made from, [n, K] or blocks of them; memory does not grow with n.
        H_J = n H - (n-1) mean_i H_{-i} = n ln n - (n-1) ln(n-1) + mean_i Delta S_i
        SE^2 = (n-1)/n sum_i (H_{-i} - mean)^2 = var_i(Delta S_i) / n          (Quenouille 1956, Tukey 1958)
    The interval is exp(H_J -+ z SE), for rows drawn independently from one population, clipped to [1, K], the
    bounds of that population's value; n bounds only the sample's. The correction is of first order: below
    about n = 2 G-Vendi only more data helps, and orthogonal rows even give se = 0. One row says nothing:
    corrected = 1, interval [1, K], se = inf.
    Raises GvendiError where the rows are not the state's, q is not 1 or level is not in (0, 1).
    """
    if q != 1:
        raise GvendiError(
            f"q is {q}; the jackknife is made for order 1, for the plain value use state.gvendi(q)"
        )
    if not 0 < level < 1:
        raise GvendiError(f"level is {level}; wanted a confidence level between 0 and 1, such as 0.95")
    n, dim, value = state.n, float(state.dim), state.gvendi()
    count, mean, spread, overlap = 0, 0.0, 0.0, 0.0
    for first, unit in _unit_blocks(state, rows):
        change, mu = _removal(state, unit, first)
        # Chan's merge of (count, mean, sum of squared deviations).
        here, offset = len(change), float(change.mean()) - mean
        spread += float((change - change.mean()).square().sum()) + offset**2 * count * here / (count + here)
        mean += offset * here / (count + here)
        count += here
        overlap += float(mu.sum())
    # sum_i z_i^T A z_i = |A|_F^2 holds for the state's own rows.
    if count != n or not math.isclose(overlap, float(state.matrix.square().sum()), rel_tol=1e-4):
        raise GvendiError(
            f"rows ({count}) are not those of the state ({n}); give exactly the rows it was made from"
        )
    if n == 1:
        return Interval(value, 1.0, 1.0, dim, math.inf, n, level)
    entropy = n * math.log(n) - (n - 1) * math.log(n - 1) + mean
    se = math.sqrt(spread / (n - 1) / n)
    reach = NormalDist().inv_cdf(0.5 + level / 2) * se
    # Clipped before exp, which a wide interval of few rows would overflow.
    bounds = (math.exp(min(max(h, 0.0), math.log(dim))) for h in (entropy, entropy - reach, entropy + reach))
    return Interval(value, *bounds, se, n, level)


def _removal(state: VendiState, unit: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta S and mu = x^T A x for each x of unit [N, K] that leaves the state: float64 [N] each."""
    eigenvalues, vectors = state.eigenbasis()
    change, mu, excess = marginal_change((unit @ vectors).square_(), eigenvalues, -1)
    if float(excess.max()) > 0.5:
        row = first + int(excess.argmax())
        raise GvendiError(
            f"row {row} of rows is not in the state; give the rows that the state was made from"
        )
    return change, mu


def _unit_blocks(state: VendiState, rows: Rows | Iterable[Rows]) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first row, unit rows) for small blocks of a matrix or of a stream of matrices."""
    seen = 0
    for matrix in [rows] if isinstance(rows, torch.Tensor | np.ndarray) else rows:
        _check_matrix(matrix, state.dim)
        # 512 rows: their products with the eigenvectors stay in the cache.
        for i in range(0, len(matrix), 512):
            yield seen + i, _unit_rows(matrix[i : i + 512], state, seen + i)
        seen += len(matrix)


def _check_matrix(rows: Rows, dim: int | None = None) -> None:
    if not isinstance(rows, torch.Tensor | np.ndarray):
        raise GvendiError(f"rows is a {type(rows).__name__}; wanted a torch tensor or a numpy array [N, K]")
    if rows.ndim != 2 or rows.shape[1] != (dim or rows.shape[1]) or rows.shape[1] == 0:
        raise GvendiError(f"rows has shape {tuple(rows.shape)}; wanted [N, {dim or 'K'}], one sketch a row")
    floating = (
        np.issubdtype(rows.dtype, np.floating) if isinstance(rows, np.ndarray) else rows.is_floating_point()
    )
    if not floating:
        raise GvendiError(f"rows has dtype {rows.dtype}; wanted a float dtype, such as float32")


def _unit_rows(rows: Rows, state: VendiState, first: int) -> torch.Tensor:
    """Rows scaled to length 1: float64 [N, K] on the state's device. `first` numbers them in errors."""
    # The copy also serves what torch refuses: read-only, reversed and big-endian arrays.
    x = torch.from_numpy(np.array(rows, dtype=np.float64)) if isinstance(rows, np.ndarray) else rows.detach()
    x = x.to(state.matrix.device, torch.float64)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    bad = ~((norm > 0) & torch.isfinite(norm))
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        raise GvendiError(
            f"row {first + i} of rows has norm {float(norm[i])}; wanted finite and not zero: "
            "leave this sample out and report it"
        )
    return x / norm
