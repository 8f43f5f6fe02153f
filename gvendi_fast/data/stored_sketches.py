"""How a part keeps sketches: as float32, or in a half or a quarter of the bytes with a scale of their own.

    float16   z = scale * x,  x float16,          scale = 2^(e - 15) for a largest |z| in [2^(e - 1), 2^e)
    int8      z = scale * x,  x of -127 to 127,   scale = largest |z| / 127

x is rounded to nearest. A scale is that of one sketch: of a row, or of one of its groups of layers. It is kept as
float32 in a column beside the sketches, so neither the least nor the largest float32 under- or overflows; one that is a
power of two adds no rounding of its own. Without sums and transcendental functions every machine makes the same bytes.

float32 is a list column. The others are columns of fixed-size binary: Parquet has no number of 8 bits, and such a
column is read many times as fast as a list. The field's metadata name the store.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gvendi_fast.base.errors import GvendiError

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
STORES = (FLOAT32, FLOAT16, INT8)
DEFAULT = FLOAT32
# Behind the name of a column of sketches: its scales.
SCALE = "_scale"
_STORE = b"store"
_STEPS = 127
# Sketches coded at once: their float32 copies stay in the cache at K = 1024.
_BLOCK = 64
# Of float16 [-2^15, 2^15] is used, so that what is far below the largest still has all of its digits.
_BITS = 15
# The largest float16 below 2^15: 2^15 itself times the largest scale is infinite.
_MOST = 2**_BITS - 2 ** (_BITS - 11)
_LEAST_EXPONENT = -126
# The largest whose product with 127 is finite.
_LARGEST_STEP = np.nextafter(np.float32(np.finfo(np.float32).max) / np.float32(_STEPS), np.float32(0))


def check_store(store: str | None) -> None:
    """GvendiError unless a store is one of STORES, or None."""
    if store is not None and store not in STORES:
        raise GvendiError(f"store is {store!r}; wanted one of {', '.join(STORES)}")


def store_of(spec: dict[str, Any]) -> str:
    """How a run of this spec keeps its sketches: it says so where that is not as float32."""
    return spec.get("store", FLOAT32)


def coded(sketches: np.ndarray, store: str) -> tuple[np.ndarray, np.ndarray]:
    """Sketches float32 [n, K] as numbers of a store [n, K], and their scales, float32 [n]. All are finite."""
    kind, most = {FLOAT16: (np.float16, _MOST), INT8: (np.int8, _STEPS)}[store]
    out = np.empty(sketches.shape, kind)
    scales = np.empty(len(sketches), np.float32)
    for first in range(0, len(sketches), _BLOCK):
        part = slice(first, first + _BLOCK)
        block = sketches[part]
        peak = np.abs(np.maximum(block.max(axis=1), -block.min(axis=1)))
        scales[part] = scale = _halves(peak) if store == FLOAT16 else _steps(peak)
        x = block / np.where(scale > 0, scale, np.float32(1))[:, None]
        if store == INT8:
            np.rint(x, out=x)
        out[part] = np.clip(x, -most, most, out=x)
    return out, scales


def decoded(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What `coded` made of sketches, as float32 [n, K]."""
    if numbers.dtype == np.int8:
        return np.multiply(numbers, scales[:, None])
    import torch

    whole = np.empty(numbers.shape, np.float32)
    # numpy takes several times as long to widen float16; a copy, as torch wants what it may write to.
    torch.from_numpy(whole).copy_(torch.from_numpy(numbers.copy()))
    return np.multiply(whole, scales[:, None], out=whole)


def columns(name: str, sketches: np.ndarray, dim: int, store: str) -> dict[Any, Any]:
    """{Arrow field: array} of sketches float32 [n, G * dim], G of them side by side in a row: one column, or two."""
    import pyarrow as pa

    n, width = sketches.shape
    if store == FLOAT32:
        array = pa.FixedSizeListArray.from_arrays(pa.array(sketches.reshape(-1)), width)
        return {pa.field(name, array.type): array}
    numbers, scales = coded(sketches.reshape(-1, dim), store)
    kind = pa.binary(width * numbers.itemsize)
    field = pa.field(name, kind, metadata={_STORE: store.encode()})
    array = pa.Array.from_buffers(kind, n, [None, pa.py_buffer(numbers)])
    of_scales = pa.FixedSizeListArray.from_arrays(pa.array(scales), width // dim)
    return {field: array, pa.field(name + SCALE, of_scales.type): of_scales}


def read_columns(name: str, table: Any) -> np.ndarray:
    """The sketches, float32 [n, G * K], of the columns that `columns` made. ValueError where they are not such."""
    column = table[name]
    store = (table.schema.field(name).metadata or {}).get(_STORE, FLOAT32.encode()).decode()
    if store == FLOAT32:
        return _listed(column)
    if store not in STORES:
        raise ValueError(f"its column '{name}' is stored as {store!r}, which this version does not read")
    kind = np.dtype(store)
    array, scales = column.combine_chunks(), _listed(table[name + SCALE])
    (n, count), width = scales.shape, array.type.byte_width // kind.itemsize
    if n == 0:
        return np.empty((0, width), np.float32)
    numbers = np.frombuffer(array.buffers()[1], kind, n * width, array.offset * array.type.byte_width)
    return decoded(numbers.reshape(n * count, width // count), scales.reshape(-1)).reshape(n, width)


def _listed(column: Any) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


def _halves(peak: np.ndarray) -> np.ndarray:
    exponent = np.frexp(peak)[1]
    scale = np.ldexp(np.float32(1), np.maximum(exponent - _BITS, _LEAST_EXPONENT))
    return np.where(peak > 0, scale, np.float32(0)).astype(np.float32)


def _steps(peak: np.ndarray) -> np.ndarray:
    scale = peak / np.float32(_STEPS)
    # A subnormal number that is rounded down would not reach the largest by far.
    is_short = scale.astype(np.float64) * _STEPS < peak
    scale = np.where(is_short, np.nextafter(scale, np.float32(np.inf)), scale)
    return np.minimum(scale, _LARGEST_STEP)
