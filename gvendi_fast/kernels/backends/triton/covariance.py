"""out float64 [K, K] += sum_n z_n z_n^T, z_n = x_n / ||x_n||, x [N, K].

One kernel writes unit rows z float32 [N, K], with the norm in float64. The other owns one tile of the upper triangle
per program: products and sums over SUM_ROWS rows are float32, each such sum is added to the float64 tile. Products
are not rounded to TF32: against exact sums a float32 sum of n products errs by at most n 2^-24 of the sum of their
sizes, and the rows' own rounding adds 2^-23. Off the diagonal the tile is written twice, so out stays symmetric bit for
bit. No atomics, one order of rows: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.runtime import on_device_of, workspace

# Rows that are normalised at once: 64 MiB of unit rows at K = 1024.
STRIP_ROWS = 16384
SUM_ROWS, BLOCK_N, WARPS = 256, 32, 8
# Unit rows: rows and columns of a tile.
UNIT_ROWS, UNIT_COLUMNS, UNIT_WARPS = 4, 256, 4
# Columns of a tile: wide from this K on; below it, narrow tiles keep more of the GPU busy.
WIDE_DIM, WIDE, NARROW = 512, 64, 32
assert STRIP_ROWS % SUM_ROWS == 0
assert SUM_ROWS % BLOCK_N == 0


@triton.jit(do_not_specialize=["N"])
def unit_rows_kernel(x, stride, z, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    for begin in range(0, K, BLOCK_K):
        column = begin + tl.arange(0, BLOCK_K)
        mask = live[:, None] & (column < K)[None, :]
        value = tl.load(x + (rows * stride)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float64)
        squares += value * value
    inverse = 1.0 / tl.sqrt(tl.where(live, tl.sum(squares, axis=1), 1.0))
    for begin in range(0, K, BLOCK_K):
        column = begin + tl.arange(0, BLOCK_K)
        mask = live[:, None] & (column < K)[None, :]
        value = tl.load(x + (rows * stride)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float64)
        unit = (value * inverse[:, None]).to(tl.float32)
        tl.store(z + rows[:, None] * K + column[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["N"])
def covariance_kernel(z, out, N, K, SUM_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    if tl.program_id(0) <= tl.program_id(1):
        i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = out + i[:, None].to(tl.int64) * K + j[None, :]
        inside = (i < K)[:, None] & (j < K)[None, :]
        total = tl.load(tile, mask=inside, other=0.0)
        for begin in range(0, N, SUM_ROWS):
            partial = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
            for step in range(0, SUM_ROWS, BLOCK_N):
                row = (begin + step + tl.arange(0, BLOCK_N)).to(tl.int64)
                left = tl.load(
                    z + row[None, :] * K + i[:, None], mask=(row < N)[None, :] & (i < K)[:, None], other=0.0
                )
                right = tl.load(
                    z + row[:, None] * K + j[None, :], mask=(row < N)[:, None] & (j < K)[None, :], other=0.0
                )
                partial = tl.dot(left, right, partial, input_precision="ieee")
            total += partial.to(tl.float64)
        tl.store(tile, total, mask=inside)
        if tl.program_id(0) < tl.program_id(1):
            mirrored = out + j[:, None].to(tl.int64) * K + i[None, :]
            tl.store(mirrored, tl.trans(total), mask=(j < K)[:, None] & (i < K)[None, :])


def covariance(rows: torch.Tensor, out: torch.Tensor) -> None:
    K = out.shape[1]
    block = tile(K)
    tiles = triton.cdiv(K, block)
    for strip in rows.split(STRIP_ROWS):
        if len(strip) == 0:
            continue
        z = unit_rows(strip)
        with on_device_of(rows):
            covariance_kernel[(tiles, tiles)](
                z, out, len(strip), K, SUM_ROWS=SUM_ROWS, BLOCK_N=BLOCK_N, BLOCK_K=block, num_warps=WARPS
            )


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Sketches [N, K] scaled to length 1, float32 [N, K]; one of zeros becomes NaN."""
    N, K = rows.shape
    z = workspace(N, K, rows)
    with on_device_of(rows):
        unit_rows_kernel[(triton.cdiv(N, UNIT_ROWS),)](
            rows, rows.stride(0), z, N, K, BLOCK_N=UNIT_ROWS, BLOCK_K=UNIT_COLUMNS, num_warps=UNIT_WARPS
        )
    return z


def tile(K: int) -> int:
    """Columns of a tile."""
    return NARROW if K < WIDE_DIM else WIDE
