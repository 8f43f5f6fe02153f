"""out [T, K] = H S x, x [T, d]; or out += scale * H S x. Without a table x [T, K] is S x already.

S x is collected bin by bin: (S x)[k] = sum over blocks of sign * x[block * K + i], i and sign packed in the table. The
sign is +1, -1, or 0 for a bin that gets nothing from a block: one multiply-add an element, which rounds as an addition,
and no mask. A bin without a coordinate reads the block's first one, so that where that is not finite such bins become
NaN; the transform makes every output of such a row infinite or NaN in any case.

A program works on up to MAX_ROWS rows at once, which share the table's entries. Neighbouring threads take neighbouring
bins, so that they read one run of 16; each row is loaded on its own, since of two axes without contiguous addresses
Triton may put either first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton import tables
from gvendi_fast.kernels.backends.triton.hadamard import TILES, hadamard, tile
from gvendi_fast.kernels.backends.triton.runtime import on_device_of
from gvendi_fast.kernels.sketch_matrix import Table

MAX_ROWS = 4
assert {shape.rows for shape in TILES.values()} <= {1, 2, MAX_ROWS}


@triton.jit
def load_rows(first, second, third, fourth, at, T: tl.constexpr, K: tl.constexpr):
    """Columns `at` [K] of the first T of four rows, as they are, [K, T]; each row is given by where it begins."""
    value = tl.load(first + at)
    if T == 1:
        value = tl.reshape(value, [K, 1])
    else:
        second = tl.load(second + at)
        if T == 2:
            value = tl.join(value, second)
        else:
            third = tl.load(third + at)
            fourth = tl.load(fourth + at)
            value = tl.reshape(tl.join(tl.join(value, third), tl.join(second, fourth)), [K, 4])
    return value


@triton.jit
def add_signed(folded, value, entry, T: tl.constexpr, K: tl.constexpr):
    sign = (entry & -65536).to(tl.float32, bitcast=True)[:, None]
    return tl.fma(value.to(tl.float32), tl.broadcast_to(sign, [K, T]), folded)


@triton.jit
def fold_rows(x, stride, begin, end, table, blocks, T: tl.constexpr, K: tl.constexpr):
    """S x of T rows as float32 [T, K]: rows begin .. end - 1, and the last of them again where there are fewer."""
    first = x + begin * stride
    second = x + tl.minimum(begin + 1, end - 1) * stride
    third = x + tl.minimum(begin + 2, end - 1) * stride
    fourth = x + tl.minimum(begin + 3, end - 1) * stride
    return fold_four(first, second, third, fourth, table, blocks, K, T, K)


@triton.jit
def fold_listed_rows(x, stride, order, begin, end, table, blocks, T: tl.constexpr, K: tl.constexpr):
    """The same of rows order[begin] .. order[end - 1], by a table that lists coordinates (`tables.listing`)."""
    first = x + tl.load(order + begin) * stride
    second, third, fourth = first, first, first
    if T > 1:
        second = x + tl.load(order + tl.minimum(begin + 1, end - 1)) * stride
    if T > 2:
        third = x + tl.load(order + tl.minimum(begin + 2, end - 1)) * stride
        fourth = x + tl.load(order + tl.minimum(begin + 3, end - 1)) * stride
    return fold_four(first, second, third, fourth, table, blocks, 0, T, K)


@triton.jit
def fold_four(
    first, second, third, fourth, table, blocks, STEP: tl.constexpr, T: tl.constexpr, K: tl.constexpr
):
    """S x of the first T of four rows as float32 [T, K]; each row is given by where it begins.

    STEP: coordinates from one block's first to the next one's: K, or 0 where a table's entries count from the row's.
    """
    k = tl.arange(0, K)
    if table is None:
        folded = load_rows(first, second, third, fourth, k, T, K).to(tl.float32)
    else:
        folded = tl.zeros([K, T], dtype=tl.float32)
        entry = tl.load(table + k)
        value = load_rows(first, second, third, fourth, entry & 0xFFFF, T, K)
        block = 1
        while block < blocks:
            # A block is on its way while the one before is added. Launches alone took 0.8 times as long on an H200 over
            # the layers of a 0.5B model; among the model's other kernels the gain was not seen (39.8 and 39.0 ms).
            following = tl.load(table + block * K + k)
            at = block * STEP + (following & 0xFFFF)
            coming = load_rows(first, second, third, fourth, at, T, K)
            folded = add_signed(folded, value, entry, T, K)
            entry, value = following, coming
            block += 1
        folded = add_signed(folded, value, entry, T, K)
    return tl.trans(folded)


@triton.jit(
    do_not_specialize=["stride", "blocks", "count", "scale"], do_not_specialize_on_alignment=["x", "table"]
)
def fold_hadamard_kernel(
    x, stride, table, blocks, out, count, scale, ADD: tl.constexpr, BLOCK_T: tl.constexpr, K: tl.constexpr
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK_T
    y = hadamard(fold_rows(x, stride, begin, count, table, blocks, BLOCK_T, K), BLOCK_T, K)
    rows = begin + tl.arange(0, BLOCK_T)
    live = rows < count
    to = out + rows[:, None] * K + tl.arange(0, K)[None, :]
    if ADD:
        y = tl.load(to, mask=live[:, None], other=0.0) + scale * y
    tl.store(to, y, mask=live[:, None])


def fold_hadamard(
    x: torch.Tensor, table: Table | None, out: torch.Tensor, scale: float | None = None
) -> None:
    """out = H S x, or, with a scale, out += scale * H S x; x is S x already without a table."""
    count, K = out.shape
    if count == 0:
        return
    packed = None if table is None else tables.folding(table, x.device)
    blocks = 0 if packed is None else len(packed)
    shape = tile(K)
    with on_device_of(x):
        fold_hadamard_kernel[(triton.cdiv(count, shape.rows),)](
            x,
            x.stride(0),
            packed,
            blocks,
            out,
            count,
            scale or 0.0,
            ADD=scale is not None,
            BLOCK_T=shape.rows,
            K=K,
            num_warps=shape.warps,
        )
