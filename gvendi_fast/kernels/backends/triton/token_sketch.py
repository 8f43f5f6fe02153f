"""out [B, K] += K^-1/2 sum_t (H S_V onehot(id_t)) * (H S e_t); ids [T], e [T, d].

Column c of H times H y is H (y with its index XOR c), and H is linear: with c_t, s_t the bucket and sign of id_t,
u[k] = sum_t s_t (S e_t)[k ^ c_t] adds up in one row of partial [chunks, K], and one transform per sample follows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton import tables
from gvendi_fast.kernels.backends.triton.fold_hadamard import fold_hadamard
from gvendi_fast.kernels.backends.triton.hadamard import tile
from gvendi_fast.kernels.backends.triton.reduce_chunks import reduce_chunks
from gvendi_fast.kernels.backends.triton.runtime import chunks_of, on_device_of, workspace
from gvendi_fast.kernels.sketch_matrix import Table


@triton.jit(
    do_not_specialize=["vocabulary", "stride", "blocks"],
    do_not_specialize_on_alignment=["ids", "id_table", "e", "table"],
)
def token_sketch_kernel(
    ids,
    id_table,
    vocabulary,
    e,
    stride,
    table,
    blocks,
    spans,
    partial,
    K: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 2 * chunk), tl.load(spans + 2 * chunk + 1)
    k = tl.arange(0, K)
    total = tl.zeros([K], dtype=tl.float32)
    while begin < end:
        token = tl.load(ids + begin)
        known = (token >= 0) & (token < vocabulary)
        hashed = tl.load(id_table + token, mask=known, other=0).to(tl.int32)
        # An id outside the vocabulary must not be taken for another one: its sample becomes NaN.
        sign = tl.where(known, (1 - 2 * (hashed & 1)).to(tl.float32), float("nan"))
        source = k ^ (hashed >> 1)
        row = e + begin * stride
        block = 0
        while block < blocks:
            entry = tl.load(table + block * K + source)
            value = tl.load(row + block * K + (entry & 0xFFFF)).to(tl.float32)
            total = tl.fma(value, sign * (entry & -65536).to(tl.float32, bitcast=True), total)
            block += 1
        begin += 1
    tl.store(partial + chunk * K + k, total)


def token_sketch(
    ids: torch.Tensor,
    e: torch.Tensor,
    segments: torch.Tensor,
    id_table: Table,
    e_table: Table,
    out: torch.Tensor,
) -> None:
    chunks, K = chunks_of(segments, out.device), out.shape[1]
    if len(chunks) == 0:
        return
    packed = tables.folding(e_table, e.device)
    partial, total = workspace(len(chunks), K, out), workspace(len(out), K, out)
    with on_device_of(e):
        token_sketch_kernel[(len(chunks),)](
            ids,
            tables.scattered(id_table, e.device),
            id_table.width,
            e,
            e.stride(0),
            packed,
            len(packed),
            chunks.spans,
            partial,
            K=K,
            num_warps=tile(K).warps,
        )
    reduce_chunks(partial, chunks, total)
    fold_hadamard(total, None, out, 1 / math.sqrt(K))
