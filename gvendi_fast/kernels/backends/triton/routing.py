"""Where the rows of stacked experts are: chunks of one sample and one expert each, made on the device.

Experts and samples of rows are on the GPU, and nothing waits for it: the host knows how many chunks there are at most,
and those past the last one are empty. Chunks go by sample and, within a sample, by expert, so that the chunks of a
sample follow each other for `reduce_chunks` and its sum depends on its own rows alone.

A pair is a sample and an expert, or a sample and the number E, which stands for its rows of no expert: b (E + 1) + x.
Rows are sorted by pair, which is torch's; what is before and behind it would be forty launches of small operations.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS, Chunks, on_device_of, stream_of

BLOCK, WARPS = 128, 4


@dataclass(frozen=True)
class Routing:
    """order int64 [R]: rows by pair; chunks.spans int64 [chunks, 3]: begin and end in order, and expert, of each.

    The number E in place of an expert is that of rows whose expert or sample there is not.
    """

    order: torch.Tensor
    chunks: Chunks


@triton.jit(
    do_not_specialize=["rows", "experts", "samples"],
    do_not_specialize_on_alignment=["expert_of", "sample_of"],
)
def pair_kernel(expert_of, sample_of, pairs, rows, experts, samples, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_of + row, mask=row < rows, other=0)
    sample = tl.load(sample_of + row, mask=row < rows, other=0)
    expert = tl.where((expert >= 0) & (expert < experts), expert, experts)
    # A row of no sample must not be lost: it makes the first sample NaN.
    pair = tl.where((sample >= 0) & (sample < samples), sample * (experts + 1) + expert, experts)
    tl.store(pairs + row, pair.to(tl.int32), mask=row < rows)


@triton.jit
def smaller(values, count, than, BLOCK: tl.constexpr):
    """How many of the `count` sorted values, at least one, are smaller than each of than [BLOCK]: by halves."""
    found = tl.zeros([BLOCK], dtype=tl.int64)
    left = count
    while left > 1:
        half = left // 2
        found = tl.where(tl.load(values + found + half - 1) < than, found + half, found)
        left -= half
    return found + (tl.load(values + found) < than).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "count"])
def begin_kernel(pairs, rows, begin, chunks, count, CHUNK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """begin [count + 1]: each pair's first row; chunks [count + 1]: those of the pair before."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, before = smaller(pairs, rows, pair, BLOCK), smaller(pairs, rows, pair - 1, BLOCK)
    tl.store(begin + pair, first, mask=pair <= count)
    tl.store(chunks + pair, (first - before + CHUNK_ROWS - 1) // CHUNK_ROWS, mask=pair <= count)


@triton.jit(do_not_specialize=["pairs", "experts", "count"])
def span_kernel(begin, first, pairs, experts, spans, count, CHUNK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """spans [count, 3] from each pair's first row and first chunk, both [pairs + 1]."""
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The last pair whose first chunk is not behind this one: empty pairs end before it.
    pair = smaller(first, pairs + 1, chunk + 1, BLOCK) - 1
    inside = pair < pairs
    pair = tl.minimum(pair, pairs - 1)
    start = tl.load(begin + pair) + (chunk - tl.load(first + pair)) * CHUNK_ROWS
    end = tl.where(inside, tl.minimum(start + CHUNK_ROWS, tl.load(begin + pair + 1)), start)
    to = spans + 3 * chunk
    tl.store(to, start, mask=chunk < count)
    tl.store(to + 1, end, mask=chunk < count)
    tl.store(to + 2, pair % (experts + 1), mask=chunk < count)


# The weights and biases of a layer's experts are called one after the other with the same rows.
_last: tuple[tuple[object, ...], weakref.ref, weakref.ref, Routing] | None = None


def routing_of(expert_of: torch.Tensor, sample_of: torch.Tensor, experts: int, samples: int) -> Routing:
    """The chunks of rows with their experts and samples, int64 [R] and R > 0 each; what the last call made is kept."""
    global _last
    # An inference tensor has no version, so whether it was written to since is not known.
    if expert_of.is_inference() or sample_of.is_inference():
        return _route(expert_of, sample_of, experts, samples)
    key = experts, samples, stream_of(expert_of.device), expert_of._version, sample_of._version
    found = _last
    if found is None or found[0] != key or found[1]() is not expert_of or found[2]() is not sample_of:
        found = (
            key,
            weakref.ref(expert_of),
            weakref.ref(sample_of),
            _route(expert_of, sample_of, experts, samples),
        )
        _last = found
    return found[3]


def most_chunks(rows: int, experts: int, samples: int) -> int:
    """Chunks that so many rows can need: full ones, and one for the rest of every pair."""
    return rows // CHUNK_ROWS + min(rows, samples * (experts + 1))


def _route(expert_of: torch.Tensor, sample_of: torch.Tensor, experts: int, samples: int) -> Routing:
    rows, pairs = len(expert_of), samples * (experts + 1)
    count = most_chunks(rows, experts, samples)
    if max(pairs, count) >= 2**31:
        raise GvendiError(
            f"expert_sketch: {samples} samples and {experts} experts make {max(pairs, count)} pairs or chunks; one "
            "call takes fewer than 2^31: split the batch"
        )
    pair = torch.empty(rows, dtype=torch.int32, device=expert_of.device)
    begin, chunks = (expert_of.new_empty(pairs + 1) for _ in range(2))
    spans = expert_of.new_empty(count, 3)
    sizes = {"BLOCK": BLOCK, "num_warps": WARPS}
    with on_device_of(expert_of):
        pair_kernel[(triton.cdiv(rows, BLOCK),)](expert_of, sample_of, pair, rows, experts, samples, **sizes)
        pair, order = pair.sort(stable=True)
        sizes |= {"CHUNK_ROWS": CHUNK_ROWS}
        begin_kernel[(triton.cdiv(pairs + 1, BLOCK),)](pair, rows, begin, chunks, pairs, **sizes)
        first = chunks.cumsum(0)
        span_kernel[(triton.cdiv(count, BLOCK),)](begin, first, pairs, experts, spans, count, **sizes)
    return Routing(order, Chunks(spans, first[:: experts + 1].contiguous()))
