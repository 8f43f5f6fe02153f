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
# A listed coordinate has half an int32.
MAX_LISTED = 1 << 16
# +1, -1 and 0 as the leading half of a float32.
ONE, MINUS_ONE, NOTHING = 0x3F80, 0xBF80, 0

_cache: weakref.WeakKeyDictionary[Table | ExpertTables, dict[tuple[str, torch.device], torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def folding(table: Table, device: torch.device) -> torch.Tensor:
    """S as int32 [blocks, K]: low half i, coordinate block * K + i going to bin k; high half that of the float32 sign.

    Where no coordinate goes, sign and i are 0.
    """
    return _on_device("folding", table, device)


def listing(tables: ExpertTables, device: torch.device) -> torch.Tensor:
    """S of each expert as int32 [E, most, K]: low half coordinate n that goes to bin k, high half that of its sign.

    Any number of coordinates may go to a bin, as of a part of a table; where there is no n-th one both are 0.
    """
    return _on_device("listing", tables, device)


def scattered(table: Table, device: torch.device) -> torch.Tensor:
    """S as int16 [width]: 2 * bucket + (sign < 0) of every coordinate."""
    return _on_device("scattered", table, device)


def _on_device(form: str, table: Table | ExpertTables, device: torch.device) -> torch.Tensor:
    forms = _cache.setdefault(table, {})
    tensor = forms.get((form, device))
    if tensor is None:
        tensor = forms[form, device] = torch.from_numpy(_PACK[form](table)).to(device)
    return tensor


def _list(tables: ExpertTables) -> np.ndarray:
    if tables.width > MAX_LISTED:
        raise GvendiError(
            f"stacked experts have {tables.width} coordinates along an axis; the Triton kernel takes up to "
            f'{MAX_LISTED}: use_backend("reference")'
        )
    places = []
    for bucket in tables.bucket:
        order = np.argsort(bucket, kind="stable")
        place = np.empty_like(order)
        # How many coordinates before it go to the same bin.
        place[order] = np.arange(tables.width) - np.searchsorted(bucket[order], bucket[order])
        places.append(place)
    place = np.stack(places)
    sign = np.where(tables.sign < 0, MINUS_ONE, ONE).astype(np.uint32)
    entries = np.zeros((tables.experts, int(place.max()) + 1, tables.dim), dtype=np.uint32)
    expert = np.arange(tables.experts)[:, None]
    entries[expert, place, tables.bucket] = sign << 16 | np.arange(tables.width, dtype=np.uint32)
    return entries.view(np.int32)


def _fold(table: Table) -> np.ndarray:
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


_PACK = {"folding": _fold, "listing": _list, "scattered": _scatter}
