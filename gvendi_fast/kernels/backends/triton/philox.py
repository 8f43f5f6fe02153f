"""Pi[j, c] = -1 where bit j % 32 of word (j % 128) // 32 of philox(counter(j // 128, c), key) is set, else +1;
counter(block, c) = (block % 2^32, block // 2^32, c, 0), key two words: the signs of signs.py, made in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(x0, x1, x2, x3, low, high):
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, 0xD2511F53), x0 * 0xD2511F53
        high1, low1 = tl.umulhi(x2, 0xCD9E8D57), x2 * 0xCD9E8D57
        x0, x1, x2, x3 = high1 ^ x1 ^ low, low1, high0 ^ x3 ^ high, low0
        low, high = low + 0x9E3779B9, high + 0xBB67AE85
    return x0, x1, x2, x3


# Words [columns, rows] of the WORD signs from a coordinate (int64 [rows], a multiple of WORD) on, lowest bit first.
@triton.jit
def sign_words(coordinate, column, low, high):
    block = (coordinate >> 7)[None, :]
    word = ((coordinate >> 5) & 3)[None, :]
    zero = (block * 0).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32_10(
        block.to(tl.uint32), (block >> 32).to(tl.uint32), column.to(tl.uint32)[:, None], zero, low, high
    )
    return tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3))


# +-1 in float16 from bit N of every word.
@triton.jit
def sign(words, N: tl.constexpr):
    return (((words << (15 - N)) & 0x8000) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
