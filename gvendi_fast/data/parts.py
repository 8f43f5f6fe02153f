"""The result of one work unit as a Parquet file (its part): the same rows give the same bytes.

A part says whose it is and carries its checksums: the key `gvendi.part` of the footer's metadata holds

    1 <CRC-32 of the footer> {"unit": ..., "first_row": ..., "rows": ..., "accepted": ..., "dim": ..., "spec": ...,
                              "corpus": ..., "input": ..., "rejected": ..., "columns": [...]}

(`Stamp`). The footer's checksum is taken with zeros in its own place and with the 8 bytes behind the footer, so nothing
of a footer is parsed before it is known to be whole, and with it the checksums of the columns' bytes. So a reader
verifies exactly what it reads. Parts of earlier versions have no stamp: their pages carry Parquet's own checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import open_file
from gvendi_fast.data.stored_sketches import FLOAT32, SCALE, columns, read_columns

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
# Those that may have scales beside them.
_SKETCHES = ("sketch", "group_sketches")
_DTYPES = {
    "row": np.int64,
    "tokens": np.int32,
    "length": np.int32,
    "loss": np.float32,
    "gradient_norm": np.float32,
}
_KEY = b"gvendi.part"
_VERSION = 1
_BEGINS, _ZEROS = f"{_VERSION} ".encode(), b"00000000"
_MAGIC = b"PAR1"
# The length of the footer and the magic word behind it.
_TAIL = 8
# Most footers are read with the first read.
_FIRST_READ = 1 << 14


class DamagedPartError(GvendiError):
    """A part that is not what was written for its work unit, as a checksum or a parser has proved; `why` says how.

    other: of a part that is whole but does not belong there, what is another's: "unit", "rows", "spec" or "corpus".
    """

    def __init__(self, path: Path, why: str, other: str = "") -> None:
        self.path, self.why = path, why
        self.is_foreign, self.other = bool(other), other
        super().__init__(
            f"'{path}' is damaged ({why}); run the command that made it again, which computes its work unit anew"
        )

    @property
    def unit(self) -> int:
        """The work unit whose part it is, by its name."""
        return int(self.path.stem.rpartition("-")[2])


@dataclass(frozen=True)
class Stamp:
    """What a part says of itself.

    unit: number of the work unit.
    first_row, rows: the rows of the corpus that the work unit has.
    accepted: rows in the part.
    dim: K.
    spec, corpus: digests of spec.json and units.json; corpus is "" where none was recorded.
    input: digest of the bytes that the work unit was read from, "" where it is not known.
    rejected: CRC-32 of the file of rejected rows beside it.
    columns: CRC-32 of the bytes of every leaf column, in the file's order.
    """

    unit: int
    first_row: int
    rows: int
    accepted: int
    dim: int
    spec: str
    corpus: str
    input: str
    rejected: str
    columns: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Part:
    """The n accepted rows of one work unit: sorted by `rows` when read; any order may be written.

    A column that was not read is None; a part to be written has every column, each of n entries.

    unit: number of the work unit.
    ids: one string a row.
    groups: one string a row, "" without a group.
    rows: int64 [n], each row's ordinal in the corpus.
    sketches: float32 [n, K], however they are stored.
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


def part_table(part: Part, store: str = FLOAT32) -> Any:
    """The Arrow table of a part, sorted by row, with its sketches kept as `store` (`stored_sketches.STORES`) says.

    Raises GvendiError as `RunDirectory.write_part` says.
    """
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
    # Of rows that are in order, as a run's are, a slice is no copy.
    places = slice(None) if np.array_equal(order, np.arange(len(order))) else order
    dim = sketches.shape[1]
    kept = {
        "id": _strings("id", part.ids, part, order),
        "group": _strings("group", part.groups, part, order),
        "row": pa.array(arrays["row"][places]),
    }
    kept |= columns("sketch", np.ascontiguousarray(sketches[places]), dim, store)
    kept |= {name: pa.array(arrays[name][places]) for name in ("tokens", "length", "loss", "gradient_norm")}
    if part.norm_shares is not None:
        shares = [pa.array(np.asarray(x, np.float32)[places]) for x in part.norm_shares.values()]
        kept["norm_share"] = pa.StructArray.from_arrays(shares, list(part.norm_shares))
    if part.group_sketches is not None:
        groups = np.ascontiguousarray(np.asarray(part.group_sketches, np.float32)[places])
        kept |= columns("group_sketches", groups, dim, store)
    fields = [x if isinstance(x, pa.Field) else pa.field(x, array.type) for x, array in kept.items()]
    return pa.table(list(kept.values()), schema=pa.schema(fields))


def _strings(name: str, values: Sequence[str], part: Part, order: np.ndarray) -> Any:
    import pyarrow as pa

    try:
        return pa.array([values[index] for index in order.tolist()], pa.string())
    except UnicodeEncodeError as error:
        raise GvendiError(
            f"write_part: the {name} {error.object!r} of work unit {part.unit} is not Unicode text (a name of a file "
            "that is not UTF-8, say); give another one"
        ) from error


def checksum(content: Any) -> str:
    """CRC-32 of bytes as 8 hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def part_file(table: Any, stamp: Stamp) -> tuple[memoryview, bytearray]:
    """The bytes of a part, its footer apart; `stamp.columns` are filled in here.

    One row group, uncompressed, as sketches do not compress. Parquet's own checksums of pages would take a third more
    time to write and find nothing that these do not.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    leaves = _leaves(table)
    blank = _value(replace(stamp, columns=(_ZEROS.decode(),) * leaves), _ZEROS)
    sink = pa.BufferOutputStream()
    metadata: list[Any] = []
    pq.write_table(
        table.replace_schema_metadata({_KEY: blank}),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=max(table.num_rows, 1),
        metadata_collector=metadata,
    )
    ranges = [place for _, place in _chunks(metadata[0])]
    content = memoryview(sink.getvalue())
    start = _footer_start(content)
    # A part without rows has no row group, so no bytes of a column.
    sums = tuple(checksum(content[slice(*place)]) for place in ranges) or (checksum(b""),) * leaves
    footer = bytearray(content[start:])
    place = footer.index(blank)
    footer[place : place + len(blank)] = _value(replace(stamp, columns=sums), _ZEROS)
    place += len(_BEGINS)
    footer[place : place + len(_ZEROS)] = checksum(footer).encode()
    return content[:start], footer


def read_part(path: Path, unit: int, names: Sequence[str]) -> tuple[Part, Stamp | None]:
    """The columns `names` of one part, and what it says of itself (None: written by an earlier version).

    One of OPTIONAL that it lacks stays None; of a part without a stamp `rows` are read in any case. What is read is
    verified. Raises DamagedPartError, and OSError with its number and file where the system fails.
    """
    with naming(path), open_file(path) as stream:
        size = stream.seek(0, 2)
        footer, stamp = _footer(path, stream, size)
        if stamp is None:
            return _read_unstamped(path, stream, unit, names), None
        # Only the pages that are read take memory.
        content = np.empty(size, np.uint8)
        content[size - len(footer) :] = np.frombuffer(footer, np.uint8)
        content[: len(_MAGIC)] = np.frombuffer(_MAGIC, np.uint8)
        return _read_stamped(path, stream, content, unit, names, stamp), stamp


def read_stamp(path: Path) -> Stamp | None:
    """What a part says of itself, from its verified footer alone. Raises as `read_part` does."""
    with naming(path), open_file(path) as stream:
        return _footer(path, stream, stream.seek(0, 2))[1]


def _value(stamp: Stamp, footer: bytes) -> bytes:
    return _BEGINS + footer + b" " + json.dumps(vars(stamp), sort_keys=True).encode()


def _leaves(table: Any) -> int:
    return sum(max(column.type.num_fields, 1) for column in table.schema)


def _chunks(metadata: Any) -> list[tuple[str, tuple[int, int]]]:
    """(column, (first byte, byte behind the last)) of every leaf column."""
    found = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            start = chunk.data_page_offset
            found.append((chunk.path_in_schema.split(".")[0], (start, start + chunk.total_compressed_size)))
    return found


def _footer_start(content: bytes | memoryview) -> int:
    return len(content) - _TAIL - int.from_bytes(content[-_TAIL : -len(_MAGIC)], "little")


def _footer(path: Path, stream: IO[bytes], size: int) -> tuple[bytes, Stamp | None]:
    """The footer with the bytes behind it, and its stamp, both verified; no stamp where it has none."""
    if size < len(_MAGIC) + _TAIL:
        raise DamagedPartError(path, f"it ends after {size} byte{'s' * (size != 1)}")
    stream.seek(max(size - _FIRST_READ, 0))
    tail = stream.read(_FIRST_READ)
    if len(tail) != min(size, _FIRST_READ) or tail[-len(_MAGIC) :] != _MAGIC:
        raise DamagedPartError(path, "its end is missing")
    length = len(tail) - _footer_start(tail)
    if length > size - len(_MAGIC):
        raise DamagedPartError(path, "its end is not that of a part")
    stream.seek(size - length)
    footer = tail[-length:] if length <= len(tail) else stream.read(length)
    # Both the key and the layout of its value would have to be hit for a stamped part to pass for one without.
    place = footer.find(_KEY)
    if place < 0 and b'"first_row": ' not in footer:
        return footer, None
    begin = footer.find(_BEGINS, place + len(_KEY))
    # Between key and value lie the few bytes of a field's header.
    if place < 0 or not 0 <= begin - place - len(_KEY) <= _TAIL:
        raise DamagedPartError(path, f"its {_KEY.decode()} is not one that this version reads")
    begin += len(_BEGINS)
    end = begin + len(_ZEROS)
    if footer[begin:end].decode("latin-1") != checksum(footer[:begin] + _ZEROS + footer[end:]):
        raise DamagedPartError(path, "the checksum of its footer does not agree")
    stamp = _stamp(json.JSONDecoder().raw_decode(footer[end + 1 :].decode("latin-1"))[0])
    if stamp is None:
        raise DamagedPartError(path, f"its {_KEY.decode()} is not one that this version reads")
    return footer, stamp


def _stamp(found: dict[str, Any]) -> Stamp | None:
    if set(found) != {field.name for field in fields(Stamp)}:
        return None
    return Stamp(**{**found, "columns": tuple(found["columns"])})


def _read_stamped(
    path: Path, stream: IO[bytes], content: np.ndarray, unit: int, names: Sequence[str], stamp: Stamp
) -> Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _parsing(path), pq.ParquetFile(pa.BufferReader(pa.py_buffer(content))) as file:
        present = set(file.schema_arrow.names)
        names = [name for name in names if name not in OPTIONAL or name in present]
        scales = [name + SCALE for name in names if name in _SKETCHES and name + SCALE in present]
        chunks = _chunks(file.metadata)
        for (name, (start, end)), wanted in zip(chunks, stamp.columns, strict=bool(chunks)):
            if name in names or name in scales:
                column = memoryview(content)[start:end]
                stream.seek(start)
                if stream.readinto(column) != end - start or checksum(column) != wanted:
                    raise DamagedPartError(path, f"the checksum of its column '{name}' does not agree")
        return _part_of(unit, file.read([*names, *scales], use_threads=False), names)


def _read_unstamped(path: Path, stream: IO[bytes], unit: int, names: Sequence[str]) -> Part:
    import pyarrow.parquet as pq

    stream.seek(0)
    with _parsing(path), pq.ParquetFile(stream, page_checksum_verification=True) as file:
        present = file.schema_arrow.names
        # Their rows are the one sign of a part that lies in the place of another.
        names = [name for name in dict.fromkeys([*names, "row"]) if name not in OPTIONAL or name in present]
        return _part_of(unit, file.read(names, use_threads=False), names)


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    import pyarrow as pa

    # A missing column is a KeyError, a broken page an OSError without a number, a string that is not UTF-8 a
    # UnicodeDecodeError, and a column of another type an AttributeError, TypeError or ValueError.
    broken = (pa.ArrowException, OSError, KeyError, AttributeError, TypeError, ValueError)
    try:
        yield
    except broken as error:
        is_content = getattr(error, "errno", None) is None and not isinstance(
            error, MemoryError | DamagedPartError
        )
        if not is_content:
            raise
        raise DamagedPartError(path, str(error)) from error


def _part_of(unit: int, table: Any, names: Sequence[str]) -> Part:
    part = Part(unit)
    for name in names:
        value = read_columns(name, table) if name in _SKETCHES else _column(name, table[name])
        setattr(part, {**COLUMNS, **OPTIONAL}[name], value)
    return part


def _column(name: str, column: Any) -> list[str] | np.ndarray | dict[str, np.ndarray]:
    if name in ("id", "group"):
        return column.to_pylist()
    if name == "norm_share":
        whole = column.combine_chunks()
        return {field.name: whole.field(field.name).to_numpy() for field in column.type}
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
    is_finite = np.isfinite(sketches).all(axis=1)
    if part.group_sketches is not None:
        is_finite &= np.isfinite(part.group_sketches).all(axis=1)
    bad = np.flatnonzero(~is_finite)
    if len(bad):
        raise GvendiError(
            f"write_part: the sketch of '{part.ids[bad[0]]}' is not finite; pass such rows as rejected"
        )
