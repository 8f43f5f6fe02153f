"""The `gvendi` command."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from gvendi_fast._version import __version__
from gvendi_fast.commands.compare import compare
from gvendi_fast.commands.measures import measures
from gvendi_fast.errors import GvendiError
from gvendi_fast.options import (
    BatchTokens,
    By,
    CompletionField,
    Data,
    Dim,
    Dtype,
    DtypeOption,
    Exclude,
    IdField,
    Kind,
    Limit,
    Mask,
    MaskOption,
    MaxRejected,
    MaxTokens,
    MessagesField,
    PromptField,
    ProxyName,
    Seed,
    Sketch,
    TextField,
    UnitRows,
)

app = typer.Typer(
    name="gvendi",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure how diverse language-model training data is: G-Vendi, from sketches of per-sample gradients.",
)
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


@app.command()
def score(
    data: Data,
    proxy: ProxyName = "Qwen/Qwen2.5-0.5B-Instruct",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep the sketches here; the same command again resumes."),
    ] = None,
    dim: Dim = 1024,
    sketch: Kind = Sketch.hadamard,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
    by: By = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    unit_rows: UnitRows = 512,
    mask: MaskOption = Mask.completion,
    exclude: Exclude = None,
    prompt_field: PromptField = "prompt",
    completion_field: CompletionField = "completion",
    messages_field: MessagesField = "messages",
    text_field: TextField = "text",
    id_field: IdField = "id",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
    ] = False,
) -> None:
    """Score a corpus, or a run directory that 'gvendi sketch' made."""
    from gvendi_fast import scoring
    from gvendi_fast.store import RunDirectory

    if len(data) == 1 and (Path(data[0]) / "spec.json").is_file():
        if out is not None:
            raise GvendiError(
                f"--out does not go with a run directory: '{data[0]}' holds its sketches already"
            )
        result = scoring.score_run(RunDirectory.load(data[0]), by=by, seed=seed)
    else:
        fields = _fields(prompt_field, completion_field, messages_field, text_field, id_field, by)
        settings = _settings(
            dim, sketch, seed, fields, max_tokens, batch_tokens, limit, max_rejected, unit_rows, mask, exclude
        )
        with _Advice(out, "score"):
            result = scoring.score(
                data, proxy=_load(proxy, dtype), out=out, settings=settings, by=by, progress=_progress()
            )
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        _print_score(result, by)


@app.command()
def sketch(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The run directory; the same command again resumes.")
    ],
    proxy: ProxyName = "Qwen/Qwen2.5-0.5B-Instruct",
    dim: Dim = 1024,
    sketch: Kind = Sketch.hadamard,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
    by: By = None,
    limit: Limit = None,
    max_rejected: MaxRejected = None,
    unit_rows: UnitRows = 512,
    mask: MaskOption = Mask.completion,
    exclude: Exclude = None,
    prompt_field: PromptField = "prompt",
    completion_field: CompletionField = "completion",
    messages_field: MessagesField = "messages",
    text_field: TextField = "text",
    id_field: IdField = "id",
) -> None:
    """Sketch a corpus into a run directory: Parquet parts with ids, sketches, losses and gradient norms."""
    from gvendi_fast.sketching import sketch_corpus

    fields = _fields(prompt_field, completion_field, messages_field, text_field, id_field, by)
    settings = _settings(
        dim, sketch, seed, fields, max_tokens, batch_tokens, limit, max_rejected, unit_rows, mask, exclude
    )
    with _Advice(out, "sketch"):
        run = sketch_corpus(data, out, _load(proxy, dtype), settings, _progress())
    rejected = sum(1 for _ in run.rejected())
    print(
        f"{run.units_done} units in {run.path}, {rejected:,} rows rejected; 'gvendi score {run.path}' scores them"
    )


@app.command()
def info() -> None:
    """Show backends, instruction set, number formats and versions, and the reasons for what is missing."""
    from gvendi_fast.about import describe

    for name, value in describe().items():
        print(f"{name:<24}{value}")


for _command in (compare, measures):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gvendi-fast {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def _fields(prompt: str, completion: str, messages: str, text: str, id_field: str, by: str | None):
    from gvendi_fast.corpus import Fields

    return Fields(prompt=prompt, completion=completion, messages=messages, text=text, id=id_field, by=by)


def _settings(
    dim, kind, seed, fields, max_tokens, batch_tokens, limit, max_rejected, unit_rows, mask, exclude
):
    from gvendi_fast.plan import SketchSpec
    from gvendi_fast.sketching import Settings

    return Settings(
        spec=SketchSpec(dim=dim, kind=kind.value, seed=seed),
        fields=fields,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        mask=mask.value,
        limit=limit,
        unit_rows=unit_rows,
        max_rejected=parse_max_rejected(max_rejected),
        exclude=tuple(exclude or ()),
    )


def parse_max_rejected(text: str | None) -> int | float | None:
    """ "25" -> 25 rows, "2%" -> 0.02 of all rows."""
    if text is None:
        return None
    number = text.removesuffix("%")
    plain = number.replace(".", "", 1) if text.endswith("%") else number
    if not plain.isdecimal():
        raise GvendiError(f"--max-rejected must be a count such as 25 or a share such as 2%, got {text!r}")
    return float(number) / 100 if text.endswith("%") else int(number)


def _load(name: str, dtype: Dtype):
    from gvendi_fast.proxy import load_proxy

    return load_proxy(name, dtype=dtype.value)


def _progress():
    from gvendi_fast.progress import progress_for

    return progress_for()


def _print_score(result, by: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    low, high = result.ci95
    console.print(
        f"[bold]G-Vendi {result.gvendi:.2f}[/bold]  (n = {result.n:,}, K = {result.dim})", highlight=False
    )
    lines = {
        "corrected for n": f"{result.gvendi_corrected:.2f}, 95 % interval {low:.2f} to {high:.2f}",
        "entropy": f"{result.entropy:.4f} nats",
        "tokens": f"{result.tokens:,}",
        "rejected rows": f"{result.rejected:,}",
        "coverage": f"{100 * result.coverage:.1f} % of the proxy's parameters",
        "proxy": f"{result.spec['proxy']['name']} in {result.spec['dtype']}",
    }
    if result.tokens_per_second:
        lines["time"] = f"{result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s"
    done, total = result.units
    if total is not None and done < total:
        lines["incomplete"] = f"{done} of {total} work units are done; sketch again to go on"
    for name, value in lines.items():
        console.print(f"  {name:<16}{value}", highlight=False, soft_wrap=True)
    if by is not None:
        compared = max((g.n for g in result.by.values()), default=0)
        console.print(f"\nby {by}, at n = {compared:,} rows each", highlight=False, soft_wrap=True)
        table = Table()
        for name in (by, "G-Vendi", "rows"):
            table.add_column(name, justify="left" if name == by else "right", overflow="fold")
        ranked = sorted(result.by.items(), key=lambda item: (-(item[1].gvendi or 0), item[0]))
        for value, group in ranked:
            shown = "too few rows" if group.gvendi is None else f"{group.gvendi:.2f}"
            table.add_row(value or "(none)", shown, f"{group.rows:,}")
        console.print(table)


class _Advice:
    """Says on Ctrl-C what is kept and how to go on."""

    def __init__(self, out: Path | None, command: str) -> None:
        self.out, self.command = out, command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if kind is KeyboardInterrupt:
            advice = (
                f"what was done is kept in '{self.out}'; the same 'gvendi {self.command}' command goes on from there"
                if self.out
                else "nothing was kept; with --out DIR a run can be resumed"
            )
            print(f"\ninterrupted: {advice}", file=sys.stderr)


def _plain_warning(message, category, *_) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: errors that are meant for the user go to stderr as one message, without a traceback."""
    warnings.showwarning = _plain_warning
    try:
        app()
    except GvendiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
