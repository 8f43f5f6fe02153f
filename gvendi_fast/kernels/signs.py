"""The signs of the dense mode as data: Pi in {+1, -1}^{P x K}, z = K^(-1/2) Pi^T g.

The sign of (coordinate j, column c) of a parameter is one bit of the counter-based generator Philox4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that any tile of Pi is made where it is used:

    Pi[j, c] = -1 where bit j % 32 of word (j % 128) // 32 of philox(counter(j // 128, c), key) is set, else +1
    counter(block, c) = (block % 2^32, block // 2^32, c, 0)

j = o * I + i numbers the entries of the parameter's [O, I] matrix row by row; a vector has I = 1. K does not enter:
a sketch with fewer columns uses the first ones. csrc/philox.h is the same in C++ and CUDA, and says why one call
covers 128 coordinates of one column.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from gvendi_fast.base.errors import GvendiError

# Coordinates of one column that one Philox call covers.
COORDINATES = 128
# Ids of an embedding below this keep the number of its coordinates within 63 bits.
MAX_IDS = 1 << 40
# Changes whenever the signs of a given (seed, parameter) change; stored with every sketch of the dense mode.
SIGN_VERSION = 1

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def sign_key(seed: int, parameter: str) -> tuple[int, int]:
    """Philox key of a parameter: two 32-bit words, from the seed and the parameter's name alone."""
    digest = hashlib.blake2b(f"{seed}|{parameter}|rademacher".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Random words of counters: integers [..., 4] below 2^32 -> uint32 [..., 4]. GvendiError for another last axis."""
    if counter.shape[-1:] != (4,):
        raise GvendiError(f"counter must have shape [..., 4], got {list(counter.shape)}")
    x = [np.asarray(counter[..., i], dtype=np.uint64) for i in range(4)]
    for step in range(10):
        first, second = x[0] * np.uint64(_MULTIPLIERS[0]), x[2] * np.uint64(_MULTIPLIERS[1])
        keys = [np.uint64((key[i] + step * _WEYL[i]) & _WORD) for i in range(2)]
        x = [
            (second >> np.uint64(32)) ^ x[1] ^ keys[0],
            second & np.uint64(_WORD),
            (first >> np.uint64(32)) ^ x[3] ^ keys[1],
            first & np.uint64(_WORD),
        ]
    return np.stack(x, axis=-1).astype(np.uint32)


def signs(key: tuple[int, int], begin: int, end: int, dim: int) -> np.ndarray:
    """Rows begin..end-1 of Pi: int8 [end - begin, dim] of +1 and -1; none where begin == end.

    Raises GvendiError unless 0 <= begin <= end < 2^63 and dim >= 0.
    """
    if not 0 <= begin <= end < 1 << 63 or dim < 0:
        raise GvendiError(
            f"signs: rows {begin} to {end} of {dim} columns; wanted 0 <= begin <= end < 2^63, dim >= 0"
        )
    first, last = begin // COORDINATES, -(-end // COORDINATES)
    block, column = np.meshgrid(np.arange(first, last, dtype=np.uint64), np.arange(dim), indexing="ij")
    counter = np.stack([block & np.uint64(_WORD), block >> np.uint64(32), column, 0 * column], axis=-1)
    words = philox4x32_10(counter, key).astype("<u4")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    rows = bits.transpose(0, 2, 1).reshape(len(bits) * COORDINATES, dim)[
        begin - first * COORDINATES : end - first * COORDINATES
    ]
    return 1 - 2 * rows.astype(np.int8)
