"""`gvendi score` and `gvendi sketch`: sketch a corpus, and score the sketches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.options import CorpusOptions, Data, Json, Order, unbundled, warn_unfinished
from gvendi_fast.data.sources import find_files

TINY_NOTE = " (for trying things out: report no numbers made with it)"


@unbundled
def score(
    data: Data,
    corpus: CorpusOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Keep the sketches in this run directory; the same command again resumes. (Default: keep none.)",
        ),
    ] = None,
    order: Order = None,
    as_json: Json = False,
) -> None:
    """Score a corpus, or a run directory that 'gvendi sketch' made."""
    from gvendi_fast.analysis import scoring
    from gvendi_fast.data.run_directory import RunDirectory

    orders = order or ()
    if len(data) == 1 and (Path(data[0]) / "spec.json").is_file():
        if out is not None:
            raise GvendiError(
                f"--out does not go with a run directory: '{data[0]}' holds its sketches already; leave --out out"
            )
        corpus.only("by", "seed", command="score of a run directory")
        run = RunDirectory.load(data[0])
        warn_unfinished(run)
        result = scoring.score_run(run, by=corpus.by, orders=orders, seed=corpus.seed)
    else:
        settings = corpus.settings()
        # A wrong path is reported before a proxy is fetched.
        find_files(data)
        with _Advice(out, "score"):
            result = scoring.score(
                data,
                proxy=corpus.load_proxy(),
                out=out,
                settings=settings,
                orders=orders,
                progress=_progress(),
            )
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        _print_score(result, corpus.by)


@unbundled
def sketch(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The run directory; the same command again resumes.")
    ],
    corpus: CorpusOptions,
) -> None:
    """Sketch a corpus into a run directory: Parquet parts with ids, sketches, losses and gradient norms."""
    from gvendi_fast.sketching.corpus import sketch_corpus

    settings = corpus.settings()
    find_files(data)
    with _Advice(out, "sketch"):
        run = sketch_corpus(data, out, corpus.load_proxy(), settings, _progress())
    rejected = sum(1 for _ in run.rejected())
    print(
        f"{run.units_done} work unit{'s' * (run.units_done != 1)} in {run.path}, "
        f"{rejected:,} row{'s' * (rejected != 1)} rejected; 'gvendi score {run.path}' scores them"
    )


def _progress():
    from gvendi_fast.base.progress import progress_for

    return progress_for()


def _print_score(result, by: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from gvendi_fast.analysis.equal_n import pooled_sentence, saturation_sentence

    console = Console()
    console.print(
        f"[bold]G-Vendi {result.gvendi:.2f}[/bold]  (n = {result.n:,}, K = {result.dim})", highlight=False
    )
    orders = {f"of order {name}": f"{value:.2f}" for name, value in result.orders.items()}
    proxy = result.spec["proxy"]["name"]
    reasons = "; ".join(
        f"{reason}: {count:,}" for reason, count in list(result.rejected_by_reason.items())[:5]
    )
    lines = {
        "another draw": f"{result.low:.2f} to {result.high:.2f} (95 % interval for {result.n:,} other such rows)",
        "entropy": f"{result.entropy:.4f} nats",
        **orders,
        "tokens": f"{result.tokens:,}",
        "rejected rows": f"{result.rejected:,}" + (f" ({reasons})" if reasons else ""),
        "coverage": f"{100 * result.coverage:.1f} % of the proxy's parameters",
        "proxy": f"{proxy} in {result.spec['dtype']}{TINY_NOTE if proxy == 'tiny' else ''}",
    }
    if result.tokens_per_second:
        lines["time"] = f"{result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s"
    for name, value in lines.items():
        # Names of proxies, reasons and groups are data: brackets in them are no markup.
        console.print(f"  {name:<16}{value}", highlight=False, soft_wrap=True, markup=False)
    if by is not None and set(result.by) == {""}:
        print(f"warning: no row has the field {by!r}, so there are no groups", file=sys.stderr)
    elif by is not None:
        most = max(result.by.values(), key=lambda g: (g.n, g.draws))
        drawn = f", mean of {most.draws} draws" if most.draws > 1 else ""
        console.print(
            f"\nby {by}, at n = {most.n:,} rows each{drawn}", highlight=False, soft_wrap=True, markup=False
        )
        table = Table()
        table.add_column(escape(by), overflow="fold")
        for name in ("G-Vendi", "another draw, 95 %", "rows"):
            table.add_column(name, justify="right", overflow="fold")
        scored = {value: group for value, group in result.by.items() if group.gvendi is not None}
        for value, group in sorted(scored.items(), key=lambda item: (-item[1].gvendi, item[0])):
            interval = f"{group.low:.2f} to {group.high:.2f}"
            table.add_row(escape(value) or "(none)", f"{group.gvendi:.2f}", interval, f"{group.rows:,}")
        console.print(table)
        values = [group.gvendi for group in scored.values()]
        for sentence in (pooled_sentence(result.by), saturation_sentence(values, most.n, result.dim)):
            if sentence:
                console.print(sentence, highlight=False, soft_wrap=True, markup=False)


class _Advice:
    """Says on Ctrl-C what was kept and how to go on."""

    def __init__(self, out: Path | None, command: str) -> None:
        self.out, self.command = out, command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if kind is KeyboardInterrupt:
            advice = (
                f"finished work units are kept in '{self.out}'; to go on, run the same 'gvendi {self.command}' command"
                if self.out
                else "nothing was kept; give --out DIR to make a run that can be resumed"
            )
            print(f"\ninterrupted: {advice}", file=sys.stderr)
            error.explained = True
