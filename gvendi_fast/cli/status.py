"""`gvendi status`: how far a run is, who works on it, and what failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gvendi_fast.base.errors import keeping
from gvendi_fast.base.printing import console, put, put_json
from gvendi_fast.base.progress import clock
from gvendi_fast.cli.options import Json, path_or_url

if TYPE_CHECKING:
    from rich.console import Console

    from gvendi_fast.data.run_status import Rate, RunStatus, WorkerStatus

# Seconds between two looks.
WATCH_EVERY_S = 5.0
# Workers, and units that failed or wait, that are shown; --json has all of them.
SHOWN_WORKERS, SHOWN_UNITS = 40, 10
NOBODY = "nobody works on it: the command that made it goes on"


def status(
    directory: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,
            metavar="RUN",
            help="A run directory that 'gvendi sketch' or 'score --out' makes or has made, or its URL.",
        ),
    ],
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Look again every five seconds until all is done, or Ctrl-C: on a terminal the page is drawn anew, "
            "elsewhere each look is a line.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how far a run is: what is done, how fast, how long it will take, what failed, and who works on it.

    Nothing is written, and no process is asked: what is done is told by the
    parts in the run directory, all else by what its workers last wrote there.
    So it can be called anywhere the directory can be read, whichever engine
    the workers were started by. A worker that has not written for two minutes,
    or whose process on this machine is gone, is lost: others take its units.

    Example: gvendi status runs/mine --watch
    """
    from gvendi_fast.data.run_status import StatusReader

    reader = StatusReader(directory)
    if not watch:
        _show(reader.read(), as_json)
        return
    said = "the run goes on, only the watch has ended"
    # Other errors are of the run directory.
    with keeping(lambda error: said if isinstance(error, KeyboardInterrupt) else None):
        while True:
            found = reader.read()
            _show_again(found, as_json)
            if found.is_done:
                return
            time.sleep(WATCH_EVERY_S)


def _show(found: RunStatus, as_json: bool) -> None:
    if as_json:
        put_json(found.to_dict())
    else:
        _print(console(), found)


def _show_again(found: RunStatus, as_json: bool) -> None:
    out = console()
    if as_json:
        put_json(found.to_dict())
    elif out.is_terminal:
        out.clear()
        _print(out, found)
    else:
        left = _left(found)
        idle = "" if found.is_done or found.live or not found.workers else NOBODY
        put(", ".join(text for text in (_done(found), _rates(found), left and f"{left} left", idle) if text))


def _print(out: Console, found: RunStatus) -> None:
    from gvendi_fast.cli.tables import headline, say

    headline(out, _done(found))
    lines = {
        "rate": _rates(found)
        or f"not known: no {'live worker has finished a work unit' if found.live else 'worker is live'}",
        "left": _left(found),
        "so far": _counts(found),
        "workers": _states(found),
    }
    if found.is_done:
        del lines["rate"], lines["left"]
    for name, value in lines.items():
        if value:
            say(out, f"  {name:<10}{value}", 12)
    if found.workers:
        _print_workers(out, found)
    given_up = [unit for unit in found.failed if unit.quarantined]
    for unit in [*given_up, *(unit for unit in found.failed if not unit.quarantined)][:SHOWN_UNITS]:
        what = "given up" if unit.quarantined else "failed"
        times = f"after {len(unit.attempts)} attempt{'s' * (len(unit.attempts) != 1)}"
        last = f": {unit.attempts[-1].last_line} (on {unit.attempts[-1].host})" if unit.attempts else ""
        say(out, f"{what}: work unit {unit.unit} {times}{last}", 2)
    _say_more(out, len(found.failed))
    if given_up:
        say(out, "mend what failed, then run the same command with --retry-failed", 2)
    for lease in found.expired[:SHOWN_UNITS]:
        late = found.now - lease.expires
        since = f"{clock(late)} ago" if late >= 0 else "early, as its process is gone"
        say(out, f"lease ended {since}: work unit {lease.unit} of {lease.host}, process {lease.pid}", 2)
    _say_more(out, len(found.expired))
    for why in list(found.unreadable.values())[:SHOWN_UNITS]:
        say(out, f"not read: {why}", 2)
    _say_more(out, len(found.unreadable))


def _say_more(out: Console, count: int) -> None:
    if count > SHOWN_UNITS:
        put(f"and {count - SHOWN_UNITS:,} more; --json lists them all", out.file)


def _done(found: RunStatus) -> str:
    if found.units_total is None:
        text = f"{found.units_done:,} work unit{'s' * (found.units_done != 1)} done"
        return text + ", of how many is not known yet: units.json is not written"
    text = f"{found.units_done:,} of {found.units_total:,} work units done"
    if found.rows_total and found.rows_done is not None:
        # Never 100 % before the end.
        share = int(1000 * found.rows_done / found.rows_total) / 10
        text += f", {found.rows_done:,} of {found.rows_total:,} rows ({share:g} %)"
    return text if found.is_indexed else f"{text}, of the files indexed so far"


def _rates(found: RunStatus) -> str:
    texts = []
    if found.rate is not None:
        live = found.live
        texts.append(f"{_rate(found.rate)} by {live:,} worker{'s' * (live != 1)}, since they started")
    if found.recent is not None and not found.is_done:
        texts.append(f"{_rate(found.recent)} by the parts of the last ten minutes")
    return "; ".join(texts)


def _rate(rate: Rate) -> str:
    text = f"{rate.rows:,.1f} rows/s"
    return text if rate.tokens is None else f"{text}, {rate.tokens:,.0f} tokens/s"


def _left(found: RunStatus) -> str:
    left = found.seconds_left
    if found.is_done or left is None:
        return ""
    return clock(left)


def _counts(found: RunStatus) -> str:
    if found.tokens is None or found.rejected is None:
        return ""
    text = f"{found.tokens:,} tokens, {found.rejected:,} rows rejected"
    if found.told < found.units_done:
        text += f", by what workers say of {found.told:,} of the work units; of the others nobody says"
    return text


def _states(found: RunStatus) -> str:
    if not found.workers:
        nobody = "none has left a record, as those of an earlier version do not"
        return nobody if found.units_done and not found.is_done else ""
    counts = {state: sum(one.state == state for one in found.workers) for state in ("live", "lost", "ended")}
    text = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    if not found.is_done and not counts["live"]:
        text += f"; {NOBODY}"
    return text


def _print_workers(out: Console, found: RunStatus) -> None:
    from gvendi_fast.cli.tables import print_table, short_names

    shown = found.workers[:SHOWN_WORKERS]
    different = list(dict.fromkeys(one.record.host for one in shown))
    hosts = dict(zip(different, short_names(different), strict=True))
    # Columns in which all rows are the same empty word are left out.
    rows = [_cells(one, hosts[one.record.host], found.now) for one in shown]
    headings = ("worker", "on", "state", "rank", "units", "rows/s", "tokens/s", "at work on", "last seen")
    kept = [place for place in range(len(headings)) if any(row[place] != "-" for row in rows)]
    print_table(
        out,
        [headings[place] for place in kept],
        [tuple(row[place] for place in kept) for row in rows],
        names=3,
    )
    if len(found.workers) > len(shown):
        put(f"and {len(found.workers) - len(shown):,} workers more; --json lists them all", out.file)


def _cells(one: WorkerStatus, host: str, now: float) -> tuple[str, ...]:
    record, rate = one.record, one.rate
    at = f"{record.at[0]}" + (f" + {len(record.at) - 1}" if len(record.at) > 1 else "") if record.at else "-"
    return (
        f"{host}:{record.pid}",
        f"{record.device}, {record.engine}",
        one.state,
        "-" if record.rank is None else f"{record.rank}",
        f"{record.units:,}",
        f"{rate.rows:,.1f}" if rate else "-",
        f"{rate.tokens:,.0f}" if rate and rate.tokens is not None else "-",
        at if one.state == "live" else "-",
        f"{clock(max(now - record.updated, 0.0))} ago",
    )
