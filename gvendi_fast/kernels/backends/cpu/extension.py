"""The compiled module, or why it cannot be loaded, and the arguments that its calls have in common."""

from __future__ import annotations

import os
import weakref

# torch comes first: the extension has no OpenMP runtime of its own and calls the one that torch has opened.
import numpy as np
import torch

from gvendi_fast.base._version import __version__
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import RUN, ExpertTables, Table

try:
    # Imported by its full name: `from gvendi_fast import` would load the public face, which is above this room.
    import gvendi_fast._cpu as _cpu

    missing = None
    if __version__ != _cpu.VERSION:
        missing = (
            f"the compiled kernels are of version {_cpu.VERSION}, but the package is {__version__}; "
            "run pip install again"
        )
except ImportError as error:
    _cpu = None
    missing = (
        f"the compiled kernels cannot be loaded ({error}); install a C++17 compiler and run pip install again, "
        "with GVENDI_REQUIRE_EXT=1 to see why the build fails"
    )

_packed: weakref.WeakKeyDictionary[Table | ExpertTables, object] = weakref.WeakKeyDictionary()


def available_isas() -> list[str]:
    """Names of the instruction sets that both this build and this CPU have, narrowest first."""
    return [] if missing else _cpu.available_isas()


def current_isa() -> str:
    """Name of the instruction set in use."""
    require()
    return _cpu.current_isa()


def set_isa(name: str) -> None:
    """Use the instruction set `name` ("auto" or one of `available_isas()`); GvendiError for any other."""
    require()
    if name not in ("auto", *_cpu.available_isas()):
        choices = ", ".join(("auto", *_cpu.available_isas()))
        raise GvendiError(
            f"the instruction set (GVENDI_ISA) must be one of {choices} on this CPU, got {name!r}"
        )
    _cpu.set_isa(name)


def require() -> None:
    """GvendiError where the compiled module cannot be loaded."""
    if missing:
        raise GvendiError(missing)


def thread_count() -> int:
    """How many threads the kernels use."""
    return torch.get_num_threads()


def as_matrix(x: torch.Tensor) -> tuple[int, int, bool]:
    """(address, row stride, is bfloat16) of a matrix."""
    return x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16


def as_part(x: torch.Tensor, table: Table | None) -> tuple[int, int, bool, object]:
    """A matrix and its packed table."""
    return *as_matrix(x), None if table is None else pack(table)


def pack(table: Table):
    """The table in the kernels' order, made once."""
    packed = _packed.get(table)
    if packed is None:
        bucket, sign = table.bucket, table.sign
        packed = _cpu.Table(table.dim, table.width, bucket.ctypes.data, sign.ctypes.data)
        _packed[table] = packed
    return packed


def pack_experts(tables: ExpertTables):
    """The tables of all experts in the kernels' order, made once."""
    packed = _packed.get(tables)
    if packed is None:
        bucket, sign = (np.ascontiguousarray(side) for side in (tables.bucket, tables.sign))
        shape = tables.dim, tables.experts, tables.width
        packed = _cpu.ExpertTables(*shape, bucket.ctypes.data, sign.ctypes.data)
        _packed[tables] = packed
    return packed


def whole_runs(width: int) -> int:
    """A width rounded up to whole runs of 16."""
    return -(-width // RUN) * RUN


def workspace(segments: torch.Tensor, width: int) -> torch.Tensor:
    """One partial sum of `width` floats per chunk of a sample's rows."""
    spans = segments.numpy()
    chunks = int(((spans[:, 1] - spans[:, 0] + _cpu.CHUNK_ROWS - 1) // _cpu.CHUNK_ROWS).sum())
    return torch.empty(chunks * width, dtype=torch.float32)


def thread_buffers(threads: int, dim: int) -> torch.Tensor:
    """Two rows of `dim` floats, padded, for each thread."""
    return torch.empty(threads * 2 * (dim + _cpu.PAD), dtype=torch.float32)


if not missing:
    set_isa(os.environ.get("GVENDI_ISA") or "auto")
