"""Whether a run directory has the groups that are asked for."""

from __future__ import annotations

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import RunDirectory


def check_by(run: RunDirectory, by: str | None) -> None:
    """GvendiError unless the run directory was sketched with this --by and a row has it (None always passes)."""
    recorded = run.by
    if by is not None and by != recorded:
        raise GvendiError(
            f"'{run.path}' was sketched with --by {recorded}, not --by {by}; the groups are stored with the "
            "sketches: sketch the corpus again with this --by into another --out"
            if recorded
            else f"'{run.path}' was sketched without --by, so it holds no groups; sketch the corpus with --by {by} "
            "into another --out"
        )
    # Of a run that goes on, later rows may have it.
    is_whole = by is not None and run.missing() is None
    if is_whole and run.done() and not any(any(part.groups) for part in run.iterate(["group"])):
        raise GvendiError(
            f"by is {by!r}, which no row of '{run.path}' has; leave it out, or sketch the corpus with a field that its "
            "rows have into another --out"
        )
