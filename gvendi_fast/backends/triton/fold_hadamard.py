"""out [T, K] = H S x, x [T, d]; or out += scale * H S x. Without a table x [T, K] is S x already.

S x is collected bin by bin: (S x)[k] = sum over blocks of sign * x[block * K + i], i and sign packed in the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.backends.triton import tables
from gvendi_fast.backends.triton.hadamard import hadamard, tile
from gvendi_fast.backends.triton.runtime import Build, on_device_of
from gvendi_fast.plan import Table


@triton.jit
def fold_rows(x, stride, rows, live, table, blocks, T: tl.constexpr, K: tl.constexpr):
    """S x of `rows` [T] as float32 [T, K]; rows that are not live are zero."""
    k = tl.arange(0, K)
    row = x + (rows * stride)[:, None]
    if table is None:
        folded = tl.load(row + k[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    else:
        folded = tl.zeros([T, K], dtype=tl.float32)
        block = 0
        while block < blocks:
            packed = tl.load(table + block * K + k).to(tl.int32)
            mask = live[:, None] & (packed >= 0)[None, :]
            value = tl.load(row + (block * K + (packed >> 1))[None, :], mask=mask, other=0.0).to(tl.float32)
            folded += tl.where((packed & 1)[None, :] == 1, -value, value)
            block += 1
    return folded


@triton.jit(do_not_specialize=["stride", "blocks", "count", "scale"])
def fold_hadamard_kernel(
    x, stride, table, blocks, out, count, scale, ADD: tl.constexpr, BLOCK_T: tl.constexpr, K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < count
    y = hadamard(fold_rows(x, stride, rows, live, table, blocks, BLOCK_T, K), BLOCK_T, K)
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
    packed = None if table is None else tables.gathered(table, x.device)
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


def builds(K: int, dtype: str) -> list[Build]:
    """What `fold_hadamard` compiles for inputs of a dtype ("fp32", "bf16", "fp16")."""
    shape = tile(K)
    types = {"x": f"*{dtype}", "stride": "i32", "table": "*i16", "blocks": "i32"}
    types |= {"out": "*fp32", "count": "i32", "scale": "fp32"}
    sums = {name: kind for name, kind in types.items() if name != "table"} | {"x": "*fp32"}
    sizes = {"BLOCK_T": shape.rows, "K": K}
    kernel, warps = fold_hadamard_kernel, shape.warps
    return [
        Build(f"fold_hadamard-{dtype}-{K}", kernel, warps, types, {"ADD": False, **sizes}),
        Build(f"fold_hadamard-sums-{K}", kernel, warps, sums, {"table": None, "ADD": True, **sizes}),
    ]
