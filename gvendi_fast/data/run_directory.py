"""The run directory: what has been computed, in files that are written whole or not at all.

    spec.json                    what the sketches depend on; a command with another spec is refused
    units.json                   the corpus they come from: files with fingerprints, number of work units
    parameters.json              names and shapes of the sketched parameters, of which spec.json has the digest
    warnings.json                what the look at some rows warned of before the run
    parts/rejected-000012.jsonl  the rows of work unit 12 that could not be scored; always written before its part
    parts/part-000012.parquet    the rows of work unit 12: id, group, row, sketch, tokens, length, loss, gradient_norm,
                                 norm_share by kind of layer, and, if asked for, group_sketches; sketches may be coded
                                 (stored_sketches.py), with a column of scales
    rejected.jsonl               all rejected rows in input order, written when the run is complete
    workers/, leases/, failed/   who works, on what, and what failed (worker_records.py): hints for people and workers

A work unit is done when its part exists; no other state is kept. So any number of processes may work in one directory,
and one that is killed loses only the work units that it had not finished. Two that do the same work unit write the same
bytes: rows are sorted, and a part holds no time, host or order of arrival.

A part says of which work unit, rows, spec and corpus it is, and carries checksums (parts.py): whoever reads one
verifies what is read, so that a part that is damaged, or lies where another belongs, is an error with its name.
`broken` lists such parts, and a command that computes into the directory makes them anew.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gvendi_fast.base.differences import PARAMETERS, same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import (
    atomic_write,
    exists,
    flush_folder,
    is_passing,
    make_folder,
    names_in,
    remove_stale,
)
from gvendi_fast.base.os_errors import naming
from gvendi_fast.base.places import is_url, place
from gvendi_fast.data.corpora import Corpora
from gvendi_fast.data.hub_names import is_kept_file
from gvendi_fast.data.parts import (
    COLUMNS,
    OPTIONAL,
    DamagedPartError,
    Part,
    Stamp,
    checksum,
    part_file,
    part_table,
    read_part,
    read_stamp,
)
from gvendi_fast.data.recorded import agree, agree_on_corpus, differences_of, plain
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_files import (
    CUT,
    PARTS,
    PASSES,
    SPOOL,
    check_manifest,
    digest_of,
    lost_spec,
    paths_of_unit,
    read_json,
    unit_ranges,
)
from gvendi_fast.data.sketched_parameters import SketchedParameters, differing_from, keep_parameters
from gvendi_fast.data.stored_sketches import DEFAULT, check_store, store_of
from gvendi_fast.data.worker_records import FOLDERS

__all__ = ["COLUMNS", "DamagedPartError", "Part", "RunDirectory", "is_any_done", "sketch_spec"]

_FILE = re.compile(r"^(part|rejected)-(?P<unit>\d{6,})\.(parquet|jsonl)$", re.ASCII)
# {what a part says of it: record of a run directory}.
RECORDS = {"spec": "spec.json", "corpus": "units.json"}

_RENAMED = (
    "; where a library has renamed parameters since, the version of it that the directory was made with goes on with "
    "it"
)


class NoDigestWarning(UserWarning):
    """A run directory of an earlier version does not say of which parameters its sketches are."""


class RunDirectory:
    """A run directory; made by `open` (to compute into) or `load` (to read). Threads and processes may share one."""

    def __init__(self, path: Path, spec: dict[str, Any], manifest: dict[str, Any] | None) -> None:
        self.path, self.spec = path, spec
        # Of the command that read the corpus, where most of its first rows cannot be read; recorded nowhere.
        self.advice = ""
        self.parts = path / PARTS
        # Of what is recorded: a view of the directory may show another spec.
        self._spec_digest = digest_of(spec)
        self._says = {other: f"{name} says" for other, name in RECORDS.items()}
        self._take(manifest)
        sketch = spec.get("sketch")
        self._recorded_dim = sketch.get("dim") if isinstance(sketch, dict) else None
        self._store = store_of(spec)

    def __getstate__(self) -> dict[str, Any]:
        """What all processes of a command have alike."""
        return {**self.__dict__, "advice": ""}

    def _take(self, manifest: dict[str, Any] | None) -> None:
        self.manifest = manifest
        self._corpora = Corpora(manifest)
        self._ranges = None if manifest is None else unit_ranges(manifest)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        spec: dict[str, Any],
        manifest: dict[str, Any] | None = None,
        parameters: SketchedParameters | None = None,
    ) -> RunDirectory:
        """Make the directory, or continue in an existing one of the same spec and corpus.

        spec: a JSON-able dict of everything the sketches depend on.
        manifest: `Manifest.to_dict()` of the corpus; None keeps the recorded one.
        parameters: those that the sketches are of, whose digest the spec has. A directory of an earlier version has
            none, and keeps its spec.
        Several processes may open one directory at once; the first one's spec counts. Temporary files of killed
        processes are removed as `files.remove_stale` says. A corpus of the same files by content is the same under
        other paths: the recorded ones stay, and `manifest` of the result has them.
        A corpus that has grown, as `growth.index_for` has proved, replaces the recorded one; the score of before, and
        the part of the last work unit, if that was filled up, are removed first. One of which the first files are
        recorded, as its index went on, replaces those; `manifest` may be such a beginning (see `extend`).
        Raises GvendiError, with a list of every difference, if another spec or corpus is recorded, and for a folder
        with other things in it, a spec that JSON cannot hold, and a spec.json that is not that of the parts.
        """
        if not os.fspath(path):
            raise GvendiError(
                "the path of the run directory is empty; give a folder ('.' for the current one)"
            )
        root = place(path)
        spec = plain(spec, "spec")
        if manifest is not None:
            manifest = plain(manifest, "manifest")
            if not isinstance(manifest.get("units_total"), int):
                raise GvendiError(
                    "manifest has no integer 'units_total'; wanted Manifest.to_dict() of the corpus"
                )
        check_free(root)
        names_in(root)
        make_folder(root / PARTS)
        flush_folder(root)
        recorded = agree(root / "spec.json", spec)
        if not same_spec(recorded, spec):
            renamed = None if parameters is None else differing_from(root, recorded, parameters)
            raise GvendiError(
                f"run directory '{root}' was made with other settings:\n{differences_of(recorded, spec, renamed)}\n"
                "sketches of different settings cannot be mixed: give another --out, or the recorded settings"
                f"{'' if renamed is None else _RENAMED}"
            )
        if parameters is not None:
            keep_parameters(root, recorded, parameters)
        units = root / "units.json"
        if manifest is not None:
            manifest = agree_on_corpus(root, manifest)
        elif exists(units):
            manifest = check_manifest(units, read_json(units))
        for folder in (root, root / PARTS, *(root / name for name in FOLDERS)):
            if exists(folder):
                remove_stale(folder)
        return cls(root, recorded, manifest)

    def extend(self, manifest: dict[str, Any]) -> None:
        """Record a corpus of which more files are indexed, or all; raises as `open` does.

        manifest: `Manifest.to_dict()`. Where another process has recorded more, that stays.
        """
        self._take(agree_on_corpus(self.path, plain(manifest, "manifest"), goes_on=True))

    @property
    def is_indexed(self) -> bool:
        """Whether the corpus is recorded whole; else an index goes on, or was killed."""
        return self.manifest is None or "indexed" not in self.manifest

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunDirectory:
        """An existing directory, finished or not, for reading. Raises GvendiError where there is none."""
        run = cls._recorded(path)
        run._check_first_stamp()
        if (note := run.no_digest()) is not None:
            # Once for a directory, as Python shows one text of one line.
            warnings.warn(note, NoDigestWarning, stacklevel=2)
        return run

    @classmethod
    def _recorded(cls, path: str | os.PathLike) -> RunDirectory:
        """The directory by spec.json and units.json alone."""
        root = place(path)
        names_in(root)
        if not exists(root / "spec.json"):
            if (lost := lost_spec(root)) is not None:
                raise lost
            what = "has no spec.json" if exists(root) else "does not exist"
            raise GvendiError(
                f"'{root}' is not a run directory: it {what}; name the --out of 'gvendi sketch' or 'gvendi score'"
            )
        units = root / "units.json"
        manifest = check_manifest(units, read_json(units)) if exists(units) else None
        return cls(root, read_json(root / "spec.json"), manifest)

    def setting(self, *keys: str, kind: type = int) -> Any:
        """A value of spec.json by its keys, outermost first. Raises GvendiError where there is none of this kind."""
        value: Any = self.spec
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise GvendiError(
                f"'{self.path / 'spec.json'}' has no {kind.__name__} '{'.'.join(keys)}'; restore it, or sketch the "
                "corpus again into another --out"
            )
        return value

    @property
    def dim(self) -> int:
        """K, the width of the sketches, as spec.json has it."""
        dim = self.setting("sketch", "dim")
        if not 0 < dim < 1 << 31:
            raise GvendiError(
                f"'{self.path / 'spec.json'}' is damaged (sketch.dim is {str(dim)[:20]}); restore it"
            )
        return dim

    def no_digest(self) -> str | None:
        """A sentence on a directory of an earlier version, which does not say of which parameters its sketches are."""
        if PARAMETERS in self.spec or "proxy" not in self.spec:
            return None
        return (
            f"'{self.path}' is of an earlier version and has no digest of its parameters' names, so nobody would "
            "notice if a library had renamed some since; its sketches are read as they are"
        )

    @property
    def sketch_spec(self) -> dict[str, Any]:
        """What the column `sketch` depends on."""
        return sketch_spec(self.spec)

    @property
    def by(self) -> str | None:
        """The field, or the column of a training run's data, whose values are the groups of its rows."""
        training = self.spec.get("training")
        of_training = training.get("source") if isinstance(training, dict) else None
        return ((self.manifest or {}).get("fields") or {}).get("by") or of_training

    @property
    def units_total(self) -> int | None:
        """Number of work units of the corpus, None where no corpus was recorded."""
        return None if self.manifest is None else int(self.manifest["units_total"])

    @property
    def units_done(self) -> int:
        """Number of work units whose part exists now on disk."""
        return len(self.done())

    def done(self) -> list[int]:
        """Ordinals of the work units of the corpus whose part exists now on disk, ascending."""
        return self._listed()[0]

    def strangers(self) -> list[Path]:
        """Files named like those of a work unit that belong to none of the corpus, and so are never read."""
        return self._listed()[1]

    def _listed(self) -> tuple[list[int], list[Path]]:
        units, strangers = [], []
        for name in names_in(self.parts):
            match = _FILE.match(name)
            if match is None:
                continue
            unit = int(match["unit"])
            is_part = name == self.part_path(unit).name
            if not (is_part or name == self._rejected_path(unit).name) or (
                self.units_total is not None and unit >= self.units_total
            ):
                strangers.append(self.parts / name)
            elif is_part:
                units.append(unit)
        return sorted(units), strangers

    def missing(self) -> str | None:
        """A sentence on the missing work units for a reader of the directory; None if all are done."""
        if not self.is_indexed:
            return (
                f"'{self.path}' is not finished: its corpus is still being indexed, and {self.units_done} of the "
                f"{self.units_total} work units so far are done; to go on, run the command that made it again"
            )
        if self.units_total is None or self.units_done == self.units_total:
            return None
        return (
            f"'{self.path}' is not finished: {self.units_done} of {self.units_total} work units are done, and only "
            "their rows count; to go on, run the command that made it again"
        )

    def has_part(self, unit: int) -> bool:
        """Whether this work unit is done."""
        return exists(self.part_path(unit))

    def broken(
        self, inputs: Mapping[int, str] | None = None, units: Sequence[int] | None = None
    ) -> list[DamagedPartError]:
        """What is wrong with each part that cannot be used, in the order of work units; all of every part is read.

        inputs: digest of what each work unit is read from; a part that was made from something else cannot be used.
        units: of these work units alone, which are done; None for all.
        Raises OSError where the system does not let one be read, and GvendiError where spec.json or units.json is the
        one that does not agree with the parts.
        """
        found = []
        looked = self.done() if units is None else units
        for unit in looked:
            try:
                self.verify(unit, "" if inputs is None else inputs[unit])
            except DamagedPartError as damage:
                found.append(damage)
        proper = len(looked) - sum(1 for item in found if not item.is_foreign)
        for other, name in RECORDS.items():
            strays = [item for item in found if item.other == other]
            if strays and len(strays) == proper:
                raise self._edited(name, strays[0].unit)
        return found

    def as_stamped(self) -> tuple[RunDirectory, list[str]]:
        """The directory by what its parts say, and the names of the records that are of none of them.

        Such a record, and one that could not be read (it is {} or None here), is left out: the digest that most parts
        have stands in its place, so that the parts can still be verified, and compared with one another.
        """
        stamps = []
        for unit in self.done():
            # Whoever reads the part says so.
            with suppress(DamagedPartError, OSError):
                stamps.append(read_stamp(self.part_path(unit)))
        digests, says, strange = (
            {"spec": self._spec_digest, "corpus": self._corpora.last},
            dict(self._says),
            [],
        )
        for other, recorded in digests.items():
            found = Counter(getattr(stamp, other) for stamp in stamps if stamp is not None)
            own = {recorded, *(self._corpora if other == "corpus" else ())}
            if found and own.isdisjoint(found):
                digests[other] = found.most_common(1)[0][0]
                says[other] = "most parts were"
                strange.append(RECORDS[other])
        spec = {} if RECORDS["spec"] in strange else self.spec
        run = RunDirectory(self.path, spec, None if RECORDS["corpus"] in strange else self.manifest)
        run._spec_digest, run._says = digests["spec"], says
        if RECORDS["corpus"] in strange:
            run._corpora = Corpora.of_stamp(digests["corpus"])
        return run, strange

    def verify(self, unit: int, input: str = "") -> int:
        """Raise DamagedPartError, as `iterate` and `rejected` do, unless a part and its rejected rows can be used.

        input: digest of what the work unit is read from, "" if it is not known. Returns its number of rows.
        """
        part, stamp = self._read(unit, [*COLUMNS, *OPTIONAL])
        self._rejected(unit, stamp)
        path = self.part_path(unit)
        if stamp is not None and input and stamp.input and stamp.input != input:
            raise DamagedPartError(path, "it was made from other rows than the corpus has", "rows")
        return len(part.ids)

    def write_part(self, part: Part, rejected: Sequence[Rejected] = (), input: str = "") -> None:
        """Record a work unit as done: n accepted rows (n may be 0) in any order, and its rejected rows.

        Shapes and dtypes are those of `Part`; each row occurs once. Sketches are kept as the spec's `store` says.
        input: digest of what the work unit was read from.
        Raises GvendiError for a column that is None, lengths that differ, a row that occurs twice or is not of the work
        unit, and a sketch that is not finite.
        """
        unit = part.unit
        if not 0 <= unit < (unit + 1 if self.units_total is None else self.units_total):
            raise GvendiError(
                f"write_part: unit is {unit}; the corpus has {self.units_total} work units, numbered from 0"
            )
        check_store(self._store)
        table = part_table(part, self._store)
        first, rows = self._rows_of(unit, table["row"].to_numpy())
        lines = b"".join(
            json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n"
            for item in sorted(rejected, key=lambda item: (item.line, item.reason))
        )
        stamp = Stamp(
            unit,
            first,
            rows,
            accepted=table.num_rows,
            dim=np.shape(part.sketches)[1],
            spec=self._spec_digest,
            corpus=self._corpora.of(unit),
            input=input,
            rejected=checksum(lines),
        )
        pages, footer = part_file(table, stamp)
        # `open` has removed what killed processes left.
        with atomic_write(self._rejected_path(unit), sweep=False) as stream:
            stream.write(lines)
        with atomic_write(self.part_path(unit), sweep=False) as stream:
            stream.write(pages)
            stream.write(footer)

    def remove_part(self, unit: int) -> None:
        """Undo what `write_part` did for a work unit."""
        for path in (self.part_path(unit), self._rejected_path(unit)):
            path.unlink(missing_ok=True)
        flush_folder(self.parts)

    def _rows_of(self, unit: int, rows: np.ndarray) -> tuple[int, int]:
        """(first row, rows) of a work unit of which these ascending rows are accepted."""
        if self._ranges is None:
            return (int(rows[0]), int(rows[-1] - rows[0]) + 1) if len(rows) else (0, 0)
        first, count = self._ranges.of(unit)
        if len(rows) and not first <= rows[0] <= rows[-1] < first + count:
            raise GvendiError(
                f"write_part: rows of work unit {unit} are {rows[0]} to {rows[-1]}; wanted some of {first} to "
                f"{first + count - 1}"
            )
        return first, count

    def iterate(
        self, columns: Sequence[str] | None = None, units: Sequence[int] | None = None
    ) -> Iterator[Part]:
        """The parts that exist, in the order of work units, one in memory at a time.

        columns: names as in the file (`COLUMNS`, and `OPTIONAL`, which stay None where a part lacks them), None for all
            of `COLUMNS`.
        units: only the parts of these work units, None for all.
        Raises GvendiError for an unknown column, and, with its name, for a part that is damaged or of another width.
        """
        names = list(COLUMNS) if columns is None else list(columns)
        unknown = [name for name in names if name not in COLUMNS and name not in OPTIONAL]
        if unknown:
            raise GvendiError(
                f"columns: there is no column {unknown[0]!r}; wanted some of {', '.join([*COLUMNS, *OPTIONAL])}"
            )
        return self._iterate(names, units)

    def _iterate(self, names: list[str], units: Sequence[int] | None) -> Iterator[Part]:
        width: int | None = None
        end = 0
        for unit in self.done() if units is None else units:
            part, stamp = self._read(unit, names)
            if stamp is not None and units is None and stamp.rows:
                if stamp.first_row < end:
                    why = "its rows are not behind those of the part before it"
                    raise DamagedPartError(self.part_path(unit), why)
                end = stamp.first_row + stamp.rows
            if part.sketches is not None:
                width = part.sketches.shape[1] if width is None else width
                if part.sketches.shape[1] != width:
                    why = f"sketches of width {part.sketches.shape[1]} among others of width {width}"
                    raise DamagedPartError(self.part_path(unit), why)
            yield part

    def _read(self, unit: int, names: Sequence[str]) -> tuple[Part, Stamp | None]:
        """Columns of a part, verified to be those of this work unit of this run."""
        path = self.part_path(unit)
        part, stamp = read_part(path, unit, names)
        if stamp is not None:
            self._check_stamp(unit, stamp)
        elif self._ranges is not None:
            first, count = self._ranges.of(unit)
            rows = part.rows
            if len(rows) and not (first <= rows[0] <= rows[-1] < first + count and (np.diff(rows) > 0).all()):
                raise DamagedPartError(
                    path, f"its rows are not ascending ones of {first} to {first + count - 1}"
                )
        if "row" not in names:
            part.rows = None
        dim = self._recorded_dim
        if part.sketches is not None and dim is not None and part.sketches.shape[1] != dim:
            raise DamagedPartError(
                path, f"sketches of width {part.sketches.shape[1]}, not {dim} as spec.json says", "spec"
            )
        return part, stamp

    def _stamp(self, unit: int) -> Stamp | None:
        stamp = read_stamp(self.part_path(unit))
        if stamp is not None:
            self._check_stamp(unit, stamp)
        return stamp

    def _check_stamp(self, unit: int, stamp: Stamp) -> None:
        path = self.part_path(unit)
        if stamp.unit != unit:
            raise DamagedPartError(path, f"it is the part of work unit {stamp.unit}", "unit")
        if stamp.spec != self._spec_digest:
            raise DamagedPartError(path, f"it was made with other settings than {self._says['spec']}", "spec")
        if stamp not in self._corpora:
            raise DamagedPartError(
                path, f"it was made from another corpus than {self._says['corpus']}", "corpus"
            )

    def is_own(self, unit: int, stamp: Stamp) -> bool:
        """Whether a stamp is that of this work unit of this run."""
        return stamp.unit == unit and stamp.spec == self._spec_digest and stamp in self._corpora

    def _check_first_stamp(self) -> None:
        """An edited spec.json or units.json is noticed before anything of it is used."""
        for unit in self.done()[:1]:
            try:
                stamp = read_stamp(self.part_path(unit))
            except DamagedPartError:
                # Whoever reads the part says so.
                return
            if stamp is not None and stamp.unit == unit:
                if stamp.spec != self._spec_digest:
                    raise self._edited("spec.json", unit)
                if stamp not in self._corpora:
                    raise self._edited("units.json", unit)

    def _edited(self, name: str, unit: int) -> GvendiError:
        path = self.path / name
        if not exists(path):
            return GvendiError(f"'{path}' is missing; restore it, or run the command that made it again")
        return GvendiError(
            f"'{path}' is not the one that '{self.part_path(unit).name}' was made with; restore it, or "
            "sketch the corpus again into another --out"
        )

    def rejected(self, units: Sequence[int] | None = None) -> Iterator[Rejected]:
        """The rejected rows of the work units that are done, in input order, those of one in memory at a time.

        units: only those of these work units, None for all.
        """
        for unit in self.done() if units is None else units:
            yield from self._rejected(unit, self._stamp(unit))

    def _rejected(self, unit: int, stamp: Stamp | None) -> list[Rejected]:
        path = self._rejected_path(unit)
        try:
            return [
                _rejected_of(line) for line in self._rejected_lines(unit, stamp).splitlines(keepends=True)
            ]
        except (ValueError, TypeError) as error:
            if isinstance(error, DamagedPartError):
                raise
            raise DamagedPartError(self.part_path(unit), f"'{path.name}' beside it: {error}") from error

    def _rejected_lines(self, unit: int, stamp: Stamp | None) -> bytes:
        path = self._rejected_path(unit)
        if not exists(path):
            raise DamagedPartError(self.part_path(unit), f"'{path.name}' beside it is missing")
        with naming(path):
            lines = path.read_bytes()
        if stamp is not None and checksum(lines) != stamp.rejected:
            raise DamagedPartError(
                self.part_path(unit), f"the checksum of '{path.name}' beside it does not agree"
            )
        return lines

    def finish(self) -> int:
        """Write `rejected.jsonl` of a complete run and return how many rows it lists.

        Raises GvendiError while work units are missing.
        """
        done = self.done()
        missing = 0 if self.units_total is None else self.units_total - len(done)
        if not self.is_indexed:
            raise GvendiError(
                f"run directory '{self.path}' is not complete: its corpus is still being indexed; run the same command "
                "again to go on"
            )
        if missing:
            first = next((number for number, unit in enumerate(done) if unit != number), len(done))
            raise GvendiError(
                f"run directory '{self.path}' is not complete: {missing} of {self.units_total} work units are "
                f"missing, the first is {first}; run the same command again to compute them"
            )
        count = 0
        with atomic_write(self.path / "rejected.jsonl") as stream:
            for lines in self.rejected_lines():
                count += lines.count(b"\n")
                stream.write(lines)
        return count

    def rejected_lines(self) -> Iterator[bytes]:
        """The lines of `rejected.jsonl`, those of one work unit at a time."""
        for unit in self.done():
            yield self._rejected_lines(unit, self._stamp(unit))

    def part_path(self, unit: int) -> Path:
        """Where the part of a work unit lies, or will."""
        return paths_of_unit(self.path, unit)[0]

    def _rejected_path(self, unit: int) -> Path:
        return paths_of_unit(self.path, unit)[1]


def sketch_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """What the sketches of a run of this spec depend on: all but how they are stored, and the groups beside them."""
    return {key: value for key, value in spec.items() if key not in ("groups", "store")}


def recorded_store(path: str | os.PathLike) -> str:
    """How the run directory at this path keeps its sketches, or a new one does where there is none."""
    spec = place(path) / "spec.json"
    return store_of(read_json(spec)) if exists(spec) else DEFAULT


def is_any_done(path: Path) -> bool:
    """Whether a work unit of this directory, which may not be there, is done; told without its records."""
    return bool(RunDirectory(place(path), {}, None).done())


def check_free(root: Path) -> None:
    """Raises GvendiError unless a run directory is, or can be made, at this path."""
    if is_url(root):
        # It makes nothing, and refuses a place that cannot be written.
        root.mkdir()
    there = exists(root)
    if there and not root.is_dir():
        raise GvendiError(f"'{root}' is a file, but a run needs a folder: give another --out")
    if not there or exists(root / "spec.json"):
        return
    # A run that is killed before its first file is complete leaves only an empty folder and temporary files.
    others = [
        name
        for name in names_in(root)
        if name not in (PARTS, SPOOL, CUT, PASSES) and not is_passing(name) and not is_kept_file(name)
    ]
    if exists(root / PARTS):
        others += [f"parts/{name}" for name in names_in(root / PARTS) if not is_passing(name)]
    if others and (lost := lost_spec(root)) is not None:
        raise lost
    # Another process may have made it a run directory meanwhile.
    if others and not exists(root / "spec.json"):
        raise GvendiError(
            f"'{root}' is not a run directory and holds other things, such as '{sorted(others)[0]}'; give another --out"
        )


def _rejected_of(line: bytes) -> Rejected:
    item = Rejected(**json.loads(line))
    strings = [item.file, item.reason, "" if item.id is None else item.id]
    if not all(isinstance(value, str) for value in strings) or type(item.line) is not int:
        raise ValueError("a value is of the wrong type")
    return item
