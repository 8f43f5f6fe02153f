"""A corpus as work units: one pass makes the manifest, after which any work unit can be read on its own.

rows.py says what a row is, sources.py how files are opened, file_index.py how a file is read, work_units.py how a work
unit is. Files are read one after the other, or, with an engine, each by itself wherever the engine says; what depends
on the files before (numbers, and which ids repeat) is then added in their order, and the manifest is the same.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, TYPE_CHECKING

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import naming
from gvendi_fast.data.file_index import FileIndex, FileScan, ToScan, scanner
from gvendi_fast.data.kinds import STANDARD_INPUT, kind_of
from gvendi_fast.data.listing import UNREADABLE, Unreadable, find_files, list_files
from gvendi_fast.data.manifest import Manifest, SourceFile, Unit, pack_duplicates
from gvendi_fast.data.pieces import Piece, Step
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Rejected, Row
from gvendi_fast.data.seen_ids import Repeat, SeenIds
from gvendi_fast.data.shapes import FIRST_ROWS, Recognised, check_format, recognise
from gvendi_fast.data.sources import first_records
from gvendi_fast.data.standard_input import kind_of_input, named, spooled
from gvendi_fast.data.unit_cuts import Cut
from gvendi_fast.data.work_units import UnitReader, read_unit

if TYPE_CHECKING:
    from gvendi_fast.data.hub_data import HubRows

__all__ = [
    "Fields",
    "Manifest",
    "Rejected",
    "Row",
    "SourceFile",
    "Unit",
    "UnitReader",
    "find_files",
    "index_corpus",
    "index_files",
    "read_unit",
]

ROWS_PER_UNIT = 4096
# Of `index_files`.
GROWTH = 0.1
# Of an engine: each costs it some requests.
MOST_TASKS = 512


def index_corpus(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    fields: Fields | None = None,
    rows_per_unit: int = ROWS_PER_UNIT,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    skip_unreadable: bool = False,
    plan: Callable[[Sequence[str]], Sequence[Step]] | None = None,
    hub: HubRows | None = None,
    unit_bytes: int | None = None,
    engine: Engine | None = None,
) -> Manifest:
    """Read the corpus once and cut it into work units.

    inputs: files, folders, globs, "-" and data sets of the hub as `list_files` takes them. A row is a line that is not
        empty, an item of a JSON array, a record of CSV, or a row of a table.
    fields: the names of a row's fields, and the shape of rows; "auto" is recognised from the first rows of the first
        file that has one to read.
    limit: read the first `limit` rows only, over all files in order, whether they can be read or not.
    rows_per_unit: rows of a work unit, at most; a work unit never spans files.
    max_row_bytes: of a row as text, or in the columns in use of a table; a longer row is rejected.
    skip_unreadable: pass over files and folders that cannot be read, and list them in `Manifest.unreadable`.
    plan: which pieces of the files found are read, in order, in place of every file whole (`growth.py`).
    hub: where rows of the hub are kept; None: in a temporary folder.
    unit_bytes: bytes of a work unit's rows, at most, unless it is one row (`unit_cuts.py`); None: not cut by bytes.
    engine: reads each file by itself, several at once, or each of several ranks some of them; with a limit or a plan,
        and in one process, files are read in turn.
    Of rows with the same id the first in input order counts, even if it is rejected for another reason. The ids seen
    take 64 MiB of memory at most, and those of one file as much, then a table of their digests is kept on disk, so
    memory does not grow with the rows (a work unit is one small object; a duplicate adds 16 bytes before compression).

    Raises GvendiError for inputs that do not exist or are not what their suffix says, an empty corpus, and a setting
    below 1, a format that there is not, and OSError, with the file's name, for what the system cannot read.
    """
    *_, last = index_files(
        inputs,
        fields,
        rows_per_unit,
        limit,
        max_row_bytes,
        skip_unreadable,
        plan,
        hub,
        unit_bytes,
        engine,
        growth=None,
    )
    return last


def index_files(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    fields: Fields | None = None,
    rows_per_unit: int = ROWS_PER_UNIT,
    limit: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    skip_unreadable: bool = False,
    plan: Callable[[Sequence[str]], Sequence[Step]] | None = None,
    hub: HubRows | None = None,
    unit_bytes: int | None = None,
    engine: Engine | None = None,
    growth: float | None = GROWTH,
) -> Iterator[Manifest]:
    """The corpus as `index_corpus` gives it, and before that what it is up to a file, as files are read.

    growth: the share of rows by which each manifest has more than the one before it, at least, so that all of them
        together cost little beside the last one; None: the last one alone.
    Manifests before the last have `is_whole` False, the first files and work units of the last, and some rows.
    """
    fields = fields or Fields()
    check_format(fields)
    for name, value in (
        ("rows_per_unit", rows_per_unit),
        ("limit", limit),
        ("max_row_bytes", max_row_bytes),
        ("unit_bytes", unit_bytes),
    ):
        if value is not None and value < 1:
            raise GvendiError(f"{name} is {value}; wanted at least 1")
    listing = list_files(inputs, skip_unreadable, with_hub=True)
    if listing.hub and hub is None:
        from gvendi_fast.data.hub_data import HubRows

        hub = HubRows()
    recorded = {name: hub.recorded(name) for name in listing.hub} if hub is not None else {}
    found = list(dict.fromkeys(recorded.get(path, path) for path in listing.files))
    fetched = set(recorded.values())
    indexing = _Indexing(
        fields,
        Cut(rows_per_unit, unit_bytes),
        limit,
        max_row_bytes,
        skip_unreadable,
        list(listing.unreadable),
        list(listing.notes),
    )

    def at(path: str, rows: int | None) -> tuple[str, str]:
        """Where a file lies, of which the first `rows` rows are read, and its kind."""
        if path == STANDARD_INPUT:
            here = spooled()
            return here, kind_of_input(here)
        if path in fetched and hub is not None:
            return hub.file(path, rows), "jsonl"
        return path, kind_of(path) or ""

    is_shared = engine is not None and (engine.is_remote or engine.world > 1)
    if limit is not None or plan is not None or engine is None or not is_shared:
        added = indexing.in_turn(map(Step, found) if plan is None else plan(found), at, plan is not None)
    else:
        added = indexing.each_by_itself(found, at, engine)
    told = 0.0
    for _ in added:
        # Before the shape of rows is known, what is told could turn out to be otherwise.
        if growth is not None and indexing.recognised is not None and indexing.rows > told:
            told = indexing.rows * (1 + growth)
            yield replace(indexing.manifest(), is_whole=False)
    yield indexing.manifest()


_At = Callable[[str, int | None], tuple[str, str]]


@dataclass
class _Indexing:
    """What is known of a corpus after some of its files."""

    fields: Fields
    cut: Cut
    limit: int | None
    max_row_bytes: int
    skip_unreadable: bool
    unreadable: list[Unreadable]
    notes: list[str]
    files: list[SourceFile] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    damaged: dict[str, Unreadable] = field(default_factory=dict)
    rows: int = 0
    duplicates: int = 0
    recognised: Recognised | None = None

    def in_turn(self, steps: Iterator[Step] | Sequence[Step], at: _At, looks_on: bool) -> Iterator[None]:
        """Read these pieces, one after the other; looks_on: whether it counts that there are rows behind one.

        Yields after each.
        """
        with SeenIds() as seen:
            for step in steps:
                rest = None if self.limit is None else self.limit - self.rows
                if step.file is None and rest == 0:
                    break
                if step.is_rest and (rest == 0 or not self.files[step.file].cut):
                    continue
                number = len(self.files) if step.file is None else step.file
                last = rest if step.rows is None else step.rows
                here, kind = at(step.path, None if last is None else step.first + last)
                try:
                    with naming(step.path):
                        self._recognise(here, kind, rest)
                        repeats = partial(_repeats, seen, number)
                        index = FileIndex(here, kind, self.cut, self.max_row_bytes, repeats)
                        index.scan(self._fields(), last, step.first, looks_on)
                except UNREADABLE as error:
                    self._refuse(error, here, step)
                    seen.forget(number)
                    continue
                self._add(step, number, here, kind, index.result())
                yield

    def each_by_itself(self, paths: Sequence[str], at: _At, engine: Engine) -> Iterator[None]:
        """Read whole files, each wherever `engine` says, and add what they hold in their order; yields after some."""
        here = [at(path, None) for path in paths]
        scans: dict[int, FileScan | Exception | None] = {}
        wanted: dict[int, ToScan] = {}
        for place, (path, (lies, kind)) in enumerate(zip(paths, here, strict=True)):
            try:
                with naming(path):
                    self._recognise(lies, kind, None)
            except UNREADABLE as error:
                scans[place] = error
                if not self.skip_unreadable:
                    break
                continue
            wanted[place] = ToScan(path, lies, kind, self._fields())
        with SeenIds() as seen, _Waiting() as waiting:
            following = 0

            def add_known() -> None:
                nonlocal following
                while following < len(paths) and (following in scans or following in waiting):
                    scan = scans.pop(following) if following in scans else waiting.take(following)
                    step = Step(paths[following])
                    if isinstance(scan, Exception):
                        self._refuse(scan, here[following][0], step)
                    else:
                        self._add_scan(step, wanted[following], scan, seen)
                    following += 1

            add_known()
            yield
            if following == len(paths):
                return
            places, files = list(wanted), list(wanted.values())
            size = -(-len(files) // MOST_TASKS)
            tasks = [files[first : first + size] for first in range(0, len(files), size)]
            for task, found in engine.map(partial(scanner, self.cut, self.max_row_bytes), tasks):
                for place, scan in zip(places[task * size :], found, strict=False):
                    if place == following:
                        scans[place] = scan
                    else:
                        waiting.put(place, scan)
                add_known()
                yield

    def _add_scan(self, step: Step, file: ToScan, scan: FileScan | None, seen: SeenIds) -> None:
        number = len(self.files)
        if scan is None:
            # The ids of a file with this many of them go to those of all files as it is read.
            try:
                with naming(step.path):
                    repeats = partial(_repeats, seen, number)
                    index = FileIndex(file.here, file.kind, self.cut, self.max_row_bytes, repeats)
                    index.scan(file.fields)
            except UNREADABLE as error:
                self._refuse(error, file.here, step)
                seen.forget(number)
                return
            scan = index.result()
        elif scan.ids is not None:
            scan = _with_repeats(scan, seen.repeats_of(number, scan.ids))
        self._add(step, number, file.here, file.kind, scan)

    def _recognise(self, here: str, kind: str, rest: int | None) -> None:
        if self.recognised is None:
            # No row beyond the limit has a say.
            count = FIRST_ROWS if rest is None else min(FIRST_ROWS, rest)
            first, names = first_records(here, kind, self.fields, count, self.max_row_bytes)
            self.recognised = recognise(first, self.fields, names) if first else None

    def _fields(self) -> Fields:
        return self.recognised.fields if self.recognised else self.fields

    def _refuse(self, error: Exception, here: str, step: Step) -> None:
        if here != step.path:
            named(error, here, step.path)
        if not self.skip_unreadable or step.file is not None:
            raise error
        self.unreadable.append(Unreadable.of(error, step.path))

    def _add(self, step: Step, number: int, here: str, kind: str, scan: FileScan) -> None:
        path, name = step.path, step.recorded_as or step.path
        source = SourceFile(
            name,
            kind,
            scan.size,
            step.first + scan.rows,
            scan.digest,
            None if name == here else here,
            scan.is_cut,
        )
        self.files[number:] = [source, *self.files[number + 1 :]]
        self.pieces.append(Piece(number, step.first, scan.rows))
        ordinal, first_row = len(self.units), self.rows
        self.units.extend(
            replace(unit, ordinal=ordinal + unit.ordinal, file=number, first_row=first_row + unit.first_row)
            for unit in scan.units
        )
        remarks = scan.remarks if scan.rows else [*scan.remarks, "holds no rows"]
        # A file of several pieces is read several times.
        self.notes += dict.fromkeys(
            note for remark in remarks if (note := f"corpus: '{path}' {remark}") not in self.notes
        )
        if scan.damage is not None:
            self.damaged[path] = Unreadable(path, scan.damage)
        self.rows += scan.rows
        self.duplicates += scan.duplicates

    def manifest(self) -> Manifest:
        """The corpus. Raises GvendiError for one without files that can be read, or without rows."""
        if not self.files:
            first = self.unreadable[0]
            raise GvendiError(
                f"corpus: none of its {len(self.unreadable)} file(s) and folder(s) can be read; the first one is "
                f"'{first.path}': {first.reason}"
            )
        if self.rows == 0:
            raise GvendiError(
                f"corpus: the {len(self.files)} file(s) given hold no rows; the first one is '{self.files[0].path}'"
            )
        recognised = self.recognised or Recognised(replace(self.fields, format="auto"))
        return Manifest(
            tuple(self.files),
            tuple(self.units),
            recognised.fields,
            self.rows,
            self.duplicates,
            self.cut.rows,
            self.limit,
            self.max_row_bytes,
            tuple(self.unreadable),
            (*self.notes, *recognised.notes),
            recognised.advice,
            tuple(self.damaged.values()),
            tuple(self.pieces),
            unit_bytes=self.cut.bytes,
        )


def _repeats(
    seen: SeenIds, number: int, unit: int, rows: Sequence[int], ids: Sequence[str], lines: Sequence[int]
) -> list[Repeat]:
    return seen.repeats(number, rows, ids, lines)


def _with_repeats(scan: FileScan, repeats: Iterable[tuple[int, list[Repeat]]]) -> FileScan:
    """The same file with the rows of its work units that repeat an id of it, or of those before it."""
    units, duplicates = list(scan.units), 0
    for unit, found in repeats:
        units[unit] = replace(units[unit], duplicates=pack_duplicates(found))
        duplicates += len(found)
    return replace(scan, units=tuple(units), duplicates=duplicates)


class _Waiting:
    """What is known of files whose turn has not come, in a temporary file that the system removes with the process."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, place: int) -> bool:
        return place in self._places

    def put(self, place: int, scan: FileScan | Exception | None) -> None:
        """Keep it for this place."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="gvendi-index-")  # noqa: SIM115 - lives as long as this object
        self._places[place] = self._file.seek(0, os.SEEK_END)
        pickle.dump(scan, self._file)

    def take(self, place: int) -> FileScan | Exception | None:
        """What was kept for this place."""
        assert self._file is not None
        self._file.seek(self._places.pop(place))
        return pickle.load(self._file)
