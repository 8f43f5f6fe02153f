"""`gvendi synthesize`: grow a pool of training data where it is sparse, with candidates that a model writes.

A run shows its progress on stderr: as a live table on a terminal, as plain lines elsewhere.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import console, put, put_json, put_text
from gvendi_fast.base.progress import LINE_EVERY
from gvendi_fast.cli.options import Json, home

if TYPE_CHECKING:
    from gvendi_fast.synthesis.loop.status import Status


def synthesize(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG.yaml",
            help="The configuration, such as the one above; not with --resume.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Settings that replace those of the file, such as stop.target=5000; --keys lists them.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--preview",
            metavar="N",
            help="Send N prompts to the model, at its price, print them with the answers and candidates, and write "
            "nothing.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="DIR", help="Go on with the run in DIR, under its own configuration."
        ),
    ] = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="Print every key of a configuration, its default and what it means, and do nothing else.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Grow a pool of training data: a model writes candidates, those in sparse regions stay.

    Candidates come from prompts that show rows of the pool. They are checked
    by the task (math: several solutions must agree; nli: fresh labels; generic:
    a function of yours), compared with test files and with the pool, sketched
    by the proxy, and join the pool if their gradient lies in a sparse cluster
    (arXiv 2505.20161) or raises the entropy (accept.rule=gain). With
    filter.paraphrase=N the model is also asked whether a candidate says one of
    the N most similar test questions in other words.

    It needs more packages: pip install "gvendi-fast\\[synthesis]".

    A configuration:

        out: runs/grown
        pool: {data: seeds.jsonl}
        task: {name: math}
        generator: {base_url: "http://localhost:8000/v1", model: my-model,
                    key_variable: null}
        filter: {tests: "tests/*.jsonl"}
        stop: {target: 20000, requests: 100000}

    '--keys' prints all other keys: the proxy, the rule, what is kept out, the
    settings of the tasks. Templates are Jinja files with blocks 'user' and, if
    wanted, 'system', which loop over 'shots' (prompt, completion, meta). A
    verifier takes one row (a dict) and returns True, False, or the reason why
    the row is refused. Prices are per million tokens.

    DIR (out) gets accepted.jsonl, rejected.jsonl with a reason for each,
    events.jsonl, every request with its answer in requests.sqlite, the
    configuration as used, with absolute paths, and at the end report.html, a
    page to look at: G-Vendi and acceptance over time, clusters before and
    after, examples ('gvendi report DIR' writes it at any other time). A run
    that was stopped or killed goes on with --resume DIR from anywhere, or with
    the same command: only what was under way at a kill is paid for again, and
    the result is that of a run without the break.

    It ends at stop.target rows (the seeds count), at stop.requests, stop.tokens
    or stop.seconds, or when fewer than stop.floor of the last stop.window
    candidates are accepted, and says which.
    """
    from gvendi_fast.synthesis.config.config import load_config
    from gvendi_fast.synthesis.run import CONFIG, preview
    from gvendi_fast.synthesis.run import synthesize as run

    if keys:
        from gvendi_fast.synthesis.config.keys import describe_keys

        put_text(describe_keys())
        return
    given = list(overrides or ())
    if resume is not None:
        given = [*([] if config is None else [config]), *given]
        if not (resume / CONFIG).is_file():
            raise GvendiError(
                f"--resume: '{resume}' holds no run (it has no {CONFIG}); give the directory of one"
            )
        if any(text.startswith("out=") for text in given):
            raise GvendiError(
                "out= does not go with --resume, which goes on in DIR; to change it, move the directory"
            )
        settings = load_config(resume / CONFIG, given, out=str(resume))
    elif config is None:
        raise GvendiError(
            "a configuration is missing; give CONFIG.yaml to begin a run, or --resume DIR to go on with one"
        )
    else:
        settings = load_config(home(config), given)
    if show is not None:
        previews = preview(settings, show)
        if as_json:
            put_json(previews)
        else:
            _print_previews(previews)
        return
    from gvendi_fast.base.progress import progress_for

    out = home(settings.out)

    def kept(error: BaseException) -> str | None:
        # What cannot be used, or is down, says itself how to go on.
        if isinstance(error, GvendiError):
            return None
        if (Path(out) / CONFIG).is_file():
            return f"answers and decisions are kept; 'gvendi synthesize --resume {out}' goes on"
        return "no request was sent yet; the same command begins again"

    with keeping(kept), view_for() as view:
        status = run(settings, view, progress_for(verb="sketching the pool:"), view.say)
    with keeping(lambda _: f"the run is whole, in '{out}'"):
        if as_json:
            put_json({**status.to_dict(), "out": out})
        else:
            _print_end(status, out)


def _print_previews(previews: list[dict]) -> None:
    for number, preview in enumerate(previews, 1):
        put(f"--- prompt {number} of {len(previews)}")
        for message in preview["messages"]:
            put(f"[{message['role']}]")
            put_text(f"{message['content']}\n")
        put(f"--- answer {number}")
        put_text(f"{preview['answer'] or '(none)'}\n")
        if preview["reason"]:
            put(f"--- no candidate: {preview['reason']}")
            put()
        for candidate in preview["candidates"]:
            put("--- candidate")
            for name, text in candidate["values"].items():
                put_text(f"{printable(name)}: {text}")
            if candidate["check"] is not None:
                put(f"--- check: {candidate['check']}")
            put()


def _print_end(status: Status, out: str) -> None:
    from gvendi_fast.synthesis.loop.status import BESIDE

    put(f"stopped: {status.why}")
    for name, value in status_lines(status).items():
        put(f"  {name:<16}{value}")
    spent = {stage: seconds for stage, seconds in status.seconds.items() if stage not in BESIDE}
    whole = sum(spent.values())
    shares = sorted(spent.items(), key=lambda item: -item[1])
    stages = ", ".join(f"{stage} {100 * seconds / whole:.0f} %" for stage, seconds in shares if whole)
    beside = ", ".join(f"{stage} {status.seconds.get(stage, 0.0):,.1f} s" for stage in BESIDE)
    put(f"  {'time':<16}{whole:,.1f} s: {stages or 'none'}; beside it {beside}")
    put(
        f"  rows in {out}/accepted.jsonl, rejected ones with reasons in {out}/rejected.jsonl, "
        f"a report in {out}/report.html"
    )
    if status.stopped != "target":
        limit = "a lower stop.floor" if status.stopped == "acceptance" else "a higher limit"
        put(f"  'gvendi synthesize --resume {out}' goes on, with {limit} where one was reached")


def view_for(stream: TextIO | None = None) -> StatusTable | StatusLines:
    """The view that fits a stream (default: stderr); a context manager and a `status.Watcher`."""
    stream = sys.stderr if stream is None else stream
    return StatusTable(stream) if stream.isatty() else StatusLines(stream)


def status_lines(status: Status) -> dict[str, str]:
    """The lines that show a status, by name."""
    rejected = sum(status.rejected.values())
    decided = status.accepted + rejected
    reasons = sorted(status.rejected.items(), key=lambda item: -item[1])
    lines = {
        "pool": f"{status.pool:,} rows of {status.target:,} wanted; it began with {status.seeds:,}",
        "G-Vendi": f"{status.gvendi:.2f} of {status.gvendi_rows:,} rows, {status.start_gvendi:.2f} of the "
        f"{status.seeds:,} at the start (more rows alone raise it; the report compares at equal n)",
        "candidates": f"{decided:,}, of them accepted {status.accepted:,} ({_share(status.accepted, decided)})",
        "rejected": ", ".join(f"{stage} {n:,} ({_share(n, decided)})" for stage, n in reasons) or "none",
        "round": f"{status.round + 1}, with {status.clusters:,} cluster{'s' * (status.clusters != 1)}"
        if status.clusters
        else "none yet",
        "requests": f"{status.requests:,} answered",
        "tokens": f"{status.tokens[0]:,} in prompts, {status.tokens[1]:,} in answers",
    }
    if status.at_start is not None and status.at_end is not None:
        was, now = status.at_start, status.at_end
        lines["unlimited K"] = (
            f"{now.unlimited_k.value:.2f}, {was.unlimited_k.value:.2f} at the start; G-Vendi is at K = {now.dim:,}"
        )
        end, start = (
            "none" if of.centered.value is None else f"{of.centered.value:.2f}" for of in (now, was)
        )
        lines["centred"] = f"{end}, {start} at the start; both less the mean of the seeds"
    if status.queued:
        lines["waiting"] = f"{status.queued:,} candidates that are answered, kept, and not decided yet"
    if status.cost is not None:
        lines["cost"] = f"{status.cost:,.4f}, in the currency of the prices"
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


class StatusLines:
    """One plain line every ten seconds, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._last = stream, float("-inf")

    def __enter__(self) -> StatusLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def update(self, status: Status) -> None:
        """See `status.Watcher`."""
        if time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self.say("; ".join(f"{k} {v}" for k, v in status_lines(status).items()))

    def say(self, text: str) -> None:
        """One line."""
        put(text, self.stream)


class StatusTable:
    """A table that stays in place, on a terminal; it appears with the first block."""

    def __init__(self, stream: TextIO) -> None:
        from rich.live import Live

        self.stream = stream
        self._live = Live(console=console(stream), auto_refresh=False)
        self._shown = False

    def __enter__(self) -> StatusTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def say(self, text: str) -> None:
        """One line below the table, which stays as it is."""
        self._leave()
        put(text, self.stream)

    def _leave(self) -> None:
        if self._shown:
            self._live.stop()
            self._shown = False

    def update(self, status: Status) -> None:
        """See `status.Watcher`."""
        from rich.table import Table
        from rich.text import Text

        if not self._shown:
            self._live.start()
            self._shown = True
        grid = Table.grid(padding=(0, 2))
        for name, value in status_lines(status).items():
            grid.add_row(Text(printable(name), style="bold"), Text(printable(value)))
        self._live.update(grid, refresh=True)
