"""out [B, K] += K^-1/2 H S v_b, v_b = sum_t e_t (bias) or sum_t e_t * x_hat_t (norm weight); x, e [T, d].

rms: x_hat = x / sqrt(mean(x^2) + eps); layer: x_hat = (x - mean) / sqrt(var + eps) in two passes, since
mean(x^2) - mean^2 loses all digits where the mean is large. One program per chunk writes a row of partial [chunks, d];
the chunks of a sample add up, then one fold and one transform per sample.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.fold_hadamard import fold_hadamard
from gvendi_fast.kernels.backends.triton.reduce_chunks import reduce_chunks
from gvendi_fast.kernels.backends.triton.runtime import (
    CHUNK_ROWS,
    chunks_of,
    on_device_of,
    workspace,
)
from gvendi_fast.kernels.sketch_matrix import Table

# All rows of a chunk at once: the rows stay in L1 between the passes. Lanes go along a row and warps across rows, so
# that a thread makes the mean and the root of half of them only. 128 columns at once took 0.77 times as long on an H200
# as 32, which leave too few loads under way.
BLOCK_D = 128
WARPS = 2
assert CHUNK_ROWS & (CHUNK_ROWS - 1) == 0


@triton.jit
def load_tile(row, live, column, width):
    """float32 [rows, columns]; zero outside."""
    return tl.load(row + column[None, :], mask=live[:, None] & (column < width)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit(
    do_not_specialize=["stride_x", "stride_e", "width", "eps"], do_not_specialize_on_alignment=["x", "e"]
)
def vector_sketch_kernel(
    x, stride_x, e, stride_e, spans, partial, width, eps,
    NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    rows = begin + tl.arange(0, ROWS)
    live = rows < end
    e_row = e + (rows * stride_e)[:, None]
    mean = tl.zeros([ROWS], dtype=tl.float32)
    scale = tl.full([ROWS], 1.0, dtype=tl.float32)
    if NORM is not None:
        x_row = x + (rows * stride_x)[:, None]
        lanes = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        if NORM == "layer":
            start = 0
            while start < width:
                lanes += load_tile(x_row, live, start + tl.arange(0, BLOCK_D), width)
                start += BLOCK_D
            mean = tl.div_rn(tl.sum(lanes, axis=1), width.to(tl.float32))
            lanes = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        start = 0
        while start < width:
            column = start + tl.arange(0, BLOCK_D)
            centred = load_tile(x_row, live, column, width) - mean[:, None]
            lanes += tl.where((column < width)[None, :], centred * centred, 0.0)
            start += BLOCK_D
        variance = tl.div_rn(tl.sum(lanes, axis=1), width.to(tl.float32))
        # A row past the end has variance 0, and eps may be 0.
        scale = tl.div_rn(scale, tl.sqrt_rn(tl.where(live, variance + eps, 1.0)))
    start = 0
    while start < width:
        column = start + tl.arange(0, BLOCK_D)
        term = load_tile(e_row, live, column, width)
        if NORM is not None:
            term *= (load_tile(x_row, live, column, width) - mean[:, None]) * scale[:, None]
        tl.store(partial + chunk * width + column, tl.sum(term, axis=0), mask=column < width)
        start += BLOCK_D


def vector_sketch(
    x: torch.Tensor | None,
    e: torch.Tensor,
    segments: torch.Tensor,
    table: Table,
    out: torch.Tensor,
    norm: str | None,
    eps: float,
) -> None:
    chunks, width = chunks_of(segments, out.device), table.width
    if len(chunks) == 0:
        return
    partial, total = workspace(len(chunks), width, out), workspace(len(out), width, out)
    with on_device_of(e):
        vector_sketch_kernel[(len(chunks),)](
            x,
            0 if x is None else x.stride(0),
            e,
            e.stride(0),
            chunks.spans,
            partial,
            width,
            eps,
            NORM=norm,
            ROWS=CHUNK_ROWS,
            BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )
    reduce_chunks(partial, chunks, total)
    fold_hadamard(total, table, out, 1 / math.sqrt(out.shape[1]))
