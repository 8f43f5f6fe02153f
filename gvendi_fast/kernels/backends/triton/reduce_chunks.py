"""out [B, W] = sum of each sample's rows of partial [chunks, W]; or out += scale * that sum.

The chunks of a sample are added in groups of GROUP from its first one on, so the order depends on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.runtime import Chunks, on_device_of

# Loads of a group are in flight together; one by one, a long sample would wait for memory at every chunk.
GROUP = 8
BLOCK_W = 128
WARPS = 4


@triton.jit(do_not_specialize=["width", "scale"])
def reduce_chunks_kernel(
    partial, first, out, width, scale, ADD: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr
):
    tiles = tl.cdiv(width, BLOCK_W)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin, end = tl.load(first + sample), tl.load(first + sample + 1)
    column = tl.program_id(0) % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = column < width
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    while begin < end:
        chunk = begin + tl.arange(0, GROUP)
        at = partial + chunk[:, None] * width + column[None, :]
        total += tl.sum(tl.load(at, mask=(chunk < end)[:, None] & inside[None, :], other=0.0), axis=0)
        begin += GROUP
    to = out + sample * width + column
    if ADD:
        total = tl.load(to, mask=inside, other=0.0) + scale * total
    tl.store(to, total, mask=inside)


def reduce_chunks(
    partial: torch.Tensor, chunks: Chunks, out: torch.Tensor, scale: float | None = None
) -> None:
    """out [B, W] = sums of the samples' chunks, or, with a scale, out += scale * sums."""
    samples, width = out.shape
    if samples == 0:
        return
    with on_device_of(partial):
        # On one axis, since the other axes of a grid end at 65,535.
        reduce_chunks_kernel[(samples * triton.cdiv(width, BLOCK_W),)](
            partial,
            chunks.first,
            out,
            width,
            scale or 0.0,
            ADD=scale is not None,
            GROUP=GROUP,
            BLOCK_W=BLOCK_W,
            num_warps=WARPS,
        )
