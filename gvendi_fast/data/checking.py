"""What is wrong with a run directory: everything in it is read and compared, and nothing is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists, names_in, stale
from gvendi_fast.base.places import place
from gvendi_fast.data.originals import verify_corpus
from gvendi_fast.data.parts import DamagedPartError
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import (
    PAIRS,
    REMEDIES,
    SCORE,
    WARNINGS,
    check_manifest,
    read_json,
    read_score,
    read_warnings,
)
from gvendi_fast.data.sketched_parameters import read_parameters

DAMAGED, FOREIGN, UNREADABLE, LEFT, CHANGED = "damaged", "foreign", "unreadable", "left over", "changed"
MISSING = {
    "spec.json": f"it is missing; {REMEDIES['spec.json']}",
    "units.json": "it is missing; run the command that made it again",
}
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    path: of the file.
    kind: "damaged"; "foreign", of another run or of no work unit; "unreadable", as the system does not let it be read;
        "left over" by a process that was killed; "changed", of a corpus.
    what: what is wrong, and what mends it.
    """

    path: str
    kind: str
    what: str


@dataclass
class Checked:
    """What `check_run` saw: the findings, and of how many parts (those of work units) how many are whole, with rows."""

    findings: list[Finding] = field(default_factory=list)
    parts: int = 0
    whole: int = 0
    rows: int = 0
    units_total: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi check --json` prints."""
        return asdict(self)

    def add(self, path: str | os.PathLike, kind: str, what: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(os.fspath(path), kind, what))

    @contextmanager
    def noting(self, path: str | os.PathLike, kind: str = DAMAGED) -> Iterator[None]:
        """Errors of the block become findings: of content those of this kind, of the system unreadable files."""
        try:
            yield
        except DamagedPartError as error:
            self.add(error.path, kind, f"{error.why}; run the command that made it again")
        except GvendiError as error:
            self.add(path, kind, str(error))
        except OSError as error:
            if error.errno is None:
                raise
            self.add(
                error.filename or path, UNREADABLE, f"{os.strerror(error.errno)}; its content may be whole"
            )


def check_run(
    path: str | os.PathLike, with_corpus: bool = False, corpus: str | os.PathLike | None = None
) -> Checked:
    """Everything that is wrong with a run directory; all of it is read.

    with_corpus: read the corpus too and compare it with units.json. corpus: the folder that holds it now, if it has
    moved. Raises GvendiError where `path` is no run directory.
    """
    root, seen = place(path), Checked()
    names_in(root)
    if not exists(root / "spec.json") and not exists(root / "parts"):
        why = "it has neither spec.json nor parts" if exists(root) else "it does not exist"
        raise GvendiError(
            f"'{root}' is not a run directory: {why}; name the --out of 'gvendi sketch' or 'gvendi score'"
        )
    run = _check_parts(_recorded(root, seen), seen)
    seen.units_total = run.units_total
    is_whole = not seen.findings and run.missing() is None
    if is_whole:
        _check_rejected(run, seen)
    with seen.noting(root / WARNINGS):
        read_warnings(root)
    with seen.noting(root / PAIRS):
        read_parameters(root, run.spec)
    _check_score(run, seen, is_whole)
    noted = {item.path for item in seen.findings}
    for folder in (root, run.parts):
        # What cannot be listed has been said.
        if os.fspath(folder) in noted or not exists(folder):
            continue
        with seen.noting(folder):
            for left in stale(folder):
                seen.add(
                    left,
                    LEFT,
                    "a process that was killed left it; the next run into the directory removes it",
                )
    if with_corpus:
        for file, problem in verify_corpus(run, corpus):
            with seen.noting(file, CHANGED):
                problem()
    return seen


def _recorded(root: Path, seen: Checked) -> RunDirectory:
    """The directory, with nothing in place of a spec.json or units.json that cannot be used."""
    spec: dict[str, Any] = {}
    manifest = None
    with seen.noting(root / "spec.json"):
        if not exists(root / "spec.json"):
            raise GvendiError(MISSING["spec.json"])
        spec = read_json(root / "spec.json")
    units = root / "units.json"
    with seen.noting(units):
        manifest = check_manifest(units, read_json(units)) if exists(units) else None
    return RunDirectory(root, spec, manifest)


def _check_parts(run: RunDirectory, seen: Checked) -> RunDirectory:
    """Verify every part; the result is the directory without a record that is not that of its parts."""
    with seen.noting(run.parts):
        said = {Path(item.path).name for item in seen.findings}
        run, strange = run.as_stamped()
        for name in strange:
            # What cannot be read has been said.
            if name not in said:
                is_there = exists(run.path / name)
                why = f"it is not the one that the parts were made with; {REMEDIES[name]}"
                seen.add(run.path / name, DAMAGED, why if is_there else MISSING[name])
        found, others = _verified(run)
        if others and not found.whole and all(item.other == "spec" for item in others):
            # Parts of earlier versions do not say which spec is theirs, but how wide they are. One cause, one line.
            seen.add(run.path / "spec.json", DAMAGED, f"{others[0].why}; {REMEDIES['spec.json']}")
            run = RunDirectory(run.path, {}, run.manifest)
            found, _ = _verified(run)
        seen.parts, seen.whole, seen.rows = found.parts, found.whole, found.rows
        seen.findings += found.findings
        for stranger in run.strangers():
            seen.add(
                stranger, FOREIGN, "it belongs to no work unit of the corpus and is never read; move it away"
            )
    return run


def _verified(run: RunDirectory) -> tuple[Checked, list[DamagedPartError]]:
    """What all parts are found to be, and those that are another's."""
    found, others, done = Checked(), [], run.done()
    found.parts = len(done)
    for unit in done:
        path = run.part_path(unit)
        with found.noting(path):
            try:
                found.rows += run.verify(unit)
                found.whole += 1
            except DamagedPartError as damage:
                if not damage.is_foreign:
                    raise
                others.append(damage)
                found.add(path, FOREIGN, f"{damage.why}; run the command that made it again")
    return found, others


def _check_rejected(run: RunDirectory, seen: Checked) -> None:
    path = run.path / REJECTED
    with seen.noting(path):
        if exists(path) and path.read_bytes() != b"".join(run.rejected_lines()):
            seen.add(path, DAMAGED, "it does not list the rejected rows of the parts; run the command again")


def _check_score(run: RunDirectory, seen: Checked, is_whole: bool) -> None:
    path = run.path / SCORE
    with seen.noting(path):
        if not exists(path):
            return
        found = read_score(path)
        if not is_whole:
            # Of rows that are not there any more.
            return
        wanted = {"n": seen.rows, "units_done": seen.parts, "units_total": seen.units_total}
        for name, value in wanted.items():
            if name not in found or found[name] != value:
                shown = json.dumps(found[name], ensure_ascii=False)[:60] if name in found else "missing"
                seen.add(path, DAMAGED, f"its {name} is {shown} and the run's {value}; {REMEDIES[SCORE]}")
                return
