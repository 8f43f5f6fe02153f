"""The run directory: what has been computed, in files that are written whole or not at all.

    spec.json                    what the sketches depend on; a command with another spec is refused
    units.json                   the corpus they come from: files with fingerprints, number of work units
    parts/rejected-000012.jsonl  the rows of work unit 12 that could not be scored; always written before its part
    parts/part-000012.parquet    the rows of work unit 12: id, group, row, sketch, tokens, length, loss, gradient_norm,
                                 norm_share by kind of layer, and, if asked for, group_sketches
    rejected.jsonl               all rejected rows in input order, written when the run is complete

A work unit is done when its part exists; no other state is kept. So any number of processes may work in one directory,
and one that is killed loses only the work units that it had not finished. Two that do the same work unit write the same
bytes: rows are sorted, and a part holds no time, host or order of arrival.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from gvendi_fast.base.differences import differences, flat
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, flush_folder, is_temporary, remove_stale
from gvendi_fast.data.parts import COLUMNS, OPTIONAL, Part, damaged, part_table, read_part, write_table
from gvendi_fast.data.rows import Rejected

__all__ = ["COLUMNS", "Part", "RunDirectory", "sketch_spec"]

_PART = re.compile(r"^part-(\d{6,})\.parquet$")
_ABSENT = object()


class RunDirectory:
    """A run directory; made by `open` (to compute into) or `load` (to read)."""

    def __init__(self, path: Path, spec: dict[str, Any], manifest: dict[str, Any] | None) -> None:
        self.path, self.spec, self.manifest = path, spec, manifest
        self.parts = path / "parts"

    @classmethod
    def open(
        cls, path: str | os.PathLike, spec: dict[str, Any], manifest: dict[str, Any] | None = None
    ) -> RunDirectory:
        """Make the directory, or continue in an existing one of the same spec and corpus.

        spec: a JSON-able dict of everything the sketches depend on.
        manifest: `Manifest.to_dict()` of the corpus; None keeps the recorded one.
        Several processes may open one directory at once; the first one's spec counts. Temporary files of killed
        processes are removed as `files.remove_stale` says.
        Raises GvendiError, with a list of every difference, if another spec or corpus is recorded, and for a folder
        with other things in it or a spec that JSON cannot hold.
        """
        root = Path(path)
        spec = _plain(spec, "spec")
        if manifest is not None:
            manifest = _plain(manifest, "manifest")
            if not isinstance(manifest.get("units_total"), int):
                raise GvendiError(
                    "manifest has no integer 'units_total'; wanted Manifest.to_dict() of the corpus"
                )
        _check_free(root)
        try:
            (root / "parts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GvendiError(
                f"the folder '{root}' cannot be made ({error.strerror}); give another --out"
            ) from error
        flush_folder(root)
        recorded = _agree(root / "spec.json", spec)
        if recorded != spec:
            raise GvendiError(
                f"run directory '{root}' was made with other settings:\n{_differences(recorded, spec)}\n"
                "sketches of different settings cannot be mixed: give another --out, or the recorded settings"
            )
        units = root / "units.json"
        if manifest is not None:
            known = _agree(units, manifest)
            if known != manifest:
                raise GvendiError(
                    f"run directory '{root}' was made from another corpus:\n{_corpus_differences(known, manifest)}\n"
                    "give another --out, or restore the recorded corpus"
                )
        elif units.exists():
            manifest = _read_json(units)
        for folder in (root, root / "parts"):
            remove_stale(folder)
        return cls(root, spec, manifest)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunDirectory:
        """An existing directory, finished or not, for reading. Raises GvendiError where there is none."""
        root = Path(path)
        if not (root / "spec.json").is_file():
            what = "has no spec.json" if root.exists() else "does not exist"
            raise GvendiError(
                f"'{root}' is not a run directory: it {what}; name the --out of 'gvendi sketch' or 'gvendi score'"
            )
        units = root / "units.json"
        return cls(root, _read_json(root / "spec.json"), _read_json(units) if units.is_file() else None)

    @property
    def sketch_spec(self) -> dict[str, Any]:
        """What the column `sketch` depends on."""
        return sketch_spec(self.spec)

    @property
    def units_total(self) -> int | None:
        """Number of work units of the corpus, None where no corpus was recorded."""
        return None if self.manifest is None else int(self.manifest["units_total"])

    @property
    def units_done(self) -> int:
        """Number of work units whose part exists now on disk."""
        return len(self.done())

    def done(self) -> list[int]:
        """Ordinals of the work units whose part exists now on disk, ascending."""
        names = os.listdir(self.parts) if self.parts.is_dir() else []
        return sorted(int(match[1]) for match in map(_PART.match, names) if match)

    def missing(self) -> str | None:
        """A sentence on the missing work units for a reader of the directory; None if all are done."""
        if self.units_total is None or self.units_done == self.units_total:
            return None
        return (
            f"'{self.path}' is not finished: {self.units_done} of {self.units_total} work units are done, and only "
            "their rows count; to go on, run the command that made it again"
        )

    def has_part(self, unit: int) -> bool:
        """Whether this work unit is done."""
        return self._part_path(unit).is_file()

    def write_part(self, part: Part, rejected: Sequence[Rejected] = ()) -> None:
        """Record a work unit as done: n accepted rows (n may be 0) in any order, and its rejected rows.

        Shapes and dtypes are those of `Part`; each row occurs once. Raises GvendiError for a column that is None,
        lengths that differ, a row that occurs twice, and a sketch that is not finite.
        """
        unit = part.unit
        if not 0 <= unit < (unit + 1 if self.units_total is None else self.units_total):
            raise GvendiError(
                f"write_part: unit is {unit}; the corpus has {self.units_total} work units, numbered from 0"
            )
        table = part_table(part)
        with atomic_write(self._rejected_path(unit)) as stream:
            for item in sorted(rejected, key=lambda item: (item.line, item.reason)):
                stream.write(json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n")
        with atomic_write(self._part_path(unit)) as stream:
            write_table(table, stream)

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
        for unit in self.done() if units is None else units:
            part = read_part(self._part_path(unit), unit, names)
            if part.sketches is not None:
                width = part.sketches.shape[1] if width is None else width
                if part.sketches.shape[1] != width:
                    why = f"sketches of width {part.sketches.shape[1]} among others of width {width}"
                    raise damaged(self._part_path(unit), why)
            yield part

    def rejected(self) -> Iterator[Rejected]:
        """The rejected rows of the work units that are done, in input order, read one at a time."""
        for unit in self.done():
            path = self._rejects_of(unit)
            with open(path, "rb") as stream:
                for line in stream:
                    try:
                        item = Rejected(**json.loads(line))
                    except (ValueError, TypeError) as error:
                        raise damaged(self._part_path(unit), f"'{path.name}' beside it: {error}") from error
                    yield item

    def finish(self) -> int:
        """Write `rejected.jsonl` of a complete run and return how many rows it lists.

        Raises GvendiError while work units are missing.
        """
        done = self.done()
        missing = sorted(set(range(self.units_total or 0)) - set(done))
        if missing:
            raise GvendiError(
                f"run directory '{self.path}' is not complete: {len(missing)} of {self.units_total} work units are "
                f"missing, the first is {missing[0]}; run the same command again to compute them"
            )
        count = 0
        with atomic_write(self.path / "rejected.jsonl") as stream:
            for unit in done:
                with open(self._rejects_of(unit), "rb") as source:
                    count += sum(1 for _ in source)
                    source.seek(0)
                    shutil.copyfileobj(source, stream)
        return count

    def _part_path(self, unit: int) -> Path:
        return self.parts / f"part-{unit:06d}.parquet"

    def _rejected_path(self, unit: int) -> Path:
        return self.parts / f"rejected-{unit:06d}.jsonl"

    def _rejects_of(self, unit: int) -> Path:
        path = self._rejected_path(unit)
        if not path.is_file():
            raise damaged(self._part_path(unit), f"'{path.name}' beside it is missing")
        return path


def sketch_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """What the column `sketch` of a run of this spec depends on: all but the groups that are kept beside it."""
    return {key: value for key, value in spec.items() if key != "groups"}


def _check_free(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise GvendiError(f"'{root}' is a file, but a run needs a folder: give another --out")
    if not root.is_dir() or (root / "spec.json").exists():
        return
    # A run that is killed before its first file is complete leaves only an empty folder and temporary files.
    others = [item.name for item in root.iterdir() if item.name != "parts" and not is_temporary(item.name)]
    others += [f"parts/{name}" for name in os.listdir(root / "parts")] if (root / "parts").is_dir() else []
    # Another process may have made it a run directory meanwhile.
    if others and not (root / "spec.json").exists():
        raise GvendiError(
            f"'{root}' is not a run directory and holds other things, such as '{sorted(others)[0]}'; give another --out"
        )


def _agree(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content` unless the file exists; return what the file holds now."""
    if not path.exists():
        with atomic_write(path, exclusive=True) as stream:
            stream.write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise GvendiError(f"'{path}' is damaged ({error}); restore it or give another --out") from error


def _plain(content: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise GvendiError(
            f"{name} cannot be written as JSON ({error}); wanted dicts, lists, strings and numbers"
        ) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = sorted(differences(flat(old), flat(new), _ABSENT), key=itemgetter(0))
    return "\n".join(
        f"  {key}: {_shown(was)} in the directory, {_shown(now)} now" for key, was, now in changed
    )


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _corpus_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line for each changed, new or missing file, then one for each setting that differs."""
    was, now = ({item["path"]: item for item in side.get("files", [])} for side in (old, new))
    lines = [f"  file '{path}' is missing now" for path in was if path not in now]
    lines += [f"  file '{path}' is new" for path in now if path not in was]
    for path in was:
        if path in now and was[path] != now[path]:
            changed = sorted(differences(was[path], now[path]), key=itemgetter(0))
            what = ", ".join(f"{key} {before} -> {after}" for key, before, after in changed)
            lines.append(f"  file '{path}' changed: {what}")
    if not lines and list(was) != list(now):
        lines.append("  the same files in another order")
    rest = _differences(*({key: side[key] for key in side if key != "files"} for side in (old, new)))
    return "\n".join([*lines, *([rest] if rest else [])])
