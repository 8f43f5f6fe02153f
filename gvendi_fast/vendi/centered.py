"""Centred G-Vendi: the diversity of rows without the mean direction that a reference gives them.

    c_i = (z_i - m) / |z_i - m|,   centred G-Vendi = exp(H_1((1/n) sum_i c_i c_i^T))
z_i are unit rows and m [K] is the mean of the unit rows of a reference: the pool, or all sources together. Sets are
compared by one reference, since a set's own mean takes its difference from the others away with it. A row that equals
the mean has no direction left: it is left out and counted. Unlike G-Vendi it tells z from -z.

It takes a second pass over the rows, as each is scaled by a length of its own. The state alone gives
    (1/n) sum_i (z_i - m)(z_i - m)^T = Sigma - s m^T - m s^T + m m^T,   s the rows' own mean  (Sigma - m m^T if m = s)
which is the same with every row weighted by |z_i - m|^2 in place of 1: equal where those lengths are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.differences import comparable, differences, flat, same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import OneThread, changes, reading, reads
from gvendi_fast.base.places import is_url, place
from gvendi_fast.base.tensor_files import LENGTH, load_tensors, save_tensors
from gvendi_fast.base.unit_length import BLOCK, Rows, check_matrix, is_double, strips, unit_rows
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.second_moment import SecondMoment
from gvendi_fast.vendi.state import VendiState, plain_spec

_KIND = "gvendi_fast.row_mean"
# Rows are summed in integers of this unit, which round a row by at most half of it and add without error in any order.
UNIT, MAX_ROWS = 2.0**-36, 1 << 26
# Rows of float32 have their directions to 2^-24: where |z - m| is below 2^8 times that, its direction may be off by
# half a percent, and the row counts as equal to the mean.
EQUAL = 2.0**-16
# The key of a spec that says by which mean the rows were centred.
CENTRED = "centred"


class RowMean(OneThread):
    """The sum of unit rows and their number: the mean of a reference. It can be merged, saved, and read again.

    dim: K, the width of the sketches.
    spec: as in `VendiState`; means of different specs cannot be merged, nor rows of another spec be centred by one.
    The same rows have the same mean to the bit, in whatever order and blocks they come. Threads share one as
    they share a `VendiState`.
    """

    def __init__(self, dim: int, spec: dict | None = None) -> None:
        self.dim = whole(dim, "dim", "the width of the sketches, an integer of at least 1", 1)
        self.spec, self.n = plain_spec(spec), 0
        self._sum = torch.zeros(self.dim, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"RowMean(dim={self.dim}, n={self.n}, spec={self.spec})"

    @changes
    def update(self, rows: Rows) -> RowMean:
        """Add rows [N, K] of any float dtype and length (each counts with length 1). Returns self.

        A wrong shape or dtype, or a row that is zero or not finite, raises GvendiError and leaves the mean unchanged.
        """
        check_matrix(rows, self.dim)
        self._check_room(len(rows))
        total = torch.zeros_like(self._sum)
        for strip in strips(rows):
            total += (unit_rows(rows[strip], first=strip.start) / UNIT).round_().long().sum(dim=0)
        self._sum += total
        self.n += len(rows)
        return self

    @changes
    def merge(self, other: RowMean) -> RowMean:
        """Add another mean's rows (in place; returns self). A different dim or spec raises GvendiError."""
        with reading(*([] if other is self else [other]), doing="merge"):
            if self.n == 0 and self.spec is None:
                self.spec = other.spec
            _check_same(self, other, "merge means")
            self._check_room(other.n)
            self._sum += other._sum
            self.n += other.n
        return self

    @reads
    def vector(self) -> torch.Tensor:
        """The mean, float64 [K]. Raises GvendiError if n = 0."""
        if self.n == 0:
            raise GvendiError("the mean holds no rows (n = 0); call update(rows) with those of the reference")
        return self._sum.double() * (UNIT / self.n)

    @property
    def squared_norm(self) -> float:
        """|m|^2, the mean cosine of all n^2 pairs of rows, each row with itself among them."""
        return float(self.vector().square().sum())

    @property
    def mark(self) -> str:
        """A name for this mean: equal means have equal ones."""
        return hashlib.blake2b(self.vector().numpy().astype("<f8").tobytes(), digest_size=8).hexdigest()

    @reads
    def save(self, path: str | os.PathLike) -> None:
        """Write the mean to one safetensors file, which gets its name only when it is complete."""
        save_tensors(path, _KIND, {"sum": self._sum}, {"n": self.n, "spec": self.spec})

    @staticmethod
    def check_savable(path: str | os.PathLike) -> None:
        """GvendiError where `save` has no folder to write into, or would replace anything but a saved mean."""
        path = place(path)
        if not (is_url(path) or path.parent.is_dir()):
            raise GvendiError(
                f"save_mean is '{path}', but the folder '{path.parent}' does not exist; make it first"
            )
        if path.is_file():
            try:
                RowMean.load(path)
            except GvendiError as error:
                raise GvendiError(
                    f"save_mean is '{path}', which exists and holds no mean; give another name, or remove it"
                ) from error
        elif path.exists():
            raise GvendiError(f"save_mean is '{path}', a folder; give the name of a file in it")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RowMean:
        """Read a mean written by `save`. Another kind of file, version or content raises GvendiError."""
        layout = {"sum": (torch.int64, 1)}
        tensors, words = load_tensors(path, _KIND, "RowMean.save", layout, ("n", "spec"), _fault)
        mean = cls(len(tensors["sum"]), words["spec"])
        mean._sum, mean.n = tensors["sum"], words["n"]
        return mean

    @classmethod
    def of_vector(cls, vector: torch.Tensor, n: int, spec: dict | None = None) -> RowMean:
        """The mean of n rows whose vector [K] is known, to 2^-37 / n a coordinate."""
        mean = cls(len(vector), spec)
        mean._check_room(n)
        mean._sum, mean.n = (vector.double().cpu() * (n / UNIT)).round().long(), n
        return mean

    def _check_room(self, rows: int) -> None:
        if self.n + rows > MAX_ROWS:
            raise GvendiError(
                f"a mean of {self.n + rows:,} rows; its exact sums hold at most {MAX_ROWS:,}: take a sample of them"
            )


def _fault(sum: torch.Tensor, n: Any, spec: Any) -> str | None:
    """What no sum of n unit rows is."""
    if type(n) is not int or not 0 <= n <= MAX_ROWS:
        return f"n is {n!r}"
    if not isinstance(spec, dict | None):
        return f"spec is {spec!r}"
    if torch.linalg.vector_norm(sum.double() * UNIT) > n * (1 + LENGTH):
        return f"no {n:,} rows of length 1 have this sum"
    return None


def equal_mean(means: Iterable[RowMean]) -> RowMean:
    """The mean of several sets in which each set weighs the same, whatever its rows: the reference of a comparison."""
    means = list(means)
    if not means:
        raise GvendiError("means is empty; give the RowMean of at least one set")
    out = RowMean(means[0].dim, means[0].spec)
    for other in means[1:]:
        _check_same(out, other, "take the mean of sets")
    rows = sum(mean.n for mean in means)
    out._check_room(rows)
    whole = torch.stack([mean.vector() for mean in means]).mean(dim=0)
    return RowMean.of_vector(whole, rows, means[0].spec)


@dataclass(frozen=True)
class CenteredScore:
    """Centred G-Vendi of a set.

    value: None where no row has a direction without the mean.
    n: rows that count.
    left_out: rows that equal the mean.
    why_not: why there is no value, else None.
    """

    value: float | None
    n: int
    left_out: int
    why_not: str | None

    @property
    def note(self) -> str | None:
        """A sentence on what is missing, None where nothing is."""
        if self.why_not is not None or not self.left_out:
            return self.why_not
        one = self.left_out == 1
        rows = "1 row equals" if one else f"{self.left_out:,} rows equal"
        return f"{rows} the mean and {'counts' if one else 'count'} only in the plain value"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: getattr(self, name) for name in ("value", "n", "left_out", "why_not")}


@dataclass(frozen=True, eq=False)
class Centered(CenteredScore):
    """A `CenteredScore` with the state of the centred rows, whose spec says by which mean they were centred."""

    state: VendiState = field(repr=False)

    def score(self) -> CenteredScore:
        """Without the state."""
        return CenteredScore(self.value, self.n, self.left_out, self.why_not)


def centered(rows: Rows | Iterable[Rows], mean: RowMean, spec: dict | None = None) -> Centered:
    """Centred G-Vendi of rows [n, K] or blocks of them, of any float dtype and length.

    spec: of the rows; GvendiError where it is not that of the mean.
    """
    sums = CenteredSums(mean)
    sums.add(0, rows)
    return centered_of([sums.result()], mean, spec)


class CenteredSums:
    """What `centered` needs of rows, as the sums of a pass over them."""

    def __init__(self, mean: RowMean) -> None:
        check_mean(mean)
        self._mean, self._state, self._seen = mean, VendiState(mean.dim), 0

    def add(self, first: int, rows: Rows | Iterable[Rows], *along: object) -> None:
        """Take up rows [n, K], or blocks of them, numbered from `first`."""
        for count, block in _blocks(rows, self._mean, first):
            self._state.update(block)
            self._seen += count

    def result(self) -> tuple[VendiState, int]:
        """The state of the centred rows, and the rows read."""
        return self._state, self._seen


def centered_of(sums: Iterable[tuple[VendiState, int]], mean: RowMean, spec: dict | None = None) -> Centered:
    """Centred G-Vendi from what `CenteredSums` has collected of all rows; memory is that of two states."""
    whole: VendiState | None = None
    seen = 0
    for state, rows in sums:
        whole = state if whole is None else whole.merge(state)
        seen += rows
    whole = VendiState(mean.dim) if whole is None else whole
    whole.spec = centred_spec(spec, mean, mean.dim)
    return Centered(
        value=whole.gvendi() if whole.n else None,
        n=whole.n,
        left_out=seen - whole.n,
        why_not=None if whole.n else _why_not(seen),
        state=whole,
    )


def centered_blocks(rows: Rows | Iterable[Rows], mean: RowMean) -> Iterator[torch.Tensor]:
    """The centred rows of `centered`, block by block, without those left out: what `jackknife` takes with its state.

    They are float64 where the rows are, else float32.
    """
    check_mean(mean)
    return (block for _, block in _blocks(rows, mean))


def centre_rows(unit: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(centred unit rows, which rows have a direction left: bool [n]) of unit rows and a mean [K], float64 [n, K].

    Rows without a direction come back as zeros.
    """
    left = unit - mean
    norm = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    some = norm > EQUAL
    return torch.where(some, left / norm.clamp_min(EQUAL), 0), some[:, 0]


def check_mean(mean: object) -> None:
    """GvendiError for anything but a RowMean, such as the path of one."""
    if not isinstance(mean, RowMean):
        raise GvendiError(f"mean is {mean!r}; wanted a RowMean: RowMean.load(path) reads a saved one")


def centred_spec(spec: dict | None, mean: RowMean, dim: int) -> dict:
    """The spec of rows [n, dim] of this spec once they are centred by the mean.

    GvendiError where the mean has another width or spec, or holds no rows.
    """
    check_mean(mean)
    if mean.n == 0:
        raise GvendiError("the mean holds no rows (n = 0); save one of the rows of the reference")
    if spec is not None and CENTRED in spec:
        raise GvendiError(f"spec says that the rows are centred already, by the mean {spec[CENTRED]}")
    of_rows, of_mean = comparable(plain_spec(spec), mean.spec)
    if of_rows is not None and of_mean is not None and of_rows != of_mean:
        pairs = differences(flat(of_mean), flat(of_rows), "(absent)")
        lines = "\n".join(
            f"  {key}: the mean has {there}, the rows have {here}" for key, there, here in pairs
        )
        raise GvendiError(
            "the mean is of rows of another spec; sketch both with one spec, or save a mean of these rows\n"
            + lines
        )
    if mean.dim != dim:
        raise GvendiError(
            f"the mean has dim {mean.dim} and the pool dim {dim}; save a mean of sketches of one dim"
        )
    return {**(spec or {}), CENTRED: mean.mark}


@reads
def entropy_without_mean(state: SecondMoment, own: RowMean, reference: RowMean | None = None) -> float | None:
    """H_1 in nats of the covariance about a mean, from the state and the rows' own mean alone; None if nothing is left.

    That is (1/n) sum_i (z_i - m)(z_i - m)^T over its trace; m is the reference's mean, or the rows' own. The rows
    are not scaled again: each weighs |z_i - m|^2, where centred G-Vendi gives every row the same weight.
    """
    check_own(state, own)
    s = own.vector().to(state.matrix.device)
    matrix = state.matrix / state.matrix.trace()
    rank = state.n
    if reference is None or reference is own:
        matrix, rank = matrix - torch.outer(s, s), state.n - 1
    else:
        _check_same(own, reference, "centre rows")
        m = reference.vector().to(s.device)
        matrix = matrix - torch.outer(s, m) - torch.outer(m, s) + torch.outer(m, m)
    # The matrix is made of float32 products: where so little is left of its trace, that is rounding.
    if float(matrix.trace()) <= EQUAL or rank == 0:
        return None
    eigenvalues = torch.linalg.eigvalsh(matrix).cpu().flip(0).clamp_min_(0)
    eigenvalues[rank:] = 0
    return max(0.0, renyi_entropy(eigenvalues / eigenvalues.sum(), 1.0))


@reads
def check_own(state: SecondMoment, own: RowMean) -> None:
    """GvendiError unless the mean can be that of the state's rows."""
    if (own.dim, own.n) != (state.dim, state.n):
        raise GvendiError(
            f"the mean is of {own.n} rows of width {own.dim}, the state of {state.n} of width {state.dim}; give the "
            "mean of exactly the rows that the state was made from"
        )
    s = own.vector().to(state.matrix.device)
    length = own.squared_norm
    # Sigma - s s^T has no negative direction.
    if float(s @ state.matrix @ s) / state.n < length**2 * (1 - 1e-4):
        raise GvendiError("the mean is not that of the state's rows; give one made from exactly these rows")


def _blocks(rows: Rows | Iterable[Rows], mean: RowMean, first: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """(rows read, centred rows of them that have a direction), block by block; the first row has this number."""
    m, seen = mean.vector(), first
    for matrix in [rows] if isinstance(rows, torch.Tensor | np.ndarray) else rows:
        check_matrix(matrix, mean.dim)
        kind = torch.float64 if is_double(matrix) else torch.float32
        for i in range(0, len(matrix), BLOCK):
            block = matrix[i : i + BLOCK]
            out, some = torch.empty(block.shape, dtype=kind), torch.empty(len(block), dtype=torch.bool)
            for strip in strips(block):
                unit = unit_rows(block[strip], first=seen + i + strip.start)
                out[strip], some[strip] = centre_rows(unit, m)
            yield len(block), out if bool(some.all()) else out[some]
        seen += len(matrix)


def _why_not(rows: int) -> str:
    if rows == 0:
        return "there are no rows"
    if rows == 1:
        return "the only row equals the mean, so nothing is left of it without that"
    return f"all {rows:,} rows equal the mean, so nothing is left of them without it"


def _check_same(one: RowMean, other: RowMean, what: str) -> None:
    if one.dim != other.dim:
        raise GvendiError(
            f"cannot {what} of dim {one.dim} and {other.dim}; sketch all data sets with one dim"
        )
    if not same_spec(one.spec, other.spec):
        raise GvendiError(
            f"cannot {what} of different specs; sketch all data sets with one spec\n"
            f"  this:  {one.spec}\n  other: {other.spec}"
        )
