"""Every kernel with every tile size it ships, so that tests compile them without a GPU.

A file with kernels has `builds`, which lists what its wrapper compiles for a kind of call, and an entry here.
"""

from __future__ import annotations

from collections.abc import Iterator

from gvendi_fast.backends.triton.assign import builds as assign
from gvendi_fast.backends.triton.covariance import builds as covariance
from gvendi_fast.backends.triton.dense_sketch import BLOCKS
from gvendi_fast.backends.triton.dense_sketch import builds as dense_sketch
from gvendi_fast.backends.triton.entropy import SIZES
from gvendi_fast.backends.triton.entropy import builds as entropy
from gvendi_fast.backends.triton.fold_hadamard import builds as fold_hadamard
from gvendi_fast.backends.triton.gain import builds as gain
from gvendi_fast.backends.triton.hadamard import TILES
from gvendi_fast.backends.triton.linear_sketch import PARTS
from gvendi_fast.backends.triton.linear_sketch import builds as linear_sketch
from gvendi_fast.backends.triton.reduce_chunks import builds as reduce_chunks
from gvendi_fast.backends.triton.runtime import Build
from gvendi_fast.backends.triton.softmax_fold import MAX_BINS
from gvendi_fast.backends.triton.softmax_fold import builds as softmax_fold
from gvendi_fast.backends.triton.token_sketch import builds as token_sketch
from gvendi_fast.backends.triton.vector_sketch import builds as vector_sketch
from gvendi_fast.plan import make_table

DEFAULT_DIM = 1024
DTYPES = ("bf16", "fp16", "fp32")
# A common vocabulary; the fold takes it in parts, whose number is a constant of the kernel.
VOCABULARY = 151936
# A spectrum's table has as many columns where n is in the thousands, and up to twice as many beyond.
GAIN_COLUMNS = 32


def builds() -> dict[str, Build]:
    """{name: Build} of each kernel and tile size in bfloat16, and of other kinds of call at the default K."""
    found: dict[str, Build] = {}
    for build in _listed():
        # Tile sizes share some kernels.
        assert found.setdefault(build.name, build) == build, f"two builds are called {build.name}"
    return found


def _listed() -> Iterator[Build]:
    yield from reduce_chunks()
    for dtype in DTYPES:
        for norm in (None, "rms", "layer"):
            yield from vector_sketch(dtype, norm)
        yield from fold_hadamard(DEFAULT_DIM, dtype)
        yield from token_sketch(DEFAULT_DIM, dtype)
        for parts in range(1, PARTS + 1):
            for a_done in (False, True):
                yield from linear_sketch(DEFAULT_DIM, dtype, parts, a_done)
        # The head's fold comes from its softmax.
        yield from linear_sketch(DEFAULT_DIM, dtype, parts=0, e_done=True)
    for K in TILES:
        yield from fold_hadamard(K, "bf16")
        yield from token_sketch(K, "bf16")
        yield from linear_sketch(K, "bf16")
    for capped in (False, True):
        yield from softmax_fold("bf16", None, capped)
        for K in (64, MAX_BINS, DEFAULT_DIM):
            yield from softmax_fold("bf16", make_table(0, "vocabulary", VOCABULARY, K), capped)
    yield from softmax_fold("fp32", make_table(0, "vocabulary", VOCABULARY, DEFAULT_DIM), False)
    for K in (256, DEFAULT_DIM):
        yield from covariance("bf16", K)
    for sign in (1, -1):
        yield from gain("fp32", GAIN_COLUMNS, sign)
    yield from gain("fp32", 2 * GAIN_COLUMNS, 1)
    yield from gain("fp64", GAIN_COLUMNS, 1)
    for block in BLOCKS:
        yield from dense_sketch("bf16", block)
    for dtype in ("fp32", "fp16"):
        yield from dense_sketch(dtype, BLOCKS[-1])
    for size in SIZES:
        yield from entropy(size)
    yield from assign()
