"""The work units of a run that are left, handed out as far as the corpus is known, until all of it is.

Each stage ends with every work unit done that it knew of; as a rule the first one knows them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.growth import growth_note
from gvendi_fast.data.index_ahead import IndexAhead
from gvendi_fast.data.manifest import Manifest
from gvendi_fast.data.rejections import kinds_of, listed, remedies
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.standard_input import keep_in
from gvendi_fast.sketching.hand_out import hand_out
from gvendi_fast.sketching.settings import Settings
from gvendi_fast.sketching.unit_worker import UnitJob

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# Parts that the line on damaged ones names.
NAMED = 5


class TooManyRejectedError(GvendiError):
    """More rows were rejected than `max_rejected` allows; the finished work units are kept."""


@dataclass
class Stages:
    """What of a run stays the same from stage to stage.

    make_job: a `UnitJob` of what of the corpus is known. make_sketcher: of this process, where it does the work;
    is_compiled: whether that takes a while.
    """

    run: RunDirectory
    settings: Settings
    engine: Engine
    progress: Progress
    make_job: Callable[..., UnitJob]
    make_sketcher: Callable[[], GradientSketcher]
    is_compiled: bool
    _sketcher: GradientSketcher | None = None

    def work(
        self,
        manifest: Manifest,
        ahead: IndexAhead,
        say: Callable[[Manifest], None],
        look_again: Callable[[Manifest], None],
    ) -> None:
        """Have all work units done, those of `manifest` first, then what `ahead` has more; raises as `hand_out`.

        say, look_again: called with a corpus of which more is known, and with the whole one if that was not the first.
        """
        done: set[int] = set()
        try:
            while True:
                assert self.run.manifest is not None
                done = self._stage(manifest.recorded_as(self.run.manifest), done, ahead)
                if manifest.is_whole:
                    return
                manifest = ahead.newest(manifest)
                self.run.extend(manifest.to_dict())
                say(manifest)
                if manifest.is_whole:
                    look_again(manifest)
        finally:
            self.progress.close()

    def _stage(self, manifest: Manifest, seen: set[int], ahead: IndexAhead) -> set[int]:
        """All work units that are done then."""
        run, engine, progress = self.run, self.engine, self.progress
        for source in manifest.files:
            keep_in(run.path, source.path, source.kind, source.here or source.path)
        allowed = _allowed_rejects(self.settings.max_rejected, manifest.rows)
        done, again = _usable(run, manifest, seen, engine, progress)
        if (note := growth_note(manifest, done)) is not None:
            progress.note(note)
        todo = [unit for unit in manifest.units if unit.ordinal not in done]
        if todo and not manifest.is_whole:
            progress.note(_early_note(manifest))
        # Every rank would read all of them.
        is_counted = engine.is_first or allowed is not None
        rejected = sum(1 for _ in run.rejected(sorted(done))) if is_counted else 0
        progress.start(manifest.rows, manifest.rows - sum(unit.rows for unit in todo))
        check = partial(_check, ahead, allowed, run)
        check(rejected, done)
        if todo:
            self._prepare()
        job = self.make_job(manifest=manifest, recorded=run.manifest, again=again, sketcher=self._sketcher)
        return hand_out(run, job, engine, done, rejected, check, progress)

    def _prepare(self) -> None:
        if self._sketcher is not None or self.engine.is_remote:
            return
        if self.is_compiled:
            self.progress.note("compiling the proxy's blocks, once; that takes seconds to a minute")
        self._sketcher = self.make_sketcher()


def _early_note(manifest: Manifest) -> str:
    files = len(manifest.files)
    return (
        f"work begins with the first {files:,} file{'s' * (files != 1)} ({manifest.rows:,} rows); the others are "
        "indexed meanwhile"
    )


def _usable(
    run: RunDirectory, manifest: Manifest, seen: set[int], engine: Engine, progress: Progress
) -> tuple[set[int], frozenset[int]]:
    """The work units of a corpus whose parts can stay, and those whose cannot, which one line names.

    seen: those that have been looked at, or made. Of several ranks each looks at its share, and removes those of it
    that are damaged, for whoever is free.
    """
    digests = {unit.ordinal: unit.digest for unit in manifest.units}
    broken = run.broken(
        digests, engine.share([unit for unit in run.done() if unit in digests and unit not in seen])
    )
    if broken:
        names = ", ".join(f"{damage.path.name} ({damage.why})" for damage in broken[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        count = "1 part is" if len(broken) == 1 else f"{len(broken)} parts are"
        progress.note(
            printable(
                f"{count} damaged or of another run in '{run.parts}', and computed again: {names}{more}"
            )
        )
    if engine.world > 1:
        for damage in broken:
            run.remove_part(damage.unit)
        broken = []
    again = frozenset(damage.unit for damage in broken)
    return (set(run.done()) & digests.keys()) - again, again


def _allowed_rejects(limit: int | float | None, rows: int) -> int | None:
    return int(limit * rows) if isinstance(limit, float) else limit


def _check(ahead: IndexAhead, allowed: int | None, run: RunDirectory, rejected: int, done: set[int]) -> None:
    """Raise what ends a run: an index that has failed meanwhile, or too many rejected rows."""
    ahead.check()
    _check_rejects(allowed, run, rejected, done)


def _check_rejects(allowed: int | None, run: RunDirectory, rejected: int, done: set[int]) -> None:
    if allowed is None or rejected <= allowed:
        return
    first = [
        f"  {r.file}:{r.line}: {r.reason}" for r, _ in zip(run.rejected(sorted(done)), range(3), strict=False)
    ]
    kinds = kinds_of(run.rejected(sorted(done)))
    advice = f"\n{run.advice or remedies(kinds)}"
    raise TooManyRejectedError(
        f"{rejected} rows are rejected and --max-rejected allows {allowed}; mend the rows, or allow "
        f"more. By kind: {listed(kinds)}{advice}\nThe first:\n" + "\n".join(first)
    )
