"""out [T, K] = H S x, x [T, d]; or out += scale * H S x. Without a table x [T, K] is S x already.

S x is collected bin by bin: (S x)[k] = sum over blocks of sign * x[block * K + i], i and sign packed in the table. The
sign is +1, -1, or 0 for a bin that gets nothing from a block: one multiply-add an element, which rounds as an addition,
and no mask. A bin without a coordinate reads the block's first one, so that where that is not finite such bins become
NaN; the transform makes every output of such a row infinite or NaN in any case.

Bins stand on the first axis: of axes without contiguous addresses Triton lays neighbouring threads along the first, and
neighbouring bins read one run of 16. Rows on the second share the table's entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.backends.triton import tables
from gvendi_fast.backends.triton.hadamard import hadamard, lanes, tile
from gvendi_fast.backends.triton.runtime import Build, on_device_of
from gvendi_fast.plan import Table

_GROUP = tl.constexpr(tables.GROUP)


@triton.jit
def fold_rows(x, stride, rows, table, blocks, T: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr):
    """S x of `rows` [T], all of which exist, as float32 [T, K]."""
    offset = (rows * stride)[None, :]
    if table is None:
        folded = tl.load(x + offset + tl.arange(0, K)[:, None]).to(tl.float32)
    else:
        GROUP: tl.constexpr = _GROUP if K // LANES > _GROUP else K // LANES
        lane, step = tl.arange(0, LANES)[:, None, None], tl.arange(0, K // LANES // GROUP)[None, :, None]
        at = (step * LANES + lane) * GROUP + tl.arange(0, GROUP)[None, None, :]
        folded = tl.zeros([K, T], dtype=tl.float32)
        block = 0
        while block < blocks:
            entry = tl.reshape(tl.trans(tl.load(table + block * K + at), 1, 2, 0), [K, 1])
            value = tl.load(x + block * K + offset + (entry & 0xFFFF)).to(tl.float32)
            sign = (entry & -65536).to(tl.float32, bitcast=True)
            folded = tl.fma(value, tl.broadcast_to(sign, [K, T]), folded)
            block += 1
    return tl.trans(folded)


@triton.jit(do_not_specialize=["stride", "blocks", "count", "scale"])
def fold_hadamard_kernel(
    x, stride, table, blocks, out, count, scale,
    ADD: tl.constexpr, BLOCK_T: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < count
    folded = fold_rows(x, stride, tl.minimum(rows, count - 1), table, blocks, BLOCK_T, K, LANES)
    y = hadamard(folded, BLOCK_T, K)
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
    packed = None if table is None else tables.folding(table, lanes(K), x.device)
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
            LANES=lanes(K),
            num_warps=shape.warps,
        )


def builds(K: int, dtype: str) -> list[Build]:
    """What `fold_hadamard` compiles for inputs of a dtype ("fp32", "bf16", "fp16")."""
    shape = tile(K)
    types = {"x": f"*{dtype}", "stride": "i32", "table": "*i32", "blocks": "i32"}
    types |= {"out": "*fp32", "count": "i32", "scale": "fp32"}
    sums = {name: kind for name, kind in types.items() if name != "table"} | {"x": "*fp32"}
    sizes = {"BLOCK_T": shape.rows, "K": K, "LANES": lanes(K)}
    kernel, warps = fold_hadamard_kernel, shape.warps
    return [
        Build(f"fold_hadamard-{dtype}-{K}", kernel, warps, types, {"ADD": False, **sizes}),
        Build(f"fold_hadamard-sums-{K}", kernel, warps, sums, {"table": None, "ADD": True, **sizes}),
    ]
