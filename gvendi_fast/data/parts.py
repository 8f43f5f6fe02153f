"""The result of one work unit as a Parquet file (its part): the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gvendi_fast.base.errors import GvendiError

# Column of the file -> attribute of Part.
COLUMNS = {
    "id": "ids",
    "group": "groups",
    "row": "rows",
    "sketch": "sketches",
    "tokens": "tokens",
    "length": "length",
    "loss": "loss",
    "gradient_norm": "gradient_norm",
}
# Columns that a part may lack: of a run that keeps none, or of an earlier version.
OPTIONAL = {"group_sketches": "group_sketches", "norm_share": "norm_shares"}
_DTYPES = {
    "row": np.int64,
    "tokens": np.int32,
    "length": np.int32,
    "loss": np.float32,
    "gradient_norm": np.float32,
}


@dataclass(slots=True, eq=False)
class Part:
    """The n accepted rows of one work unit: sorted by `rows` when read; any order may be written.

    A column that was not read is None; a part to be written has every column, each of n entries.

    unit: number of the work unit.
    ids: one string a row.
    groups: one string a row, "" without a group.
    rows: int64 [n], each row's ordinal in the corpus.
    sketches: float32 [n, K].
    tokens: int32 [n], supervised tokens.
    length: int32 [n], all tokens.
    loss: float32 [n], in nats, summed over the supervised tokens.
    gradient_norm: float32 [n], of the exact gradient or its estimate, as the spec says.
    group_sketches: float32 [n, G * K], the sketches of the G groups that the spec names, side by side; None where the
        run keeps none.
    norm_shares: {group of layers: float32 [n], its share of the squared norms of the row's groups}; None where the
        part was written without.
    """

    unit: int
    ids: list[str] | None = None
    groups: list[str] | None = None
    rows: np.ndarray | None = None
    sketches: np.ndarray | None = None
    tokens: np.ndarray | None = None
    length: np.ndarray | None = None
    loss: np.ndarray | None = None
    gradient_norm: np.ndarray | None = None
    group_sketches: np.ndarray | None = None
    norm_shares: dict[str, np.ndarray] | None = None


def part_table(part: Part) -> Any:
    """The Arrow table of a part, sorted by row. Raises GvendiError as `RunDirectory.write_part` says."""
    import pyarrow as pa

    absent = [name for name in COLUMNS.values() if getattr(part, name) is None]
    if absent:
        raise GvendiError(
            f"write_part: {absent[0]} of work unit {part.unit} is None; wanted every column of Part"
        )
    arrays = {
        name: np.asarray(getattr(part, COLUMNS[name]), kind).reshape(-1) for name, kind in _DTYPES.items()
    }
    sketches = np.asarray(part.sketches, np.float32)
    _check(part, arrays, sketches)
    order = np.argsort(arrays["row"], kind="stable")
    flat = pa.array(np.ascontiguousarray(sketches[order]).reshape(-1))
    columns = {
        "id": pa.array([part.ids[index] for index in order], pa.string()),
        "group": pa.array([part.groups[index] for index in order], pa.string()),
        "row": pa.array(arrays["row"][order]),
        "sketch": pa.FixedSizeListArray.from_arrays(flat, sketches.shape[1]),
    }
    rest = {name: pa.array(arrays[name][order]) for name in ("tokens", "length", "loss", "gradient_norm")}
    if part.norm_shares is not None:
        shares = [pa.array(np.asarray(x, np.float32)[order]) for x in part.norm_shares.values()]
        rest["norm_share"] = pa.StructArray.from_arrays(shares, list(part.norm_shares))
    if part.group_sketches is not None:
        groups = np.ascontiguousarray(np.asarray(part.group_sketches, np.float32)[order])
        rest["group_sketches"] = pa.FixedSizeListArray.from_arrays(groups.reshape(-1), groups.shape[1])
    return pa.table({**columns, **rest})


def write_table(table: Any, stream: IO[bytes]) -> None:
    """Write it as one row group, uncompressed, as sketches do not compress; checksums reveal a damaged page."""
    import pyarrow.parquet as pq

    pq.write_table(
        table,
        stream,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=max(table.num_rows, 1),
    )


def read_part(path: Path, unit: int, names: Sequence[str]) -> Part:
    """The columns `names` of one part; one of OPTIONAL that it lacks stays None.

    Raises GvendiError that names the file if it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = Part(unit)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in names if name not in OPTIONAL or name in file.schema_arrow.names]
            table = file.read(list(names), use_threads=False)
        for name in names:
            setattr(part, {**COLUMNS, **OPTIONAL}[name], _column(name, table[name]))
    # A missing column is a KeyError, a broken page an OSError, a string that is not UTF-8 a UnicodeDecodeError.
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error
    return part


def damaged(path: Path, why: str) -> GvendiError:
    """The error for a part that cannot be used."""
    return GvendiError(f"'{path}' is damaged ({why}); delete this file and run the same command again")


def _column(name: str, column: Any) -> list[str] | np.ndarray | dict[str, np.ndarray]:
    if name in ("id", "group"):
        return column.to_pylist()
    if name == "norm_share":
        whole = column.combine_chunks()
        return {field.name: whole.field(field.name).to_numpy() for field in column.type}
    if name in ("sketch", "group_sketches"):
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), column.type.list_size)
    return column.to_numpy()


def _check(part: Part, arrays: dict[str, np.ndarray], sketches: np.ndarray) -> None:
    lengths = {
        "ids": len(part.ids),
        "groups": len(part.groups),
        **{name: len(value) for name, value in arrays.items()},
    }
    n = len(sketches)
    for name, value in (part.norm_shares or {}).items():
        lengths[f"norm_shares[{name!r}]"] = len(value)
    if part.group_sketches is not None:
        lengths["group_sketches"] = len(part.group_sketches)
        if part.group_sketches.ndim != 2 or part.group_sketches.shape[1] % sketches.shape[1]:
            raise GvendiError(
                f"write_part: group_sketches have shape {part.group_sketches.shape}; wanted [n, G * K] with "
                f"K = {sketches.shape[1]}"
            )
    if sketches.ndim != 2 or sketches.shape[1] == 0:
        raise GvendiError(
            f"write_part: sketches have shape {sketches.shape}; wanted [n, K] with K of at least 1"
        )
    if any(size != n for size in lengths.values()):
        raise GvendiError(f"write_part: {n} sketches but {lengths}; wanted the same number of each")
    if len(np.unique(arrays["row"])) != n:
        raise GvendiError(f"write_part: work unit {part.unit} has a row twice; wanted each row once")
    bad = np.flatnonzero(~np.isfinite(sketches).all(axis=1))
    if len(bad):
        raise GvendiError(
            f"write_part: the sketch of '{part.ids[bad[0]]}' is not finite; pass such rows as rejected"
        )
