"""Sketches as rows of length 1: checked, in float64, whole or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError

# Rows that are scaled and multiplied at once.
BLOCK = 1024
# Numbers that are scaled at once where float32 is wanted: in float64 they stay in the cache.
_STRIP = 1 << 16
Rows = torch.Tensor | np.ndarray


def check_matrix(rows: Rows, dim: int | None = None) -> None:
    """GvendiError unless rows is a matrix [N, dim] (any width without dim) of a float dtype."""
    if not isinstance(rows, torch.Tensor | np.ndarray):
        raise GvendiError(f"rows is a {type(rows).__name__}; wanted a torch tensor or a numpy array [N, K]")
    if isinstance(rows, torch.Tensor) and (
        rows.is_nested or rows.layout is not torch.strided or rows.is_meta
    ):
        kind = "nested" if rows.is_nested else "on the meta device" if rows.is_meta else f"{rows.layout}"
        raise GvendiError(
            f"rows is {kind}; wanted a dense tensor [N, K] with values, such as rows.to_dense()"
        )
    if rows.ndim != 2 or rows.shape[1] != (dim or rows.shape[1]) or rows.shape[1] == 0:
        raise GvendiError(f"rows has shape {tuple(rows.shape)}; wanted [N, {dim or 'K'}], one sketch a row")
    floating = (
        np.issubdtype(rows.dtype, np.floating) if isinstance(rows, np.ndarray) else rows.is_floating_point()
    )
    if not floating:
        raise GvendiError(f"rows has dtype {rows.dtype}; wanted a float dtype, such as float32")


def is_double(rows: Rows) -> bool:
    """Whether products of these rows are to be float64; sketches are stored in float32."""
    return rows.dtype.itemsize >= 8


def has_direction(norm):
    """Whether rows of these norms (a number, or a tensor or array of them) are neither zero nor infinite nor NaN."""
    return (norm > 0) & (norm < math.inf)


def no_direction(row: int, norm: float) -> GvendiError:
    """The error for a sketch that cannot be scaled to length 1; `row` is its number."""
    return GvendiError(
        f"row {row} of rows has norm {norm}; wanted finite and not zero: leave this sample out and report it"
    )


def refused_gradient(norm: float) -> str:
    """The reason for rejecting a row whose sketch has this norm."""
    return "zero gradient" if norm == 0 else "non-finite gradient"


def unit_rows(rows: Rows, device: str | torch.device = "cpu", first: int = 0) -> torch.Tensor:
    """Sketches scaled to length 1: float64 [N, K] on `device`. Errors count rows from `first`."""
    # The copy also makes read-only, reversed and big-endian arrays, which torch refuses, readable.
    x = torch.from_numpy(np.array(rows, dtype=np.float64)) if isinstance(rows, np.ndarray) else rows.detach()
    x = x.to(device, torch.float64)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    bad = ~has_direction(norm)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        raise no_direction(first + i, float(norm[i]))
    return (x / norm).contiguous()


def strips(rows: Rows) -> Iterator[slice]:
    """Slices of rows [N, K] that stay in the cache in float64."""
    step = max(_STRIP // rows.shape[1], 1)
    return (slice(first, first + step) for first in range(0, len(rows), step))


def unit_floats(rows: Rows, device: str | torch.device = "cpu", first: int = 0) -> torch.Tensor:
    """`unit_rows` in float32, to the bit; on a CPU in a fifth of the time, as float64 stays in the cache."""
    if torch.device(device).type != "cpu":
        return unit_rows(rows, device, first).float()
    out = torch.empty(rows.shape, dtype=torch.float32, device=device)
    for strip in strips(rows):
        out[strip] = unit_rows(rows[strip], device, first + strip.start)
    return out


def unit_blocks(
    rows: Rows | Iterable[Rows], dim: int, device: str | torch.device = "cpu", first: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first sketch, sketches of length 1) for blocks of a matrix or of a stream of matrices.

    They are float64 where the matrix is, else float32, in which sketches are stored. first: index of the first of all.
    """
    if not isinstance(rows, Iterable):
        raise GvendiError(f"rows is {rows!r}; wanted a matrix [N, {dim}] or blocks of one")
    seen = first
    for matrix in [rows] if isinstance(rows, torch.Tensor | np.ndarray) else rows:
        check_matrix(matrix, dim)
        for i in range(0, len(matrix), BLOCK):
            scaled = unit_rows if is_double(matrix) else unit_floats
            yield seen + i, scaled(matrix[i : i + BLOCK], device, seen + i)
        seen += len(matrix)


def cosine_blocks(rows: torch.Tensor, pool: torch.Tensor, block: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row of the pool in a block, cosines [m, block]) of sketches [m, K] with a pool [N, K], all of length 1.

    Block by block, so that no [m, N] matrix is made.
    """
    for first in range(0, len(pool), block):
        yield first, rows @ pool[first : first + block].T
