"""The dense mode: samples of one call share every sign."""

from __future__ import annotations

import numpy as np
import torch

from gvendi_fast.backends.cpu.extension import _cpu, as_matrix, thread_count


def dense_sketch(a, e, segments, key, out) -> None:
    # Samples of one call share every sign.
    for first in range(0, len(out), _cpu.DENSE_SAMPLES):
        part = slice(first, first + _cpu.DENSE_SAMPLES)
        if a.is_floating_point():
            _dense_linear(a, e, segments[part], key, out[part])
        else:
            _dense_token(a, e, segments[part], key, out[part])


def _dense_linear(a, e, segments, key, out) -> None:
    samples, dim = out.shape
    threads, widths = thread_count(), (e.shape[1], a.shape[1])
    partial = torch.empty(samples * _cpu.dense_groups(*widths) * dim, dtype=torch.float32)
    buffers = torch.empty(threads * _cpu.dense_buffer(samples, dim), dtype=torch.float32)
    _cpu.dense_sketch(
        as_matrix(a),
        a.shape[1],
        as_matrix(e),
        e.shape[1],
        segments.data_ptr(),
        samples,
        dim,
        *key,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def _dense_token(ids, e, segments, key, out) -> None:
    samples, dim = out.shape
    threads, groups = thread_count(), _cpu.DENSE_GROUPS
    spans = segments.numpy()
    row = np.concatenate([np.arange(begin, end) for begin, end in spans])
    sample = np.repeat(np.arange(samples), spans[:, 1] - spans[:, 0])
    token = ids.numpy()[row]
    # A token's group depends on the token alone, so a sample's sums do not depend on its batch.
    order = np.lexsort((row, sample, token, token % groups))
    token, sample, row = (np.ascontiguousarray(x[order], dtype=np.int64) for x in (token, sample, row))
    starts = np.searchsorted(token % groups, np.arange(groups + 1)).astype(np.int64)
    partial = torch.empty(samples * groups * dim, dtype=torch.float32)
    buffers = torch.empty(threads * _cpu.dense_buffer(samples, dim), dtype=torch.float32)
    _cpu.dense_token_sketch(
        token.ctypes.data,
        sample.ctypes.data,
        row.ctypes.data,
        starts.ctypes.data,
        as_matrix(e),
        e.shape[1],
        samples,
        dim,
        *key,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )
