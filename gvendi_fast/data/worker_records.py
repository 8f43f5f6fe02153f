"""What workers leave of themselves in a run directory: who works, on which units under which lease, and what failed.

    workers/<host>-<pid>-<8 hex>.json   one a worker: what it is, and what it has done since it started
    leases/unit-000012.json             who works on work unit 12 now, and until when
    failed/unit-000012.json             the attempts at work unit 12 that failed, and whether it is given up

They are for people and for other workers: a work unit is done when its part exists, whatever they say. Each is one JSON
object, written whole. Keys that this version does not know are passed over.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import host_name, is_dead, is_passing, names_in
from gvendi_fast.data.run_files import is_count

WORKERS, LEASES, FAILED = "workers", "leases", "failed"
FOLDERS = (WORKERS, LEASES, FAILED)
# A worker writes its record about every 20 s; one that has not for so long is lost.
LOST_AFTER_S = 120.0
LIVE, ENDED, LOST = "live", "ended", "lost"
# What ends an attempt: an exception, the end of the process, and no sign of life.
KINDS = ("error", "lost", "hung")
# More than any time in seconds, and a float.
_MOST = 1e18
_UNIT_FILE = re.compile(r"^unit-(?P<unit>\d{6,})\.json$", re.ASCII)


def unit_file(unit: int) -> str:
    """Name of the file of a work unit in `leases` and `failed`."""
    return f"unit-{unit:06d}.json"


@dataclass(frozen=True)
class WorkerRecord:
    """A worker and what it has done since it started.

    host, pid: where its process runs.
    engine, rank, device: how it was started; rank is None where the engine has no ranks.
    run: the command that it is a worker of.
    started, updated: unix seconds.
    units, rows, tokens, rejected: this worker's own, since it started.
    seconds: how long it was busy.
    at: ordinals of the work units that it has in work.
    ended: whether it has said that it ends.
    """

    host: str
    pid: int
    engine: str
    rank: int | None
    device: str
    run: str
    started: float
    updated: float
    units: int = 0
    rows: int = 0
    tokens: int = 0
    rejected: int = 0
    seconds: float = 0.0
    at: tuple[int, ...] = ()
    ended: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> WorkerRecord:
        """What `to_dict` gave. Raises GvendiError for a value that is missing or of another kind."""
        take = _Taker(content)
        return cls(
            host=take.text("host"),
            pid=take.count("pid"),
            engine=take.text("engine"),
            rank=None if content.get("rank") is None else take.count("rank"),
            device=take.text("device"),
            run=take.text("run"),
            started=take.number("started"),
            updated=take.number("updated"),
            units=take.count("units"),
            rows=take.count("rows"),
            tokens=take.count("tokens"),
            rejected=take.count("rejected"),
            seconds=take.number("seconds"),
            at=tuple(take.counts("at")),
            ended=take.flag("ended"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-able object of the file."""
        return {**asdict(self), "at": list(self.at)}

    def state(self, now: float | None = None) -> str:
        """ "live", "ended" or "lost": a process of this machine that is gone, or one long without a sign of life."""
        if self.ended:
            return ENDED
        now = time.time() if now is None else now
        is_gone = self.host == host_name() and is_dead(self.pid)
        return LOST if is_gone or now - self.updated > LOST_AFTER_S else LIVE


@dataclass(frozen=True)
class Lease:
    """Who works on a work unit now.

    unit: its ordinal. host, pid: the process. worker: the name of its record, without ".json". run: the command.
    attempt: from 1. taken, expires: unix seconds.
    """

    unit: int
    host: str
    pid: int
    worker: str
    run: str
    attempt: int
    taken: float
    expires: float

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Lease:
        """What `to_dict` gave. Raises GvendiError for a value that is missing or of another kind."""
        take = _Taker(content)
        return cls(
            unit=take.count("unit"),
            host=take.text("host"),
            pid=take.count("pid"),
            worker=take.text("worker"),
            run=take.text("run"),
            attempt=take.count("attempt"),
            taken=take.number("taken"),
            expires=take.number("expires"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-able object of the file."""
        return asdict(self)

    def is_expired(self, now: float | None = None) -> bool:
        """Whether another worker may take the work unit: its time is over, or its process of this machine is gone."""
        now = time.time() if now is None else now
        return now >= self.expires or (self.host == host_name() and is_dead(self.pid))


@dataclass(frozen=True)
class Attempt:
    """One that failed. kind: of `KINDS`. error: its message, of one or more lines. at: unix seconds."""

    host: str
    pid: int
    at: float
    kind: str
    error: str
    traceback: str = ""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Attempt:
        """What `to_dict` gave. Raises GvendiError for a value that is missing or of another kind."""
        take = _Taker(content)
        kind = take.text("kind")
        if kind not in KINDS:
            raise take.wrong("kind", f"one of {', '.join(KINDS)}")
        return cls(
            host=take.text("host"),
            pid=take.count("pid"),
            at=take.number("at"),
            kind=kind,
            error=take.text("error"),
            traceback=take.text("traceback"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-able object of the file."""
        return asdict(self)

    @property
    def last_line(self) -> str:
        """The last line of its error that says something."""
        lines = [line.strip() for line in self.error.splitlines() if line.strip()]
        return lines[-1] if lines else self.kind


@dataclass(frozen=True)
class FailedUnit:
    """A work unit and the attempts at it that failed, oldest first; quarantined: whether the run has given it up."""

    unit: int
    quarantined: bool = False
    attempts: tuple[Attempt, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FailedUnit:
        """What `to_dict` gave. Raises GvendiError for a value that is missing or of another kind."""
        take = _Taker(content)
        attempts = content.get("attempts")
        if not isinstance(attempts, list) or not all(isinstance(item, dict) for item in attempts):
            raise take.wrong("attempts", "a list of objects")
        return cls(take.count("unit"), take.flag("quarantined"), tuple(map(Attempt.from_dict, attempts)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON-able object of the file."""
        return {**asdict(self), "attempts": [attempt.to_dict() for attempt in self.attempts]}


Record = TypeVar("Record")


@dataclass(frozen=True)
class Records(Generic[Record]):
    """The records of one folder. found: {file name without ".json": record}; unreadable: {file name: why}."""

    found: dict[str, Record] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def read_workers(root: Path) -> Records[WorkerRecord]:
    """The records of the workers of a run directory; none where there is no folder of them."""
    return _read(root / WORKERS, WorkerRecord)


def read_leases(root: Path) -> Records[Lease]:
    """The leases of a run directory; none where there is no folder of them."""
    return _read(root / LEASES, Lease)


def read_failed(root: Path) -> Records[FailedUnit]:
    """The work units of a run directory that failed; none where there is no folder of them."""
    return _read(root / FAILED, FailedUnit)


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """The record in a file, None where there is no file; kind: one of the classes of this module.

    Raises GvendiError for anything else than a record, and where the file is named after another work unit.
    """
    try:
        content = json.loads(path.read_bytes().decode())
        if not isinstance(content, dict):
            raise GvendiError(f"it holds a {type(content).__name__}, not an object")
        record = kind.from_dict(content)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise GvendiError(f"'{path}' is a folder, not a file; remove it, nothing is lost with it") from error
    except (ValueError, RecursionError) as error:
        raise GvendiError(f"'{path}' is damaged ({error}); remove it, nothing is lost with it") from error
    named = _UNIT_FILE.match(path.name)
    unit = getattr(record, "unit", None)
    if unit is not None and (named is None or int(named["unit"]) != unit):
        raise GvendiError(
            f"'{path}' is damaged (it is of work unit {unit}); remove it, nothing is lost with it"
        )
    return record


def _read(folder: Path, kind: type[Record]) -> Records[Record]:
    records: Records[Record] = Records()
    for name in names_in(folder):
        if is_passing(name) or not name.endswith(".json"):
            continue
        try:
            record = read_record(folder / name, kind)
        except GvendiError as error:
            records.unreadable[name] = str(error)
            continue
        # One that was removed meanwhile is none.
        if record is not None:
            records.found[name.removesuffix(".json")] = record
    return records


class _Taker:
    """Takes values of an object, each of the kind that it must have."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def wrong(self, name: str, wanted: str) -> GvendiError:
        shown = json.dumps(self._content[name])[:60] if name in self._content else "missing"
        return GvendiError(f"{name} is {shown}; wanted {wanted}")

    def count(self, name: str) -> int:
        value = self._content.get(name)
        if not is_count(value):
            raise self.wrong(name, "a count")
        return value

    def counts(self, name: str) -> list[int]:
        value = self._content.get(name)
        if not isinstance(value, list) or not all(map(is_count, value)):
            raise self.wrong(name, "a list of counts")
        return value

    def number(self, name: str) -> float:
        value = self._content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST:
            raise self.wrong(name, "a number from 0")
        return float(value)

    def text(self, name: str) -> str:
        value = self._content.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self._content.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value
