"""From the factors of a layer's gradient to its sketch: the default one, and the dense mode's."""

from __future__ import annotations

import numpy as np
import torch

from gvendi_fast.kernels.backends.cpu.extension import (
    _cpu,
    as_matrix,
    as_part,
    pack,
    pack_experts,
    thread_buffers,
    thread_count,
    whole_runs,
    workspace,
)
from gvendi_fast.kernels.sketch_matrix import Table

_NORMS = {None: 0, "rms": 1, "layer": 2}


def fold_hadamard(x: torch.Tensor, table: Table, out: torch.Tensor) -> None:
    _cpu.fold_hadamard(as_part(x, table), x.shape[0], table.dim, out.data_ptr(), thread_count())


def linear_sketch(a, a_table, parts, segments, out) -> None:
    samples, dim = out.shape
    threads = thread_count()
    partial, buffers = workspace(segments, dim), thread_buffers(threads, dim)
    _cpu.linear_sketch(
        as_part(a, a_table),
        [as_part(e, table) for e, table in parts],
        segments.data_ptr(),
        samples,
        dim,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def expert_sketch(a, e, experts, samples, a_tables, e_tables, out) -> None:
    count, dim = out.shape
    threads = thread_count()
    # A chunk for every CHUNK_ROWS rows of a sample, and one for what is left of each.
    partial = torch.empty((len(e) // _cpu.CHUNK_ROWS + count) * dim, dtype=torch.float32)
    buffers = thread_buffers(threads, dim)
    _cpu.expert_sketch(
        as_matrix(e if a is None else a),
        None if a is None else pack_experts(a_tables),
        as_matrix(e),
        pack_experts(e_tables),
        experts.data_ptr(),
        samples.data_ptr(),
        len(e),
        e_tables.experts,
        count,
        dim,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def token_sketch(ids, e, segments, id_table, e_table, out) -> None:
    samples, dim = out.shape
    partial = workspace(segments, dim)
    _cpu.token_sketch(
        ids.data_ptr(),
        pack(id_table),
        as_part(e, e_table),
        segments.data_ptr(),
        samples,
        dim,
        partial.data_ptr(),
        out.data_ptr(),
        thread_count(),
    )


def vector_sketch(x, e, segments, table, out, norm, eps) -> None:
    samples, dim = out.shape
    threads = thread_count()
    partial, buffers = workspace(segments, whole_runs(table.width)), thread_buffers(threads, dim)
    _cpu.vector_sketch(
        None if x is None else as_matrix(x),
        as_part(e, table),
        segments.data_ptr(),
        samples,
        dim,
        _NORMS[norm],
        eps,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def softmax_fold(logits, labels, table, loss, folded, softcap, scale) -> None:
    # float32 rows without a cap have room for their own exponentials.
    in_place = logits.dtype == torch.float32 and softcap is None
    rows, width = logits.shape
    threads = thread_count()
    work = torch.empty(0 if in_place else threads * whole_runs(width), dtype=torch.float32)
    _cpu.softmax_fold(
        as_matrix(logits),
        rows,
        width,
        labels.data_ptr(),
        None if table is None else pack(table),
        softcap or 0.0,
        scale,
        work.data_ptr(),
        loss.data_ptr(),
        0 if folded is None else folded.data_ptr(),
        threads,
    )


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
