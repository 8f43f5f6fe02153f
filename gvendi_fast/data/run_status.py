"""How far a run directory is: read while it is written, and whatever state it is in; nothing is changed.

What is done is told by the parts that are there. Who works, how fast, and what failed is told by the records of the
workers (worker_records.py), which a directory of an earlier version has not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists
from gvendi_fast.base.places import is_url, place
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import CUT, PASSES, check_manifest, read_json, unit_ranges
from gvendi_fast.data.worker_records import (
    ENDED,
    FOLDERS,
    LIVE,
    LOST,
    FailedUnit,
    Lease,
    WorkerRecord,
    read_failed,
    read_leases,
    read_workers,
)

# What counts as lately, and how many parts of it say more than what the workers did since they started.
RECENT_S, ENOUGH_PARTS = 600.0, 5


@dataclass(frozen=True)
class Rate:
    """Rows and tokens a second; tokens is None where nobody says."""

    rows: float
    tokens: float | None = None


@dataclass(frozen=True)
class WorkerStatus:
    """A worker's record, its name, and whether it is live, ended or lost; rate: since it started, while it was busy."""

    name: str
    record: WorkerRecord
    state: str
    rate: Rate | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rate = self.rate
        return {
            "name": self.name,
            "state": self.state,
            **self.record.to_dict(),
            "rows_per_second": rate and rate.rows,
            "tokens_per_second": rate and rate.tokens,
        }


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    units_total, rows_total: of the corpus, or of its first files while the others are indexed; None before that, and
        where units.json does not say.
    is_indexed: whether they are of the whole corpus.
    units_done, rows_done: by the parts that are there.
    tokens, rejected: what the workers did; None where none has a record.
    told: how many work units these workers did: as many as are done, or fewer where an earlier version did the others.
    workers: live ones first, then the lost, then those that have ended.
    rate: of the live workers together; None without one.
    recent: rows of the parts that were written lately; None where that cannot be told.
    recent_parts: how many these are.
    failed: work units that are not done and failed at least once.
    expired: leases of work units that are not done, whose holder is gone or late.
    unreadable: {file: why} of records that cannot be read.
    now: unix seconds.
    """

    path: str
    now: float
    units_total: int | None
    units_done: int
    rows_total: int | None
    rows_done: int | None
    tokens: int | None
    rejected: int | None
    told: int
    workers: tuple[WorkerStatus, ...]
    rate: Rate | None
    recent: Rate | None
    recent_parts: int
    failed: tuple[FailedUnit, ...]
    expired: tuple[Lease, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    is_indexed: bool = True

    @property
    def is_done(self) -> bool:
        """Whether every work unit has its part."""
        return self.is_indexed and self.units_total is not None and self.units_done >= self.units_total

    @property
    def live(self) -> int:
        """How many workers are at work."""
        return sum(worker.state == LIVE for worker in self.workers)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes, at the rate of the last minutes, or of the workers where those say too little."""
        if self.is_done:
            return 0.0
        # Nobody works on it, or nobody knows how much there is.
        if not self.is_indexed or (self.workers and not self.live):
            return None
        enough = max(ENOUGH_PARTS, 2 * self.live)
        rate = self.recent if self.recent is not None and self.recent_parts >= enough else self.rate
        rate = rate or self.recent
        if rate is None or not rate.rows or self.rows_total is None or self.rows_done is None:
            return None
        return (self.rows_total - self.rows_done) / rate.rows

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi status --json` prints."""
        of = {"rate": self.rate, "recent": self.recent}
        rates = {name: rate and {"rows": rate.rows, "tokens": rate.tokens} for name, rate in of.items()}
        return {
            "directory": self.path,
            "at": self.now,
            "done": self.is_done,
            "indexed": self.is_indexed and self.units_total is not None,
            "units_done": self.units_done,
            "units_total": self.units_total,
            "rows_done": self.rows_done,
            "rows_total": self.rows_total,
            "tokens": self.tokens,
            "rejected": self.rejected,
            "units_of_workers": self.told,
            "live": self.live,
            **rates,
            "recent_parts": self.recent_parts,
            "seconds_left": self.seconds_left,
            "failed": [item.to_dict() for item in self.failed],
            "expired": [lease.to_dict() for lease in self.expired],
            "workers": [worker.to_dict() for worker in self.workers],
            "unreadable": dict(self.unreadable),
        }


class StatusReader:
    """Reads how far a run directory is, once or again and again: a part's time is looked up once.

    path: of the run directory, or its URL.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = place(path)
        self._written: dict[int, float] = {}

    def _check(self) -> None:
        path = self.path
        # The first ones are there while a corpus is indexed, by ranks that share its files.
        marks = (CUT, PASSES, "spec.json", "units.json", "parts", *FOLDERS)
        if not any(exists(path / mark) for mark in marks):
            why = "it has neither spec.json nor parts" if exists(path) else "it does not exist, or not yet"
            raise GvendiError(
                f"'{path}' is not a run directory: {why}; name the --out of 'gvendi sketch' or 'gvendi score'"
            )

    def read(self, now: float | None = None) -> RunStatus:
        """The state now, or as of these unix seconds.

        Raises GvendiError where there is none, or no longer, and for a units.json that is damaged.
        """
        self._check()
        now = time.time() if now is None else now
        units = self.path / "units.json"
        manifest = check_manifest(units, read_json(units)) if exists(units) else None
        run = RunDirectory(self.path, {}, manifest)
        # Records before parts: what is removed when its part is written is gone, or its part is seen.
        records = read_workers(self.path), read_leases(self.path), read_failed(self.path)
        done = run.done()
        ranges = None if manifest is None else unit_ranges(manifest)
        rows = {} if ranges is None else {unit: ranges.of(unit)[1] for unit in done}
        at_work = {lease.worker for lease in records[1].found.values() if not lease.is_expired(now)}
        workers = _statuses(records[0].found, at_work, now)
        live = [worker for worker in workers if worker.state == LIVE]
        recent, parts = self._recent(run, rows, now) if ranges is not None else (None, 0)
        is_done = set(done)
        every = [worker.record for worker in workers]
        return RunStatus(
            path=str(self.path),
            now=now,
            units_total=run.units_total,
            units_done=len(done),
            rows_total=None if ranges is None else ranges.rows,
            rows_done=None if ranges is None else sum(rows.values()),
            tokens=sum(one.tokens for one in every) if every else None,
            rejected=sum(one.rejected for one in every) if every else None,
            told=sum(one.units for one in every),
            workers=workers,
            rate=_together(live),
            recent=recent,
            recent_parts=parts,
            failed=tuple(item for item in records[2].found.values() if item.unit not in is_done),
            expired=tuple(
                lease
                for lease in records[1].found.values()
                if lease.unit not in is_done and lease.is_expired(now)
            ),
            unreadable={name: why for some in records for name, why in some.unreadable.items()},
            is_indexed=run.is_indexed,
        )

    def _recent(self, run: RunDirectory, rows: Mapping[int, int], now: float) -> tuple[Rate | None, int]:
        """Rows a second by the parts written in the last minutes, and how many parts these are."""
        # A store takes a request for each.
        if is_url(self.path):
            return None, 0
        for unit in rows:
            if unit not in self._written:
                try:
                    self._written[unit] = run.part_path(unit).stat().st_mtime
                except FileNotFoundError:
                    # A damaged part is removed when it is made anew.
                    continue
        times = {unit: self._written[unit] for unit in rows if unit in self._written}
        # A file server's clock may be ahead of this one.
        now = max([now, *times.values()])
        late = sorted((at, unit) for unit, at in times.items() if now - at <= RECENT_S)
        if len(late) < 2:
            return None, len(late)
        # From the first of them on, whose own rows were made before it was written.
        seconds = max(now - late[0][0], 1e-9)
        return Rate(sum(rows[unit] for _, unit in late[1:]) / seconds), len(late)


def read_status(path: str | os.PathLike, now: float | None = None) -> RunStatus:
    """How far the run in this directory is. Raises GvendiError where there is none, and for a damaged units.json."""
    return StatusReader(path).read(now)


def _statuses(
    found: Mapping[str, WorkerRecord], at_work: Collection[str], now: float
) -> tuple[WorkerStatus, ...]:
    """Each worker's; at_work: names of those with a lease that holds, which are live however long they are silent."""
    order = {LIVE: 0, LOST: 1, ENDED: 2}
    made = []
    for name, record in found.items():
        rate = None
        if record.seconds > 0 and record.rows:
            rate = Rate(record.rows / record.seconds, record.tokens / record.seconds)
        state = record.state(now)
        state = LIVE if state == LOST and name in at_work else state
        made.append(WorkerStatus(name, record, state, rate))
    return tuple(
        sorted(
            made, key=lambda one: (order[one.state], one.record.rank or 0, one.record.host, one.record.pid)
        )
    )


def _together(workers: list[WorkerStatus]) -> Rate | None:
    rates = [worker.rate for worker in workers if worker.rate is not None]
    if not rates:
        return None
    return Rate(sum(rate.rows for rate in rates), sum(rate.tokens or 0.0 for rate in rates))
