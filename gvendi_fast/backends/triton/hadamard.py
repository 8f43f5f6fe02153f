"""y = H x for every row of x float32 [T, K], in registers: H[f, c] = (-1)^popcount(f & c).

log2 K butterflies over neighbours, each followed by a rotation of the index bits, so that every bit comes last once
and all are back in place at the end. Adding and subtracting is exact to the last place of float32, where a tensor-core
product with +-1 would round x to its operands' 8 or 11 bits, or take three products to keep them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from gvendi_fast.plan import MAX_DIM, MIN_DIM

WARP = 32


class Tile(NamedTuple):
    """Rows that a program transforms at once, and its warps."""

    rows: int
    warps: int


# K: tile. The fewest instructions an element at up to 128 registers a thread, counted (results/instructions.md): rows
# share a table's entries, and 8 to 16 floats a thread and row leave the transform few exchanges.
TILES = {
    64: Tile(4, 1),
    128: Tile(4, 1),
    256: Tile(4, 2),
    512: Tile(2, 2),
    1024: Tile(2, 4),
    2048: Tile(2, 4),
    4096: Tile(2, 8),
    8192: Tile(1, 16),
}
assert list(TILES) == [1 << bits for bits in range(MIN_DIM.bit_length() - 1, MAX_DIM.bit_length())]
# log2 of the largest K.
MAX_BITS = tl.constexpr(MAX_DIM.bit_length() - 1)


def tile(K: int) -> Tile:
    """The tile for a sketch dimension."""
    return TILES[K]


def lanes(K: int) -> int:
    """Threads that hold neighbouring bins of a tile; thread t has bins t, t + lanes, t + 2 lanes and so on."""
    return min(K, WARP * TILES[K].warps)


@triton.jit
def hadamard(x, T: tl.constexpr, K: tl.constexpr):
    for bit in tl.static_range(MAX_BITS):
        if (1 << bit) < K:
            low, high = tl.split(tl.reshape(x, [T, K // 2, 2]))
            x = tl.reshape(tl.trans(tl.join(low + high, low - high), 0, 2, 1), [T, K])
    return x
