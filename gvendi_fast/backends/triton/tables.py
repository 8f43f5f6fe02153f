"""Tables on a device, in the forms that the kernels read: S as a gather, and the bucket of one coordinate.

A thread that owns bin k collects S x [k] without atomics if it knows, block by block, which coordinate goes there.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from gvendi_fast.errors import GvendiError
from gvendi_fast.plan import MAX_DIM, Table

EMPTY = -1
# Coordinate (or bucket) and sign share an int16, a quarter of the index traffic of int64.
assert np.iinfo(np.int16).max >= 2 * MAX_DIM - 1
# Entries that a thread loads at once: 16 bytes.
GROUP = 4
# +1, -1 and 0 as the leading half of a float32.
ONE, MINUS_ONE, NOTHING = 0x3F80, 0xBF80, 0

_cache: weakref.WeakKeyDictionary[Table, dict[tuple[str, int, torch.device], torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def gathered(table: Table, device: torch.device) -> torch.Tensor:
    """S as int16 [blocks, K]: 2 * i + (sign < 0), coordinate block * K + i going to bin k; -1 where none goes."""
    return _on_device("gathered", table, device, 0)


def folding(table: Table, lanes: int, device: torch.device) -> torch.Tensor:
    """S as int32 [blocks, K]: low half i, coordinate block * K + i going to bin k; high half that of the float32 sign.

    Where no coordinate goes, sign and i are 0. Bins come in the order in which `lanes` threads load them, up to GROUP
    at once: bin (g * n + j) * lanes + t at (g * lanes + t) * n + j, n = `group(K, lanes)`. With as many lanes as bins
    that is bin k at k.
    """
    return _on_device("folding", table, device, lanes)


def group(K: int, lanes: int) -> int:
    """Entries that a thread loads at once."""
    return min(GROUP, K // lanes)


def scattered(table: Table, device: torch.device) -> torch.Tensor:
    """S as int16 [width]: 2 * bucket + (sign < 0) of every coordinate."""
    return _on_device("scattered", table, device, 0)


def _on_device(form: str, table: Table, device: torch.device, lanes: int) -> torch.Tensor:
    forms = _cache.setdefault(table, {})
    tensor = forms.get((form, lanes, device))
    if tensor is None:
        if form == "folding":
            packed = _fold(table, lanes)
        else:
            packed = _gather(table) if form == "gathered" else _scatter(table)
        tensor = forms[form, lanes, device] = torch.from_numpy(packed).to(device)
    return tensor


def _fold(table: Table, lanes: int) -> np.ndarray:
    packed = _gather(table).astype(np.int32)
    sign = np.where(packed < 0, NOTHING, np.where(packed & 1, MINUS_ONE, ONE)).astype(np.uint32)
    entries = (sign << 16 | np.maximum(packed >> 1, 0).astype(np.uint32)).view(np.int32)
    at_once = group(table.dim, lanes)
    threads = entries.reshape(len(packed), -1, at_once, lanes).swapaxes(2, 3)
    return np.ascontiguousarray(threads).reshape(packed.shape)


def _scatter(table: Table) -> np.ndarray:
    return (2 * table.bucket + (table.sign < 0)).astype(np.int16)


def _gather(table: Table) -> np.ndarray:
    coordinate = np.arange(table.width)
    block, within = np.divmod(coordinate, table.dim)
    packed = np.full((-(-table.width // table.dim), table.dim), EMPTY, dtype=np.int16)
    packed[block, table.bucket] = 2 * within + (table.sign < 0)
    if np.count_nonzero(packed != EMPTY) != table.width:
        raise GvendiError(
            f"a table of width {table.width} sends two coordinates of one block of {table.dim} to one bucket; "
            "make tables with gvendi_fast.plan.make_table"
        )
    return packed
