"""A corpus as its index has it: files, work units, and the manifest of both."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gvendi_fast.data.listing import Unreadable
from gvendi_fast.data.pieces import Piece
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields
from gvendi_fast.data.run_files import BY_FILE
from gvendi_fast.data.unit_cuts import written

# Row within its work unit, then file and line of the row that had the id first.
_DUPLICATE = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus.

    path: as given.
    kind: as `kinds` names it, such as "jsonl.gz".
    size: bytes on disk.
    rows: how many are used.
    digest: BLAKE2b (16 bytes, hex) of the bytes that were read: the decompressed lines of JSON lines, the rows of other
        texts, the footer and the row groups in use of Parquet (bytes beyond a `limit` do not count), all of Arrow.
    """

    path: str
    kind: str
    size: int
    rows: int
    digest: str
    # Where it is read from, if its recorded name is another: ids and rejected rows have the recorded one.
    here: str | None = None
    # Whether it was read, and fingerprinted, up to the last row in use only.
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """A work unit: consecutive rows of one file that are computed, stored and resumed as a whole.

    ordinal: its number in the corpus, from 0.
    file: index in `Manifest.files`.
    first_row: ordinal in the corpus of its first row.
    rows: how many it has.
    line: line, or row where rows are no lines, of its first row.
    offset: byte in the file where its first row begins; used for plain JSON lines only.
    duplicates: which of its rows repeat an earlier id, packed; empty if none does.
    digest: of what its rows were read from (see unit_digests.py); "" if it is not known, and then not checked.
    """

    ordinal: int
    file: int
    first_row: int
    rows: int
    line: int
    offset: int
    duplicates: bytes = b""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A corpus after one pass over it: its files and its work units, in input order.

    files: in input order.
    units: the work units, in input order.
    fields: the names of a row's fields, with the format that was recognised ("auto": the shape "fields").
    rows: of all files.
    duplicates: rows that repeat an earlier id.
    rows_per_unit: rows of a work unit, at most.
    limit: how many rows were taken at most, None for all.
    max_row_bytes: longer rows are rejected.
    unreadable: files and folders that were passed over.
    notes: sentences on what else was passed over, and on how rows are read; no part of the corpus.
    advice: where most of the first rows cannot be read, a sentence on their fields and what would read them.
    damaged: files that end before they should, and why; their rows before that are in use.
    pieces: its rows in order, as runs of rows of its files.
    earlier: of a corpus that has grown, what it was before, oldest first: {"corpus": digest of units.json then,
        "units": how many of its work units are still the same}.
    grown: rows that it had before, and how many of those were sketched and are computed again; None where it did not
        grow just now.
    unit_bytes: bytes of a work unit's rows, at most, unless it is one row; None: whatever they are.
    by_file: whether parts say of which corpus up to the file of their rows they are, not of which corpus; so in run
        directories that are begun now.
    is_whole: whether all files are there; else the first ones are, and the index goes on.
    """

    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    fields: Fields
    rows: int
    duplicates: int
    rows_per_unit: int
    limit: int | None
    max_row_bytes: int = MAX_ROW_BYTES
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    advice: str = field(default="", compare=False)
    damaged: tuple[Unreadable, ...] = ()
    pieces: tuple[Piece, ...] = ()
    earlier: tuple[Mapping[str, Any], ...] = ()
    grown: tuple[int, int] | None = field(default=None, compare=False)
    unit_bytes: int | None = None
    by_file: bool = False
    is_whole: bool = True

    def to_dict(self) -> dict[str, Any]:
        """What a run directory records of the corpus, JSON-able: all that decides which rows a work unit has."""
        # Only what is not as usual, so that directories of earlier versions go on.
        unusual: dict[str, Any] = {}
        if self.max_row_bytes != MAX_ROW_BYTES:
            unusual["max_row_bytes"] = self.max_row_bytes
        if self.unreadable:
            unusual["unreadable"] = [asdict(item) for item in self.unreadable]
        if self.damaged:
            unusual["damaged"] = [asdict(item) for item in self.damaged]
        if self.pieces and [piece.file for piece in self.pieces] != [*range(len(self.files))]:
            unusual["pieces"] = [[piece.file, piece.first, piece.rows] for piece in self.pieces]
        if self.earlier:
            unusual["earlier"] = list(self.earlier)
        if self.unit_bytes is not None:
            unusual["unit_bytes"] = self.unit_bytes
            unusual["rows_of_units"] = [written(rows) for rows in self._rows_of_units()]
        if self.by_file:
            unusual["format"] = BY_FILE
        if not self.is_whole:
            unusual["indexed"] = False
        return {
            **unusual,
            "units_total": len(self.units),
            "rows": self.rows,
            "duplicates": self.duplicates,
            "rows_per_unit": self.rows_per_unit,
            "limit": self.limit,
            "fields": {
                name: value
                for name, value in asdict(self.fields).items()
                if (name, value) != ("format", "auto")
            },
            "files": [
                {
                    name: value
                    for name, value in asdict(source).items()
                    # Where a corpus has not grown, its limit tells what is cut.
                    if name != "here" and (name != "cut" or (value and self.earlier))
                }
                for source in self.files
            ],
        }

    def _rows_of_units(self) -> Iterator[list[int]]:
        """Of each piece the rows of its work units."""
        first = 0
        for piece in self.pieces:
            rows: list[int] = []
            left = piece.rows
            while left:
                rows.append(self.units[first].rows)
                left -= rows[-1]
                first += 1
            yield rows

    def remarks(self) -> list[str]:
        """Sentences on what of the corpus is passed over, and on how the rest is read."""
        return [*self.notes, *(f"passed over '{item.path}': {item.reason}" for item in self.unreadable)]

    def recorded_as(self, recorded: Mapping[str, Any]) -> Manifest:
        """The same corpus under the paths of an equal manifest's dict, which may have more files, or fewer.

        The files are read from where they are.
        """
        paths = [entry["path"] for entry in recorded["files"][: len(self.files)]]
        paths += [source.path for source in self.files[len(paths) :]]
        files = [
            source if source.path == path else replace(source, path=path, here=source.here or source.path)
            for source, path in zip(self.files, paths, strict=True)
        ]
        return replace(self, files=tuple(files))


def pack_duplicates(repeats: list[tuple[int, int, int]]) -> bytes:
    """`Unit.duplicates` of (row within the work unit, file and line of the first row with its id)."""
    return zlib.compress(b"".join(_DUPLICATE.pack(*repeat) for repeat in repeats)) if repeats else b""


def unpack_duplicates(packed: bytes) -> dict[int, tuple[int, int]]:
    """{row within the work unit: file and line of the first row with its id} of `Unit.duplicates`."""
    content = zlib.decompress(packed) if packed else b""
    return {row: (file, line) for row, file, line in _DUPLICATE.iter_unpack(content)}
