"""The work units that are left are handed to an engine until every one is done or given up, by whomever."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.leases import LeaseWatch, quarantined
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.sketching.unit_worker import DONE, QUARANTINED, Receipt, UnitJob

# Seconds between two looks at what other commands have done meanwhile.
LOOK_EVERY_S = 2.0
# Work units that fail one after the other, with none that is done between them, end the run: it is not them.
MOST_IN_A_ROW = 5
# Work units that a message names.
NAMED = 5


class UnitsFailedError(GvendiError):
    """A run has come to its end, but for the work units that failed too often; `units` has their ordinals."""

    exit_code = 3

    def __init__(self, run: RunDirectory, units: Sequence[int], errors: Sequence[str]) -> None:
        self.units = list(units)
        shown = "\n".join(
            f"  work unit {unit}: {error}" for unit, error in list(zip(units, errors, strict=True))[:NAMED]
        )
        more = f"\n  and {len(units) - NAMED} more" if len(units) > NAMED else ""
        is_one = len(units) == 1
        super().__init__(
            f"{len(units)} of {run.units_total} work units failed too often and {'is' if is_one else 'are'} left out; "
            f"all others are done:\n{shown}{more}\neach has its tracebacks in '{run.path / 'failed'}'; mend what "
            "failed, then run the same command with --retry-failed (retry_failed=True)"
        )


@dataclass
class _Count:
    """What is done of a run: work units, and their rejected rows."""

    run: RunDirectory
    progress: Progress
    rows: Callable[[int], int]
    done: set[int]
    rejected: int
    # Those whose part is damaged and not yet made anew: what lies on disk does not count.
    again: set[int]
    own: set[int] = field(default_factory=set)

    def take(self, receipt: Receipt) -> None:
        """Count a work unit that is done."""
        if receipt.unit in self.done:
            return
        self.done.add(receipt.unit)
        self.own.add(receipt.unit)
        self.again.discard(receipt.unit)
        self.rejected += receipt.rejected
        if not receipt.counted:
            self.progress.advance(receipt.rows, receipt.tokens, receipt.rejected)

    def look(self) -> None:
        """Count what others have done meanwhile."""
        for unit in set(self.run.done()) - self.done - self.again:
            self.done.add(unit)
            refused = sum(1 for _ in self.run.rejected([unit]))
            self.rejected += refused
            self.progress.advance(self.rows(unit), 0, refused)


def hand_out(
    run: RunDirectory,
    job: UnitJob,
    engine: Engine,
    done: Collection[int],
    rejected: int,
    check: Callable[[int, set[int]], None],
    progress: Progress,
) -> None:
    """Have the work units of a corpus done that are not in `done`.

    rejected: rows of those that are. check: called with rejected rows and done work units, as they grow; what it raises
    ends the run. Raises UnitsFailedError at the end where work units were given up.
    """
    units = {unit.ordinal: unit.rows for unit in job.manifest.units}
    count = _Count(run, progress, units.__getitem__, set(done), rejected, set(job.again))
    watch = LeaseWatch(run.path, job.settings.terms)
    given_up = set(quarantined(run.path))
    in_a_row, is_waiting, looked = 0, False, time.monotonic()
    while left := [unit for unit in units if unit not in count.done and unit not in given_up]:
        todo = watch.free(left)
        has_moved = False
        # A worker is opened for work alone: it loads the proxy.
        receipts = engine.work(replace(job, again=frozenset(count.again)), todo) if todo else ()
        for receipt in receipts:
            if receipt.outcome == DONE:
                count.take(receipt)
                in_a_row, has_moved = 0, True
            elif receipt.outcome == QUARANTINED:
                given_up.add(receipt.unit)
                in_a_row, has_moved = in_a_row + 1, True
                progress.note(f"work unit {receipt.unit} failed too often and is left out: {receipt.error}")
                _check_row(in_a_row, receipt)
            if time.monotonic() - looked >= LOOK_EVERY_S:
                count.look()
                looked = time.monotonic()
            check(count.rejected, count.done)
        count.look()
        check(count.rejected, count.done)
        given_up |= set(quarantined(run.path))
        if not has_moved and set(left) - count.done - given_up:
            if not is_waiting:
                is_waiting = True
                progress.note(watch.sentence(left))
            time.sleep(min(LOOK_EVERY_S, job.settings.terms.lease_s / 4))
    if given_up:
        found = quarantined(run.path)
        listed = sorted(given_up & set(found))
        if listed:
            raise UnitsFailedError(run, listed, [found[unit].attempts[-1].last_line for unit in listed])


def _check_row(in_a_row: int, receipt: Receipt) -> None:
    if in_a_row >= MOST_IN_A_ROW:
        raise GvendiError(
            f"{in_a_row} work units failed one after the other, so that it is hardly their rows; the last one, "
            f"{receipt.unit}: {receipt.error}; mend it, then run the same command with --retry-failed "
            "(retry_failed=True)"
        )
