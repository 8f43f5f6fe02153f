"""The compiled CPU kernels (csrc/cpu) behind the operations' calling convention: float32 and bfloat16.

Results are the same bits for any number of threads and on every instruction set. torch.get_num_threads() says
how many threads run; GVENDI_ISA forces an instruction set.
"""

from __future__ import annotations

import os
import weakref

import numpy as np

# torch before the extension, which then shares its OpenMP runtime instead of bringing a second pool of threads.
import torch

from gvendi_fast._version import __version__
from gvendi_fast.errors import GvendiError
from gvendi_fast.plan import RUN, Table
from gvendi_fast.spectrum import Quadrature

try:
    from gvendi_fast import _cpu

    _missing = None
    if __version__ != _cpu.VERSION:
        _missing = (
            f"the compiled kernels are of version {_cpu.VERSION}, the package is {__version__}; "
            "run pip install again"
        )
except ImportError as error:
    _cpu = None
    _missing = (
        f"the compiled kernels are not there ({error}); install a C++17 compiler and run pip install again, "
        "with GVENDI_REQUIRE_EXT=1 to see why the build fails"
    )

# Scores [rows, C] that `assign` holds at once: 16 MiB, but enough rows for a product to run at full speed.
ASSIGN_SCORES, ASSIGN_MIN_ROWS, ASSIGN_ROWS = 1 << 22, 64, 4096
# Up to this many centroids every product is computed in float64 at once.
ASSIGN_DIRECT = 4
_DTYPES = (torch.float32, torch.bfloat16)
_GAIN_DTYPES = (torch.float32, torch.float64)
_NORMS = {None: 0, "rms": 1, "layer": 2}
_packed: weakref.WeakKeyDictionary[Table, object] = weakref.WeakKeyDictionary()


def available_isas() -> list[str]:
    """Names of the instruction sets that this build has and this CPU runs, narrowest first."""
    return [] if _missing else _cpu.available_isas()


def current_isa() -> str:
    """Name of the instruction set in use."""
    _require()
    return _cpu.current_isa()


def set_isa(name: str) -> None:
    """Use the instruction set `name` ("auto" or one of `available_isas()`); GvendiError for any other."""
    _require()
    if name not in ("auto", *_cpu.available_isas()):
        choices = ", ".join(("auto", *_cpu.available_isas()))
        raise GvendiError(
            f"the instruction set (GVENDI_ISA) must be one of {choices} on this CPU, got {name!r}"
        )
    _cpu.set_isa(name)


def status() -> str:
    """One line for `gvendi info`."""
    if _missing:
        return _missing
    threads = f"{_threads()} thread{'s' if _threads() > 1 else ''}"
    openmp = "" if _cpu.OPENMP else ", built without OpenMP"
    return f"ready ({_cpu.current_isa()} of {', '.join(_cpu.available_isas())}; {threads}{openmp})"


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reason for which the kernels cannot run `op` on these tensors, or None."""
    if _missing:
        return _missing
    dtypes = _GAIN_DTYPES if op == "gain" else _DTYPES
    # The second tensor of a covariance is its float64 master.
    for tensor in tensors[:1] if op == "covariance" else tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, the compiled CPU kernels need it on the CPU"
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            name, first, second = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
            return f"{name} on a CPU is not supported by the compiled kernels; use {first} or {second}"
    return None


def fold_hadamard(x: torch.Tensor, table: Table, out: torch.Tensor) -> None:
    _cpu.fold_hadamard(_part(x, table), x.shape[0], table.dim, out.data_ptr(), _threads())


def linear_sketch(a, a_table, parts, segments, out) -> None:
    samples, dim = out.shape
    threads = _threads()
    partial, buffers = _workspace(segments, dim), _buffers(threads, dim)
    _cpu.linear_sketch(
        _part(a, a_table),
        [_part(e, table) for e, table in parts],
        segments.data_ptr(),
        samples,
        dim,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def token_sketch(ids, e, segments, id_table, e_table, out) -> None:
    samples, dim = out.shape
    partial = _workspace(segments, dim)
    _cpu.token_sketch(
        ids.data_ptr(),
        _pack(id_table),
        _part(e, e_table),
        segments.data_ptr(),
        samples,
        dim,
        partial.data_ptr(),
        out.data_ptr(),
        _threads(),
    )


def vector_sketch(x, e, segments, table, out, norm, eps) -> None:
    samples, dim = out.shape
    threads = _threads()
    partial, buffers = _workspace(segments, _whole_runs(table.width)), _buffers(threads, dim)
    _cpu.vector_sketch(
        None if x is None else _matrix(x),
        _part(e, table),
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
    # float32 rows without a cap hold their own exponentials.
    in_place = logits.dtype == torch.float32 and softcap is None
    rows, width = logits.shape
    threads = _threads()
    work = torch.empty(0 if in_place else threads * _whole_runs(width), dtype=torch.float32)
    _cpu.softmax_fold(
        _matrix(logits),
        rows,
        width,
        labels.data_ptr(),
        None if table is None else _pack(table),
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
    threads, widths = _threads(), (e.shape[1], a.shape[1])
    partial = torch.empty(samples * _cpu.dense_groups(*widths) * dim, dtype=torch.float32)
    buffers = torch.empty(threads * _cpu.dense_buffer(samples, dim), dtype=torch.float32)
    _cpu.dense_sketch(
        _matrix(a),
        a.shape[1],
        _matrix(e),
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
    threads, groups = _threads(), _cpu.DENSE_GROUPS
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
        _matrix(e),
        e.shape[1],
        samples,
        dim,
        *key,
        partial.data_ptr(),
        buffers.data_ptr(),
        out.data_ptr(),
        threads,
    )


def covariance(rows: torch.Tensor, out: torch.Tensor) -> None:
    dim = out.shape[1]
    missing = -dim % _cpu.PANEL
    if missing:
        # Columns of zeros fill the last panel and add nothing.
        wide = torch.zeros(dim + missing, dim + missing, dtype=torch.float64)
        covariance(torch.nn.functional.pad(rows, (0, missing)), wide)
        out += wide[:dim, :dim]
        return
    panels = torch.empty(min(len(rows), _cpu.COVARIANCE_ROWS) * dim, dtype=torch.float32)
    _cpu.covariance(_matrix(rows), len(rows), dim, panels.data_ptr(), out.data_ptr(), _threads())


def gain(coordinates: torch.Tensor, at: Quadrature, out: torch.Tensor) -> None:
    rows, dim = coordinates.shape
    _cpu.gain(
        coordinates.data_ptr(),
        coordinates.dtype == torch.float64,
        rows,
        dim,
        at.sign,
        len(at.t),
        at.table.shape[1],
        at.t.data_ptr(),
        at.weight.data_ptr(),
        at.table.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        _threads(),
    )


def entropy(rows: torch.Tensor, boundaries: torch.Tensor, q: float, out: torch.Tensor) -> None:
    if len(out) == 0:
        return
    threads, dim = min(_threads(), len(out)), rows.shape[1]
    buffer = _cpu.entropy_buffer(int(boundaries.diff().max()), dim)
    buffers = torch.empty(threads * buffer, dtype=torch.float64)
    _cpu.entropy(
        _matrix(rows),
        boundaries.data_ptr(),
        len(out),
        dim,
        q,
        buffers.data_ptr(),
        buffer,
        out.data_ptr(),
        threads,
    )
    lost = torch.nonzero(out.isnan())
    if len(lost):
        raise GvendiError(
            f"the eigenvalues of group {int(lost[0, 0])} were not found; use_backend('reference') asks LAPACK for them"
        )


def assign(rows, centroids, label, cosine, second, second_cosine) -> None:
    (N, K), C, threads = rows.shape, len(centroids), _threads()
    # An order of sums that a library chooses errs by K units of 2^-24 at most; the factor covers the centroids' length.
    margin = 2.02 * ((K + 2) * 2.0**-24 + product_error())
    buffers = torch.empty(threads * _whole_runs(K), dtype=torch.float32)
    block = min(ASSIGN_ROWS, max(ASSIGN_MIN_ROWS, ASSIGN_SCORES // C))
    for first in range(0, N, block):
        part = slice(first, first + block)
        scores = torch.mm(rows[part].float(), centroids.T) if C > ASSIGN_DIRECT else None
        _cpu.assign(
            _matrix(rows[part]),
            len(rows[part]),
            K,
            centroids.data_ptr(),
            C,
            0 if scores is None else scores.data_ptr(),
            margin,
            buffers.data_ptr(),
            label[part].data_ptr(),
            cosine[part].data_ptr(),
            second[part].data_ptr(),
            second_cosine[part].data_ptr(),
            threads,
        )


def product_error() -> float:
    """How far torch may cut the factors of a float32 product: 0, or what bfloat16 or TF32 leaves of two factors."""
    if hasattr(torch.backends.mkldnn, "matmul"):
        precise = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    else:
        precise = torch.get_float32_matmul_precision() == "highest"
    return 0.0 if precise else 2.0**-7


def _require() -> None:
    if _missing:
        raise GvendiError(_missing)


def _threads() -> int:
    return torch.get_num_threads()


def _matrix(x: torch.Tensor) -> tuple[int, int, bool]:
    return x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16


def _part(x: torch.Tensor, table: Table | None) -> tuple[int, int, bool, object]:
    return *_matrix(x), None if table is None else _pack(table)


def _pack(table: Table):
    packed = _packed.get(table)
    if packed is None:
        bucket, sign = table.bucket, table.sign
        packed = _cpu.Table(table.dim, table.width, bucket.ctypes.data, sign.ctypes.data)
        _packed[table] = packed
    return packed


def _whole_runs(width: int) -> int:
    return -(-width // RUN) * RUN


def _workspace(segments: torch.Tensor, width: int) -> torch.Tensor:
    """One partial sum of `width` floats per chunk of a sample's rows."""
    spans = segments.numpy()
    chunks = int(((spans[:, 1] - spans[:, 0] + _cpu.CHUNK_ROWS - 1) // _cpu.CHUNK_ROWS).sum())
    return torch.empty(chunks * width, dtype=torch.float32)


def _buffers(threads: int, dim: int) -> torch.Tensor:
    return torch.empty(threads * 2 * (dim + _cpu.PAD), dtype=torch.float32)


if not _missing:
    set_isa(os.environ.get("GVENDI_ISA") or "auto")
