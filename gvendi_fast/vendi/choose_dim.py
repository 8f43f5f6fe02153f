"""Which K a corpus needs, from a block of its rows sketched at a large one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_rows
from gvendi_fast.vendi.degrees_of_freedom import DegreesOfFreedom
from gvendi_fast.vendi.unlimited_k import NOTABLE

DIMS = (512, 1024, 2048, 4096, 8192)
# Rows whose Gram matrix has an eigenvalue below this share of the trace repeat others, up to rounding of float32.
_REPEATED = 1e-7


@dataclass(frozen=True)
class ChosenDim:
    """The smallest K of `DIMS` at which a corpus' bias is predicted below `NOTABLE`, or the largest of them.

    dim: K.
    bias: the predicted plain / unlimited - 1 of all rows at this K.
    low, high: the bounds of what the block does not show of it.
    smaller: K and bias of the next smaller one, None at the smallest.
    rows: of the corpus.
    block: how many of them were sketched for this, at K = `DIMS[-1]`.
    """

    dim: int
    bias: float
    low: float
    high: float
    smaller: tuple[int, float] | None
    rows: int
    block: int

    @property
    def sentence(self) -> str:
        """What was chosen and why, in one line."""
        met = abs(self.bias) < NOTABLE
        smallest = f"the smallest of {DIMS[0]} and above with a bias below {100 * NOTABLE:.0f} %"
        why = smallest if met else "the largest there is"
        text = f"K = {self.dim}, {why}: G-Vendi of {_rows(self.rows)} has a predicted bias of {_percent(self.bias)}"
        if self.high - self.low > 0.001:
            text += f" (between {_percent(self.low)} and {_percent(self.high)})"
        if self.smaller:
            text += f", at K = {self.smaller[0]} of {_percent(self.smaller[1])}"
        return f"{text}; from {_rows(self.block)} at K = {DIMS[-1]}"


def choose_dim(sketches: Rows, rows: int) -> ChosenDim:
    """The K for a corpus of `rows` rows from the sketches [m, DIMS[-1]] of m of them, spread over it; m <= rows.

    Deduced for all rows as degrees_of_freedom.py says, by the estimate; rows that repeat others within the block count
    as that share of the corpus. Raises GvendiError for sketches that are none or too many.
    """
    check_matrix(sketches, DIMS[-1])
    block = len(sketches)
    if not 1 <= block <= rows or block >= DIMS[-1]:
        allowed = min(rows, DIMS[-1] - 1)
        raise GvendiError(f"sketches has {block} rows; wanted from 1 to {allowed} of the corpus' {rows}")
    unit = unit_rows(sketches)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T / block).flip(0)
    distinct = int((spectrum > _REPEATED).sum())
    rank = max(distinct, round(rows * distinct / block))
    spectrum = spectrum[:distinct] / spectrum[:distinct].sum()
    degrees = DegreesOfFreedom(spectrum, DIMS[-1], rank, distinct if rank > distinct else None)
    biases = {dim: math.expm1(-degrees.lost(dim)) for dim in DIMS}
    dim = next((dim for dim in DIMS if abs(biases[dim]) < NOTABLE), DIMS[-1])
    least, most = degrees.lost_bounds(dim)
    smaller = (dim // 2, biases[dim // 2]) if dim > DIMS[0] else None
    return ChosenDim(dim, biases[dim], math.expm1(-most), math.expm1(-least), smaller, rows, block)


def _percent(share: float) -> str:
    """-0.031 as "-3.1 %", what would be zero as "0.0 %"."""
    return f"{100 * share + 0.0:.1f} %" if abs(share) >= 0.0005 else "0.0 %"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
