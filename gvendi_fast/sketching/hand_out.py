"""The work units that are left are handed to an engine until every one is done or given up, by whomever."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.leases import LeaseWatch, quarantined
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.sketching.receipts import DONE, QUARANTINED, Receipt

if TYPE_CHECKING:
    from gvendi_fast.sketching.unit_worker import UnitJob

# Seconds between two looks at what others have done meanwhile, of the process that reports and of one that does not,
# and how many times what a look takes, which grows with the parts.
LOOK_EVERY_S, SILENT_LOOK_EVERY_S, LOOK_SHARE = 2.0, 5.0, 20
# Seconds of the first wait for work units of others, which grow.
FIRST_WAIT_S = 0.25
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
    """What is done of a run: work units, and their rejected rows, of others only if `counts_rejected`."""

    run: RunDirectory
    progress: Progress
    # {work unit of those that are handed out: its rows}; the directory may record more of them.
    rows: Mapping[int, int]
    done: set[int]
    rejected: int
    # Those whose part is damaged and not yet made anew: what lies on disk does not count.
    again: set[int]
    counts_rejected: bool
    every_s: float
    _due: float = 0.0
    # {work unit that was taken for another's: its rejected rows, and tokens as they were told}; its receipt may come
    # yet, behind its part.
    _looked_at: dict[int, tuple[int, int]] = field(default_factory=dict)
    # Of the receipts.
    _own_rows: int = 0
    _own_tokens: int = 0

    def take(self, receipt: Receipt) -> None:
        """Count a work unit that is done."""
        self._own_rows += receipt.rows
        self._own_tokens += receipt.tokens
        if receipt.unit in self.done:
            self._taken_for_anothers(receipt)
            return
        self.done.add(receipt.unit)
        self.again.discard(receipt.unit)
        self.rejected += receipt.rejected
        if not receipt.counted:
            self.progress.advance(receipt.rows, receipt.tokens, receipt.rejected)

    def _taken_for_anothers(self, receipt: Receipt) -> None:
        if receipt.unit not in self._looked_at:
            return
        refused, tokens = self._looked_at.pop(receipt.unit)
        self.rejected += receipt.rejected - refused
        if receipt.counted:
            self.progress.advance(-receipt.rows, -tokens, -refused)
        else:
            self.progress.advance(0, receipt.tokens - tokens, receipt.rejected - refused)

    def look(self, is_due: bool = False) -> None:
        """Count what others have done meanwhile; is_due: only if the last look is long ago."""
        began = time.monotonic()
        if is_due and began < self._due:
            return
        for unit in self.rows.keys() & set(self.run.done()) - self.done - self.again:
            self.done.add(unit)
            refused = sum(1 for _ in self.run.rejected([unit])) if self.counts_rejected else 0
            self.rejected += refused
            # A part is not read for them: as many a row as those of the receipts.
            tokens = round(self.rows[unit] * self._own_tokens / self._own_rows) if self._own_rows else 0
            self._looked_at[unit] = refused, tokens
            self.progress.advance(self.rows[unit], tokens, refused)
        now = time.monotonic()
        self._due = now + max(self.every_s, LOOK_SHARE * (now - began))

    def forget_gone(self) -> None:
        """Those whose part is there no more: another rank has found it damaged."""
        self.done &= set(self.run.done())


class _Left(Sequence[int]):
    """Work units, less those that are done by the time that they are asked for."""

    def __init__(self, units: Sequence[int], is_left: Callable[[int], bool]) -> None:
        self._units, self._is_left = units, is_left

    def __iter__(self) -> Iterator[int]:
        return filter(self._is_left, self._units)

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, int) and self._is_left(unit)

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: Any) -> Any:
        return self._units[place]


def hand_out(
    run: RunDirectory,
    job: UnitJob,
    engine: Engine,
    done: Collection[int],
    rejected: int,
    check: Callable[[int, set[int]], None],
    progress: Progress,
) -> set[int]:
    """Have the work units of a corpus done that are not in `done`; returns all that are then.

    rejected: rows of those that are. check: called with rejected rows and done work units, as they grow; what it raises
    ends the run. Raises UnitsFailedError at the end of the whole corpus where work units were given up; of several
    ranks the first does, as a launcher ends all of them with the first that fails.
    """
    units = {unit.ordinal: unit.rows for unit in job.manifest.units}
    counts_rejected = engine.is_first or job.settings.max_rejected is not None
    every_s = LOOK_EVERY_S if engine.is_first else SILENT_LOOK_EVERY_S
    count = _Count(run, progress, units, set(done), rejected, set(job.again), counts_rejected, every_s)
    watch = LeaseWatch(run.path, job.settings.terms)
    given_up = set(quarantined(run.path))
    in_a_row, is_waiting, wait_s = 0, False, FIRST_WAIT_S

    def is_left(unit: int) -> bool:
        return unit not in count.done and unit not in given_up

    while True:
        # Leases before parts: a work unit that is done between the two looks is neither held nor left.
        held = watch.held()
        count.look()
        check(count.rejected, count.done)
        given_up |= set(quarantined(run.path))
        if not any(map(is_left, units)) and engine.world > 1:
            count.forget_gone()
        left = list(filter(is_left, units))
        if not left:
            break
        todo = _Left([unit for unit in left if unit not in held], is_left)
        has_moved = False
        again = replace(job, again=frozenset(count.again), void=watch.void)
        # Closed here, as an error's traceback may live on, and a worker with it that holds its work units.
        with closing(_receipts(engine, again, todo)) as receipts:
            for receipt in receipts:
                if receipt.outcome == DONE:
                    count.take(receipt)
                    in_a_row, has_moved = 0, True
                elif receipt.outcome == QUARANTINED:
                    given_up.add(receipt.unit)
                    in_a_row, has_moved = in_a_row + 1, True
                    progress.note(
                        f"work unit {receipt.unit} failed too often and is left out: {receipt.error}"
                    )
                    _check_row(in_a_row, receipt)
                count.look(is_due=True)
                check(count.rejected, count.done)
        if has_moved:
            wait_s = FIRST_WAIT_S
        elif any(map(is_left, left)):
            if not is_waiting:
                is_waiting = True
                progress.note(watch.sentence(left))
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, count.every_s, job.settings.terms.lease_s / 4)
    if not engine.is_first or not job.manifest.is_whole:
        return count.done
    watch.sweep(count.done)
    if given_up:
        found = quarantined(run.path)
        listed = sorted(given_up & set(found))
        if listed:
            raise UnitsFailedError(run, listed, [found[unit].attempts[-1].last_line for unit in listed])
    return count.done


def _receipts(engine: Engine, job: UnitJob, todo: Sequence[int]) -> Generator[Receipt, None, None]:
    # A worker is opened for work alone: it loads the proxy.
    if todo:
        yield from engine.work(job, todo)


def _check_row(in_a_row: int, receipt: Receipt) -> None:
    if in_a_row >= MOST_IN_A_ROW:
        raise GvendiError(
            f"{in_a_row} work units failed one after the other, so that it is hardly their rows; the last one, "
            f"{receipt.unit}: {receipt.error}; mend it, then run the same command with --retry-failed "
            "(retry_failed=True)"
        )
