"""The CUDA C++ kernels (csrc/cuda) behind the operations' calling convention: float32, bfloat16 and float16.

They are optional and need the CUDA toolkit: `GVENDI_CUDA=1 pip install .` builds them. Results are the same bits every
time and in every batch. Kernels run on the device of their tensors and on its current stream.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator

import numpy as np
import torch

from gvendi_fast.base._version import __version__
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.transfer import to_device
from gvendi_fast.kernels.signs import MAX_IDS
from gvendi_fast.kernels.sketch_matrix import Table

try:
    # Imported by its full name: `from gvendi_fast import` would load the public face, which is above this room.
    import gvendi_fast._cuda as _cuda

    _missing = None
    if __version__ != _cuda.VERSION:
        _missing = (
            f"the CUDA kernels are of version {_cuda.VERSION}, but the package is {__version__}; "
            "run GVENDI_CUDA=1 pip install again"
        )
except ImportError as error:
    _cuda = None
    _missing = (
        f"the CUDA kernels cannot be loaded ({error}); "
        "with nvcc on the PATH, GVENDI_CUDA=1 pip install builds them"
    )

OPS = ("fold_hadamard", "linear_sketch", "dense_sketch")
MIN_CAPABILITY = (8, 0)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Packed tables by device and stream: memory that one stream frees may be reused while another one still reads it.
_packed: weakref.WeakKeyDictionary[Table, dict[tuple[torch.device, int], torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def status() -> str:
    """One line for `gvendi info`."""
    if _missing:
        return _missing
    count, reason = _cuda.devices()
    built = f"built for {_cuda.ARCHITECTURES}"
    if not count:
        return f"{built}, but there is no device: {reason}"
    return f"ready ({built}; {count} device{'s' if count > 1 else ''})"


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on these tensors, or None."""
    if _missing:
        return _missing
    if op not in OPS:
        return f"there is no CUDA C++ kernel for {op}, only for {', '.join(OPS)}"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}, but the CUDA kernels need it on a CUDA device"
        if tensor.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {tensor.device}, but the CUDA kernels need one device"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is not supported by the CUDA kernels; use float32, bfloat16 or float16"
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < MIN_CAPABILITY:
            return f"{tensor.device} has compute capability {capability[0]}.{capability[1]}; 8.0 or later is needed"
    return None


def fold_hadamard(x: torch.Tensor, table: Table, out: torch.Tensor) -> None:
    with _place(x) as place:
        _cuda.fold_hadamard(_part(x, table, place), x.shape[0], table.dim, out.data_ptr(), *place)


def linear_sketch(a, a_table, parts, segments, out) -> None:
    samples, dim = out.shape
    with _place(a) as place:
        chunks, first = _chunks(segments.numpy().tobytes(), _cuda.CHUNK_ROWS, a.device, place[1])
        partial = torch.empty(len(chunks), dim, dtype=torch.float32, device=a.device)
        # The sketch is linear in the parts, so parts beyond what one launch takes are added by further launches.
        for begin in range(0, len(parts), _cuda.MAX_PARTS):
            _cuda.linear_sketch(
                _part(a, a_table, place),
                [_part(e, table, place) for e, table in parts[begin : begin + _cuda.MAX_PARTS]],
                chunks.data_ptr(),
                len(chunks),
                first.data_ptr(),
                samples,
                dim,
                partial.data_ptr(),
                out.data_ptr(),
                *place,
            )


def dense_sketch(a, e, segments, key, out) -> None:
    if not a.is_floating_point():
        _dense_token(a, e, segments, key, out)
        return
    if a.dtype != e.dtype:
        # Exact, and rare: the factors of one layer mostly have one dtype.
        a, e = a.float(), e.float()
    samples, dim = out.shape
    slabs = _cuda.dense_slabs(e.shape[1], a.shape[1])
    with _place(a) as place:
        spans = _spans(segments.numpy().tobytes(), a.device, place[1])
        partial = _partial(slabs, a.device)
        for begin in range(0, samples, _cuda.DENSE_SAMPLES):
            count = min(_cuda.DENSE_SAMPLES, samples - begin)
            _cuda.dense_sketch(
                a.data_ptr(),
                a.stride(0),
                a.shape[1],
                e.data_ptr(),
                e.stride(0),
                e.shape[1],
                _DTYPES[a.dtype],
                spans[begin:].data_ptr(),
                (count, dim, *key, partial.data_ptr(), out[begin:].data_ptr()),
                *place,
            )


def _dense_token(ids, e, segments, key, out) -> None:
    samples, dim = out.shape
    width = e.shape[1]
    with _place(e) as place:
        spans = _spans(segments.numpy().tobytes(), e.device, place[1])
        partial = _partial(_cuda.dense_token_slabs(width), e.device)
        for begin in range(0, samples, _cuda.DENSE_SAMPLES):
            part = slice(begin, begin + _cuda.DENSE_SAMPLES)
            rows = int((segments[part, 1] - segments[part, 0]).sum())
            if rows == 0:
                continue
            touches = _touches(ids, spans[part], rows, _cuda.dense_token_groups(width))
            _cuda.dense_token_sketch(
                [x.data_ptr() for x in touches],
                e.data_ptr(),
                e.stride(0),
                width,
                _DTYPES[e.dtype],
                (len(spans[part]), dim, *key, partial.data_ptr(), out[begin:].data_ptr()),
                *place,
            )


def _partial(slabs: int, device: torch.device) -> torch.Tensor:
    return torch.empty(slabs, _cuda.DENSE_SAMPLES, _cuda.DENSE_COLUMNS, dtype=torch.float32, device=device)


def _touches(ids: torch.Tensor, spans: torch.Tensor, rows: int, groups: int) -> tuple[torch.Tensor, ...]:
    """`Touches` of csrc/cuda/kernels.h for samples that have `rows` rows in all; ids, spans on the device.

    Sizes come from the host; the number of runs, which only the device knows, stays there, so nothing waits for it.
    """
    begin, counts = spans[:, 0], spans[:, 1] - spans[:, 0]
    place = torch.arange(rows + 1, device=ids.device)
    sample = torch.repeat_interleave(counts, output_size=rows)
    row = begin[sample] + place[:rows] - (counts.cumsum(0) - counts)[sample]
    # An id's group depends on the id alone, so a sample's sums do not depend on its batch.
    key, order = torch.sort(ids[row] % groups * MAX_IDS + ids[row], stable=True)
    new = torch.ones_like(key)
    new[1:] = key[1:] != key[:-1]
    # Run of every row, and after the last one the number of runs.
    run = torch.cat([new.cumsum(0) - 1, new.sum(0, keepdim=True)])
    starts = torch.searchsorted(run[:rows], place)
    first = run[torch.searchsorted(key, MAX_IDS * torch.arange(groups + 1, device=ids.device))]
    row = row[order]
    # Ids past the last run are never read.
    run_id = ids[row[starts[:rows].clamp_max(rows - 1)]]
    return sample[order], row, run_id, starts, first


@contextlib.contextmanager
def _place(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(device index, stream address) for launches on the tensor's device, which is the current one inside the block."""
    with torch.cuda.device(x.device):
        yield x.device.index, torch.cuda.current_stream().cuda_stream


def _part(x: torch.Tensor, table: Table | None, place: tuple[int, int]) -> tuple[int, int, int, int, int]:
    if table is None:
        return x.data_ptr(), x.stride(0), _DTYPES[x.dtype], 0, 0
    packed = _pack(table, x.device, place[1])
    return x.data_ptr(), x.stride(0), _DTYPES[x.dtype], packed.data_ptr(), len(packed)


def _pack(table: Table, device: torch.device, stream: int) -> torch.Tensor:
    """The table in the kernels' order: 16-bit words [blocks, K] on the device."""
    copies = _packed.setdefault(table, {})
    if (device, stream) not in copies:
        words = np.empty((-(-table.width // table.dim), table.dim), dtype=np.int16)
        bucket, sign = np.ascontiguousarray(table.bucket), np.ascontiguousarray(table.sign)
        _cuda.pack_table(table.dim, table.width, bucket.ctypes.data, sign.ctypes.data, words.ctypes.data)
        copies[device, stream] = torch.from_numpy(words).to(device)
    return copies[device, stream]


@functools.lru_cache(maxsize=16)
def _spans(segments: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """The segments on the device, int64 [B, 2]; cached as in `_chunks`."""
    return to_device(torch.from_numpy(np.frombuffer(segments, dtype=np.int64).reshape(-1, 2).copy()), device)


@functools.lru_cache(maxsize=16)
def _chunks(
    segments: bytes, rows: int, device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of at most `rows` rows of one sample: int64 [count, 2], and each sample's first, [B + 1].

    All layers of a batch share their segments, hence the cache; `stream` is in its key as in `_packed`.
    """
    spans = np.frombuffer(segments, dtype=np.int64).reshape(-1, 2)
    counts = -(-(spans[:, 1] - spans[:, 0]) // rows)
    first = np.concatenate([[0], np.cumsum(counts)])
    sample = np.repeat(np.arange(len(spans)), counts)
    begin = spans[sample, 0] + rows * (np.arange(first[-1]) - first[sample])
    chunks = np.stack([begin, np.minimum(begin + rows, spans[sample, 1])], axis=1)
    if len(chunks) >= 2**31:
        raise GvendiError(
            f"segments cover {len(chunks)} chunks; one call takes fewer than 2^31: split the batch"
        )
    return to_device(torch.from_numpy(chunks), device), to_device(torch.from_numpy(first), device)
