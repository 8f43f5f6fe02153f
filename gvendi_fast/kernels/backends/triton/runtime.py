"""What every kernel's wrapper needs: the chunks of a batch and the launch guard.

Sums over a sample's rows are taken chunk by chunk: a chunk is CHUNK_ROWS consecutive rows of one sample, counted from
its first row, and writes its own row of `partial` [chunks, width]; `reduce_chunks` adds them in a fixed order. So there
are no atomics, the bits are the same on every run, and a sample's result does not depend on its batch.

Loops in kernels are `while` wherever a bound is not a constant: Triton's interpreter cannot take the bound of a `range`
from a tensor with NumPy 2.4 and later.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.transfer import to_device

# Few rows keep every multiprocessor busy on small batches; each chunk costs one row of partial written and read.
CHUNK_ROWS = 16
# The chunk lists of the latest batches: every layer of a batch asks for the same one.
CHUNK_LISTS = 32


@dataclass(frozen=True)
class Chunks:
    """spans int64 [chunks, 2]: rows of each chunk; first int64 [B + 1]: each sample's first chunk; on a device."""

    spans: torch.Tensor
    first: torch.Tensor

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def samples(self) -> int:
        """Number of samples B, empty ones included."""
        return len(self.first) - 1


def chunks_of(segments: torch.Tensor, device: torch.device) -> Chunks:
    """The chunks of a batch on `device`; segments int64 [B, 2] on the CPU."""
    return _chunks(segments.numpy().tobytes(), device, stream_of(device))


def stream_of(device: torch.device) -> int:
    """The current stream, a part of the key of every cache of lists on a device.

    A list belongs to one stream: it is copied before that stream's kernels run, and its memory is not given to other
    work of the stream while they read it.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=CHUNK_LISTS)
def _chunks(spans: bytes, device: torch.device, stream: int) -> Chunks:
    begin, end = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2).T
    counts = -(-(end - begin) // CHUNK_ROWS)
    first = np.concatenate([[0], np.cumsum(counts)])
    sample = np.repeat(np.arange(len(counts)), counts)
    start = begin[sample] + (np.arange(first[-1]) - first[sample]) * CHUNK_ROWS
    rows = np.stack([start, np.minimum(start + CHUNK_ROWS, end[sample])], axis=1)
    return Chunks(*(to_device(torch.from_numpy(x), device) for x in (rows, first)))


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, so that a launch goes to that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def workspace(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised float32 [rows, width] on the device of `like`."""
    return torch.empty(rows, width, dtype=torch.float32, device=like.device)
