"""out [B, K] += K^-1/2 sum_t (H S_i a_t) * (H sum_p S_p e_p,t) over each sample's rows; a [T, I], e_p [T, O_p].

One program per chunk: both folds, both transforms, the product and the sum over the chunk's rows, which ends as one
row of partial [chunks, K]. A weight gradient, or H S x of all rows, is never stored. `a` without a table is H S a;
a part without one is S e. Parts past PARTS add to out in a further launch: z is linear in the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton import tables
from gvendi_fast.kernels.backends.triton.fold_hadamard import fold_rows
from gvendi_fast.kernels.backends.triton.hadamard import hadamard, linear_tile
from gvendi_fast.kernels.backends.triton.reduce_chunks import reduce_chunks
from gvendi_fast.kernels.backends.triton.runtime import (
    Chunks,
    chunks_of,
    on_device_of,
    workspace,
)
from gvendi_fast.kernels.sketch_matrix import Table

# Layers that share one input and so one launch: q, k, v, or gate and up.
PARTS = 4
_SIDES = ("_a", *range(PARTS))
_SIZES = [f"{size}{side}" for side in _SIDES for size in ("stride", "blocks")]
_ROWS = ["a", *(f"e{part}" for part in range(PARTS)), *(f"table{side}" for side in _SIDES)]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ROWS)
def linear_sketch_kernel(
    a, stride_a, table_a, blocks_a,
    e0, stride0, table0, blocks0,
    e1, stride1, table1, blocks1,
    e2, stride2, table2, blocks2,
    e3, stride3, table3, blocks3,
    spans, partial, BLOCK_T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    total = tl.zeros([K], dtype=tl.float32)
    while begin < end:
        left = fold_rows(a, stride_a, begin, end, table_a, blocks_a, BLOCK_T, K)
        if table_a is not None:
            left = hadamard(left, BLOCK_T, K)
        right = fold_rows(e0, stride0, begin, end, table0, blocks0, BLOCK_T, K)
        if e1 is not None:
            right += fold_rows(e1, stride1, begin, end, table1, blocks1, BLOCK_T, K)
        if e2 is not None:
            right += fold_rows(e2, stride2, begin, end, table2, blocks2, BLOCK_T, K)
        if e3 is not None:
            right += fold_rows(e3, stride3, begin, end, table3, blocks3, BLOCK_T, K)
        live = begin + tl.arange(0, BLOCK_T) < end
        product = left * hadamard(right, BLOCK_T, K)
        total += tl.sum(tl.where(live[:, None], product, 0.0), axis=0)
        begin += BLOCK_T
    tl.store(partial + chunk * K + tl.arange(0, K), total)


def linear_sketch(
    a: torch.Tensor,
    a_table: Table | None,
    parts: Sequence[tuple[torch.Tensor, Table | None]],
    segments: torch.Tensor,
    out: torch.Tensor,
) -> None:
    chunks = chunks_of(segments, out.device)
    if len(chunks) == 0:
        return
    partial = workspace(len(chunks), out.shape[1], out)
    for start in range(0, len(parts), PARTS):
        _launch(a, a_table, parts[start : start + PARTS], chunks, partial)
        reduce_chunks(partial, chunks, out, 1 / math.sqrt(out.shape[1]))


def _launch(a, a_table, parts, chunks: Chunks, partial: torch.Tensor) -> None:
    K = partial.shape[1]
    shape = linear_tile(K)
    sides = [_side(a, a_table), *(_side(e, table) for e, table in parts)]
    sides += [(None, 0, None, 0)] * (1 + PARTS - len(sides))
    with on_device_of(a):
        linear_sketch_kernel[(len(chunks),)](
            *(argument for side in sides for argument in side),
            chunks.spans,
            partial,
            BLOCK_T=shape.rows,
            K=K,
            num_warps=shape.warps,
        )


def _side(x: torch.Tensor, table: Table | None) -> tuple[torch.Tensor, int, torch.Tensor | None, int]:
    if table is None:
        return x, x.stride(0), None, 0
    packed = tables.folding(table, x.device)
    return x, x.stride(0), packed, len(packed)
