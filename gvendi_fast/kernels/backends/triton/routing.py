"""Where the rows of stacked experts are: chunks of one sample and one expert each, made on the device.

Experts and samples of rows are on the GPU, and nothing waits for it: the host knows how many chunks there are at most,
and those past the last one are empty. Chunks go by sample and, within a sample, by expert, so that the chunks of a
sample follow each other for `reduce_chunks` and its sum depends on its own rows alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS, Chunks, stream_of


@dataclass(frozen=True)
class Routing:
    """order int64 [R]: rows by sample, then expert; chunks.spans int64 [chunks, 3]: begin, end and expert of each.

    The number E in place of an expert is that of rows whose expert or sample there is not.
    """

    order: torch.Tensor
    chunks: Chunks


# The weights and biases of a layer's experts are called one after the other with the same rows.
_last: tuple[tuple[object, ...], weakref.ref, weakref.ref, Routing] | None = None


def routing_of(experts: torch.Tensor, samples: torch.Tensor, count: int, batch: int) -> Routing:
    """Chunks of rows with experts and samples int64 [R], of `count` experts and `batch` samples; the last stay."""
    global _last
    # An inference tensor has no version, so whether it was written to since is not known.
    if experts.is_inference() or samples.is_inference():
        return _route(experts, samples, count, batch)
    key = count, batch, stream_of(experts.device), experts._version, samples._version
    found = _last
    if found is None or found[0] != key or found[1]() is not experts or found[2]() is not samples:
        _last = found = (
            key,
            weakref.ref(experts),
            weakref.ref(samples),
            _route(experts, samples, count, batch),
        )
    return found[3]


def most_chunks(rows: int, count: int, batch: int) -> int:
    """Chunks that so many rows can need: full ones, and one for the rest of every pair of a sample and an expert."""
    return rows // CHUNK_ROWS + min(rows, batch * (count + 1))


def _route(experts: torch.Tensor, samples: torch.Tensor, count: int, batch: int) -> Routing:
    slots, rows, device = count + 1, len(experts), experts.device
    pairs, most = batch * slots, most_chunks(rows, count, batch)
    if max(pairs, most) >= 2**31:
        raise GvendiError(
            f"expert_sketch: {batch} samples of {count} experts make {max(pairs, most)} chunks; one call takes fewer "
            "than 2^31: split the batch"
        )
    known = (experts >= 0) & (experts < count)
    key = samples * slots + torch.where(known, experts, count)
    # A row of no sample makes the first one NaN: it must not be lost.
    key = torch.where((samples >= 0) & (samples < batch), key, count)
    key, order = key.sort(stable=True)
    begin = torch.searchsorted(key, torch.arange(pairs + 1, device=device))
    chunks = (begin.diff() + CHUNK_ROWS - 1) // CHUNK_ROWS
    first = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    number = torch.arange(most, device=device)
    # The last pair whose first chunk is not behind this one: empty pairs end before it.
    pair = torch.searchsorted(first, number, right=True) - 1
    inside = pair < pairs
    pair = pair.clamp_max(pairs - 1)
    start = begin[pair] + (number - first[pair]) * CHUNK_ROWS
    end = torch.where(inside, torch.minimum(start + CHUNK_ROWS, begin[pair + 1]), start)
    spans = torch.stack([start, end, pair % slots], dim=1)
    return Routing(order, Chunks(spans, first[::slots].contiguous()))
