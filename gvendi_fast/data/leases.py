"""Who works on which work unit: leases that end by themselves, and the count of attempts that failed.

A lease is a hint, which saves work and decides nothing: a work unit is done when its part exists, and two workers that
do the same one write the same bytes. So no clock and no file system has to be trusted: a lease that has not been
renewed for its whole length, by the clock of whoever waits, is void, and so is one whose process has ended, where that
can be asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists, host_name, is_dead, make_folder, put_quickly
from gvendi_fast.data.worker_records import (
    FAILED,
    LEASES,
    WORKERS,
    Attempt,
    FailedUnit,
    Lease,
    WorkerRecord,
    read_failed,
    read_leases,
    read_record,
    unit_file,
)

# A lease that ended so long ago is void whatever the clocks of two machines are apart.
_LONG_OVER_S = 600.0
# Renewals of a lease in its length, so that one which comes late does not end it.
_RENEWALS = 4
# More than any run takes, and less than what a thread can wait for.
_MOST_S = 1e9
# What is kept of an error's message and traceback.
_MOST_TEXT = 20_000


@dataclass(frozen=True)
class Terms:
    """When a work unit is taken from whoever has it, and when it is given up.

    lease_s: seconds until a lease that is not renewed is void.
    max_attempts: of a work unit that ends in an error or hangs, before it is quarantined.
    max_losses: of a work unit whose worker is lost, in one run: more, since most workers are lost by no fault of it.
    hang_after_s: seconds without any progress after which a work unit counts as hung; None: never.
    """

    lease_s: float = 60.0
    max_attempts: int = 3
    max_losses: int = 5
    hang_after_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("lease_s", "hang_after_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MOST_S:
                raise GvendiError(f"{name} is {value}; wanted seconds above 0, and at most {_MOST_S:g}")
        for name in ("max_attempts", "max_losses"):
            if getattr(self, name) < 1:
                raise GvendiError(f"{name} is {getattr(self, name)}; wanted at least 1")


class LeaseWatch:
    """Tells which leases of a run directory hold; one that stays as it was first seen for its whole length does not."""

    def __init__(self, root: Path, terms: Terms) -> None:
        self.root, self.terms = root, terms
        # Those that the last `held` has found to hold no more.
        self.void: frozenset[Lease] = frozenset()
        self._seen: dict[int, tuple[Lease, float]] = {}

    def is_live(self, lease: Lease) -> bool:
        """Whether its holder can be at work."""
        if lease.host == host_name():
            if is_dead(lease.pid):
                return False
            # A process of before had this process' number.
            if lease.pid == os.getpid() and lease.worker not in _here:
                return False
        now = time.monotonic()
        known = self._seen.get(lease.unit)
        if known is None or known[0] != lease:
            known = self._seen[lease.unit] = (lease, now)
        return time.time() < lease.expires + _LONG_OVER_S and now - known[1] < self.terms.lease_s

    def held(self) -> dict[int, Lease]:
        """{work unit: the lease on it} of those that hold."""
        found = list(read_leases(self.root).found.values())
        held = {lease.unit: lease for lease in found if self.is_live(lease)}
        self.void = frozenset(lease for lease in found if lease.unit not in held)
        return held

    def sweep(self, done: Collection[int]) -> None:
        """Remove the leases on work units that are done, which workers leave that are killed in between."""
        for lease in read_leases(self.root).found.values():
            if lease.unit in done:
                (self.root / LEASES / unit_file(lease.unit)).unlink(missing_ok=True)

    def sentence(self, units: Sequence[int]) -> str:
        """Whom these work units are waited for."""
        held = {unit: lease for unit, lease in self.held().items() if unit in set(units)}
        count = f"{len(units)} work unit{'s' * (len(units) != 1)}"
        who = sorted({f"{lease.host}, process {lease.pid}" for lease in held.values()})
        more = f" and {len(who) - 3} more" if len(who) > 3 else ""
        at = f" that others are at ({'; '.join(who[:3])}{more})" if who else ""
        return f"waiting for {count}{at}; a lease that is not renewed ends after {self.terms.lease_s:g} s"


class Leases:
    """The leases of one worker on work units of a run directory, and its record there.

    root: the run directory. run: the command, which several workers share: losses of another one do not count.
    void: leases of others that the command has watched for their whole length, for which a new worker would wait anew.
    Until `close`, a thread renews them and rewrites the record. Methods may be called from any thread.
    """

    def __init__(
        self,
        root: Path,
        terms: Terms,
        run: str,
        engine: str,
        rank: int | None = None,
        device: str = "cpu",
        void: Collection[Lease] = (),
    ) -> None:
        self.root, self.terms, self.run, self.void = root, terms, run, void
        now = time.time()
        self.record = WorkerRecord(host_name(), os.getpid(), engine, rank, device, run, now, now)
        self.name = f"{self.record.host}-{self.record.pid}-{uuid4().hex[:8]}"
        # Of what is held, and of the files of it: a lease that is let go is not renewed behind that.
        self._door, self._files = threading.Lock(), threading.Lock()
        self._held: dict[int, Lease] = {}
        self._watch = LeaseWatch(root, terms)
        self._stop = threading.Event()
        self._lively = time.monotonic()
        _here.add(self.name)
        for folder in (WORKERS, LEASES):
            make_folder(root / folder)
        self._write()
        self._pulse = threading.Thread(target=self._renewing, name="leases", daemon=True)
        self._pulse.start()

    def take(self, unit: int) -> bool:
        """Have a work unit; False where another worker has it, or where this takes note that it is to be given up."""
        path = self.root / LEASES / unit_file(unit)
        with self._door:
            if unit in self._held:
                return True
        # An engine may hand out again, behind its back, what the run has given up.
        if self._failed(unit).quarantined:
            return False
        try:
            found = read_record(path, Lease)
        # One that is damaged, as a power cut leaves them, would keep every worker from this work unit.
        except GvendiError:
            path.unlink(missing_ok=True)
            found = None
        if found is not None:
            if self._is_live(found):
                return False
            if found.run == self.run:
                gone = Attempt(found.host, found.pid, found.taken, "lost", _LOST, "")
                if self._add(unit, gone).quarantined:
                    path.unlink(missing_ok=True)
                    return False
            path.unlink(missing_ok=True)
        now = time.time()
        attempt = 1 if found is None else found.attempt + 1
        record = self.record
        lease = Lease(
            unit, record.host, record.pid, self.name, self.run, attempt, now, now + self.terms.lease_s
        )
        if not put_quickly(path, _content(lease), exclusive=True):
            return False
        with self._door:
            self._held[unit] = lease
            self._lively = time.monotonic()
        return True

    def is_suspect(self, unit: int) -> bool:
        """Whether an attempt at a work unit has failed, or its worker was lost, perhaps by its fault.

        Losses of other commands do not count towards giving it up, but one that ends each command would end all of them
        at one place.
        """
        if exists(self.root / FAILED / unit_file(unit)):
            return True
        found = _lease(self.root / LEASES / unit_file(unit))
        return found is not None and not self._is_live(found)

    def _is_live(self, lease: Lease) -> bool:
        return lease not in self.void and self._watch.is_live(lease)

    def alive(self) -> None:
        """Work goes on: what was begun does not count as hung for another while."""
        self._lively = time.monotonic()

    def done(self, unit: int, rows: int, tokens: int, rejected: int, seconds: float) -> None:
        """A work unit's part is written."""
        record = self.record
        self.record = replace(
            record,
            units=record.units + 1,
            rows=record.rows + rows,
            tokens=record.tokens + tokens,
            rejected=record.rejected + rejected,
            seconds=record.seconds + seconds,
        )
        self.release([unit])
        failed = self.root / FAILED / unit_file(unit)
        if exists(failed):
            failed.unlink(missing_ok=True)

    def failed(self, unit: int, error: BaseException) -> bool:
        """Note that an attempt has ended in an error; returns whether the work unit is quarantined."""
        said = f"{type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        record = self.record
        return self._add(
            unit,
            Attempt(record.host, record.pid, time.time(), "error", said[:_MOST_TEXT], text[-_MOST_TEXT:]),
        ).quarantined

    def release(self, units: Iterable[int]) -> None:
        """Let go of work units."""
        with self._files:
            with self._door:
                mine = [unit for unit in units if self._held.pop(unit, None) is not None]
            for unit in mine:
                (self.root / LEASES / unit_file(unit)).unlink(missing_ok=True)
        self._lively = time.monotonic()
        self._write()

    def close(self) -> None:
        """Let go of everything, and write in the record that the worker has ended."""
        self._stop.set()
        self._pulse.join()
        self.record = replace(self.record, ended=True)
        with self._door:
            held = list(self._held)
        self.release(held)
        _here.discard(self.name)

    def _add(self, unit: int, attempt: Attempt) -> FailedUnit:
        path, found = self.root / FAILED / unit_file(unit), self._failed(unit)
        known = {(item.host, item.pid, item.at) for item in found.attempts}
        if (attempt.host, attempt.pid, attempt.at) not in known:
            found = replace(found, attempts=(*found.attempts, attempt))
        losses = sum(item.kind == "lost" for item in found.attempts)
        faults = len(found.attempts) - losses
        is_over = losses >= self.terms.max_losses or faults >= self.terms.max_attempts
        found = replace(found, quarantined=found.quarantined or is_over)
        make_folder(path.parent)
        put_quickly(path, _content(found))
        return found

    def _failed(self, unit: int) -> FailedUnit:
        try:
            return read_record(self.root / FAILED / unit_file(unit), FailedUnit) or FailedUnit(unit)
        # Attempts are counted anew where their record is damaged.
        except GvendiError:
            return FailedUnit(unit)

    def _write(self) -> None:
        with self._door:
            self.record = replace(self.record, updated=time.time(), at=tuple(sorted(self._held)))
        put_quickly(self.root / WORKERS / f"{self.name}.json", _content(self.record))

    def _renewing(self) -> None:
        while not self._stop.wait(self._wait_s()):
            with self._door:
                expires = time.time() + self.terms.lease_s
                self._held = {unit: replace(lease, expires=expires) for unit, lease in self._held.items()}
                held = list(self._held.values())
            hang = self.terms.hang_after_s
            if held and hang is not None and time.monotonic() - self._lively > hang:
                self._end_hung([lease.unit for lease in held], hang)
            try:
                for lease in held:
                    with self._files:
                        if lease.unit in self._held:
                            put_quickly(self.root / LEASES / unit_file(lease.unit), _content(lease))
                self._write()
            # A disk that is full or away for a while costs a lease, no work; if it stays so, writing the part says it.
            except OSError:
                continue

    def _wait_s(self) -> float:
        most = self.terms.lease_s / _RENEWALS
        return most if self.terms.hang_after_s is None else min(most, self.terms.hang_after_s / 2)

    def _end_hung(self, units: list[int], seconds: float) -> None:
        """Note the work units that hang, with where, and end the process, which is the one thing that ends a hang."""
        stack = _stacks()
        record = self.record
        said = f"no progress for {seconds:g} s"
        for unit in units:
            self._add(unit, Attempt(record.host, record.pid, time.time(), "hung", said, stack[-_MOST_TEXT:]))
        self.record = replace(self.record, ended=True)
        self.release(units)
        names = ", ".join(map(str, units))
        os.write(
            2,
            f"error: work unit {names}: {said}, so this process ends; what hung is noted in "
            f"'{self.root / FAILED}', and the same command goes on\n".encode(),
        )
        os._exit(HUNG)


# Exit code of a process whose work hung: EX_TEMPFAIL of sysexits.h.
HUNG = 75
_LOST = "the process that worked on it was lost: killed, out of memory, or crashed"
# Names of the workers of this process.
_here: set[str] = set()


def _stacks() -> str:
    """Where every other thread of this process is."""
    own, names = threading.get_ident(), {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != own
    )


def _content(record: WorkerRecord | Lease | FailedUnit) -> bytes:
    return json.dumps(record.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n"


def quarantined(root: Path) -> dict[int, FailedUnit]:
    """{work unit: its attempts} of those that a run has given up."""
    return {item.unit: item for item in read_failed(root).found.values() if item.quarantined}


def forget_failures(root: Path, units: Iterable[int]) -> None:
    """Let work units be tried as if they had never failed."""
    for unit in units:
        (root / FAILED / unit_file(unit)).unlink(missing_ok=True)


def _lease(path: Path) -> Lease | None:
    try:
        return read_record(path, Lease)
    # It holds nobody off.
    except GvendiError:
        return None
