"""Tables on a device, in the forms that the kernels read: S as a gather, and the bucket of one coordinate.

A thread that owns bin k collects S x [k] without atomics if it knows, block by block, which coordinate goes there.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import MAX_DIM, ExpertTables, Table

EMPTY = -1
# Coordinate (or bucket) and sign share an int16, a quarter of the index traffic of int64.
assert np.iinfo(np.int16).max >= 2 * MAX_DIM - 1
# +1, -1 and 0 as the leading half of a float32.
ONE, MINUS_ONE, NOTHING = 0x3F80, 0xBF80, 0

_cache: weakref.WeakKeyDictionary[Table | ExpertTables, dict[tuple[str, torch.device], torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def folding(table: Table | ExpertTables, device: torch.device) -> torch.Tensor:
    """S as int32 [blocks, K]: low half i, coordinate block * K + i going to bin k; high half that of the float32 sign.

    Where no coordinate goes, sign and i are 0. Of stacked experts [E, blocks, K].
    """
    return _on_device("folding", table, device)


def scattered(table: Table, device: torch.device) -> torch.Tensor:
    """S as int16 [width]: 2 * bucket + (sign < 0) of every coordinate."""
    return _on_device("scattered", table, device)


def _on_device(form: str, table: Table | ExpertTables, device: torch.device) -> torch.Tensor:
    forms = _cache.setdefault(table, {})
    tensor = forms.get((form, device))
    if tensor is None:
        tensor = forms[form, device] = torch.from_numpy(_PACK[form](table)).to(device)
    return tensor


def _fold(table: Table | ExpertTables) -> np.ndarray:
    if isinstance(table, ExpertTables):
        return np.stack([_fold(table.table(expert)) for expert in range(table.experts)])
    packed = _gather(table).astype(np.int32)
    sign = np.where(packed == EMPTY, NOTHING, np.where(packed & 1, MINUS_ONE, ONE)).astype(np.uint32)
    return (sign << 16 | np.maximum(packed >> 1, 0).astype(np.uint32)).view(np.int32)


def _scatter(table: Table) -> np.ndarray:
    return (2 * table.bucket + (table.sign < 0)).astype(np.int16)


def check_permutes(table: Table, filled: np.ndarray) -> None:
    """GvendiError unless every coordinate of the table has a bin of its own in its block."""
    if np.count_nonzero(filled) != table.width:
        raise GvendiError(
            f"a table of width {table.width} sends two coordinates of one block of {table.dim} to one bucket; "
            "make tables with gvendi_fast.kernels.sketch_matrix.make_table"
        )


def _gather(table: Table) -> np.ndarray:
    """int16 [blocks, K]: 2 * i + (sign < 0), coordinate block * K + i going to bin k; EMPTY where none goes."""
    coordinate = np.arange(table.width)
    block, within = np.divmod(coordinate, table.dim)
    packed = np.full((-(-table.width // table.dim), table.dim), EMPTY, dtype=np.int16)
    packed[block, table.bucket] = 2 * within + (table.sign < 0)
    check_permutes(table, packed != EMPTY)
    return packed


_PACK = {"folding": _fold, "scattered": _scatter}
