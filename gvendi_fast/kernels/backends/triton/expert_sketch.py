"""out [B, K] += K^-1/2 sum_r (H S_i^x a_r) * (H S_o^x e_r), x the expert of row r; a [R, I], e [R, O].

One program per chunk, which is of one sample and one expert (routing.py), so that the rows of a step share the entries
of a table as those of a linear layer do. Without a, of stacked biases, the folds of all rows add up before one
transform a sample.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton import tables
from gvendi_fast.kernels.backends.triton.fold_hadamard import fold_hadamard, fold_listed_rows
from gvendi_fast.kernels.backends.triton.hadamard import hadamard, linear_tile
from gvendi_fast.kernels.backends.triton.reduce_chunks import reduce_chunks
from gvendi_fast.kernels.backends.triton.routing import routing_of
from gvendi_fast.kernels.backends.triton.runtime import on_device_of, workspace
from gvendi_fast.kernels.sketch_matrix import ExpertTables

_SIZES = ["stride_a", "blocks_a", "stride_e", "blocks_e", "experts"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["a", "table_a", "e", "table_e"])
def expert_sketch_kernel(
    a, stride_a, table_a, blocks_a,
    e, stride_e, table_e, blocks_e,
    order, spans, partial, experts, BLOCK_T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 3 * chunk), tl.load(spans + 3 * chunk + 1)
    expert = tl.load(spans + 3 * chunk + 2)
    total = tl.zeros([K], dtype=tl.float32)
    if expert == experts:
        # A row must not be taken for another expert's or sample's: its sample becomes NaN.
        total += float("nan")
        end = begin
    table_e += expert * blocks_e * K
    if a is not None:
        table_a += expert * blocks_a * K
    while begin < end:
        product = fold_listed_rows(e, stride_e, order, begin, end, table_e, blocks_e, BLOCK_T, K)
        if a is not None:
            left = fold_listed_rows(a, stride_a, order, begin, end, table_a, blocks_a, BLOCK_T, K)
            product = hadamard(left, BLOCK_T, K) * hadamard(product, BLOCK_T, K)
        live = begin + tl.arange(0, BLOCK_T) < end
        total += tl.sum(tl.where(live[:, None], product, 0.0), axis=0)
        begin += BLOCK_T
    tl.store(partial + chunk * K + tl.arange(0, K), total)


def expert_sketch(
    a: torch.Tensor | None,
    e: torch.Tensor,
    experts: torch.Tensor,
    samples: torch.Tensor,
    a_tables: ExpertTables | None,
    e_tables: ExpertTables,
    out: torch.Tensor,
) -> None:
    batch, K = out.shape
    if len(e) == 0 or batch == 0:
        return
    routing = routing_of(experts, samples, e_tables.experts, batch)
    partial, shape = workspace(len(routing.chunks), K, out), linear_tile(K)
    with on_device_of(e):
        expert_sketch_kernel[(len(routing.chunks),)](
            *_side(a, a_tables),
            *_side(e, e_tables),
            routing.order,
            routing.chunks.spans,
            partial,
            e_tables.experts,
            BLOCK_T=shape.rows,
            K=K,
            num_warps=shape.warps,
        )
    if a is not None:
        reduce_chunks(partial, routing.chunks, out, 1 / math.sqrt(K))
        return
    total = workspace(batch, K, out)
    reduce_chunks(partial, routing.chunks, total)
    fold_hadamard(total, None, out, 1 / math.sqrt(K))


def _side(
    x: torch.Tensor | None, stacked: ExpertTables | None
) -> tuple[torch.Tensor | None, int, torch.Tensor | None, int]:
    if x is None or stacked is None:
        return None, 0, None, 0
    packed = tables.listing(stacked, x.device)
    return x, x.stride(0), packed, packed.shape[1]
