"""y = H x for every row of x float32 [T, K], in registers: H[f, c] = (-1)^popcount(f & c).

log2 K butterflies over neighbours, each followed by a rotation of the index bits, so that every bit comes last once
and all are back in place at the end. Adding and subtracting is exact to the last place of float32, where a tensor-core
product with +-1 would round x to its operands' 8 or 11 bits, or take three products to keep them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from gvendi_fast.kernels.sketch_matrix import MAX_DIM, MIN_DIM


class Tile(NamedTuple):
    """Rows that a program transforms at once, and its warps."""

    rows: int
    warps: int


# K: tile. The fewest instructions counted (benchmarks/results/instructions.md) without spilling: rows share a
# table's entries, and more floats a thread leave the transform fewer exchanges. At 1024 by time on an H200, among six:
# 2 rows and 8 warps, which hide more of memory's latency, for what folds and transforms alone; a linear layer's kernel,
# which has two transforms to hide it behind, takes 4 warps (0.96 times as long as 8 over the layers of a 0.5B model).
TILES = {
    64: Tile(4, 1),
    128: Tile(4, 1),
    256: Tile(4, 2),
    512: Tile(2, 2),
    1024: Tile(2, 8),
    2048: Tile(2, 8),
    4096: Tile(2, 8),
    8192: Tile(1, 8),
}
LINEAR_TILES = {**TILES, 1024: Tile(2, 4)}
assert list(TILES) == [1 << bits for bits in range(MIN_DIM.bit_length() - 1, MAX_DIM.bit_length())]
# log2 of the largest K.
MAX_BITS = tl.constexpr(MAX_DIM.bit_length() - 1)


def tile(K: int) -> Tile:
    """The tile for a sketch dimension."""
    return TILES[K]


def linear_tile(K: int) -> Tile:
    """The tile of `linear_sketch` for a sketch dimension."""
    return LINEAR_TILES[K]


@triton.jit
def hadamard(x, T: tl.constexpr, K: tl.constexpr):
    for bit in tl.static_range(MAX_BITS):
        if (1 << bit) < K:
            low, high = tl.split(tl.reshape(x, [T, K // 2, 2]))
            x = tl.reshape(tl.trans(tl.join(low + high, low - high), 0, 2, 1), [T, K])
    return x
