"""`gvendi plan`: what a run will cost, before it is begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printing import console, note, put_json
from gvendi_fast.base.progress import clock
from gvendi_fast.cli.options import Json, ProxyName, home
from gvendi_fast.cli.wording import values

if TYPE_CHECKING:
    from rich.console import Console

    from gvendi_fast.analysis.corpus_size import CorpusSize
    from gvendi_fast.analysis.planning import Figure, Plan, Worker
    from gvendi_fast.sketching.proxy.encode import Encoder

DEFAULT_PROXY = "Qwen/Qwen2.5-0.5B-Instruct"
# Of any number that is given: larger ones are slips, and their products are no floats.
MOST = 1e18
_BYTES = ("B", "KB", "MB", "GB", "TB", "PB")


def plan(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="Files, folders, globs or URLs of the corpus, of which some rows are looked at: their bytes, and "
            "their tokens by the proxy's tokenizer. (Default: none; give --rows and --tokens.)",
        ),
    ] = None,
    rows: Annotated[
        float | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1,
            help="Rows of the corpus, such as 1e9. (Default: about as many as DATA has.)",
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=1,
            help="Tokens of a row, on average. (Default: those of the rows of DATA that were looked at.)",
        ),
    ] = None,
    row_bytes: Annotated[
        float | None,
        typer.Option(
            "--row-bytes",
            metavar="N",
            min=1,
            help="Bytes of a row in the corpus' files, for the time of indexing. (Default: those of DATA, else not "
            "planned.)",
        ),
    ] = None,
    proxy: ProxyName = DEFAULT_PROXY,
    proxy_parameters: Annotated[
        float | None,
        typer.Option(
            "--proxy-parameters",
            metavar="N",
            min=1,
            help="Parameters of the proxy that a token is multiplied with, such as 5e8; nothing of --proxy is loaded "
            "then. (Default: counted by the configuration of --proxy.)",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="D",
            autocompletion=values("cpu", "a100", "h100", "h200", "b200", "l4", "l40s"),
            help="What a worker runs on: cpu (one core), a100, h100, h200, b200, l4 or l40s.",
        ),
    ] = "cpu",
    workers: Annotated[
        int, typer.Option("--workers", metavar="W", min=1, help="How many work at the same time.")
    ] = 1,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second",
            metavar="R",
            min=1e-6,
            help="Rate of one worker, as you measured it. (Default: by --device and the proxy's parameters.)",
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            "--utilisation",
            metavar="U",
            min=0.001,
            max=1.0,
            help="Share of a GPU's peak in bfloat16 that a pass reaches. (Default: as measured on the GPU that "
            "benchmarks/results has.)",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Load the proxy and sketch some rows on this machine now, of DATA or made-up ones: that is the rate "
            "of a worker.",
        ),
    ] = False,
    dim: Annotated[
        int, typer.Option("--dim", metavar="K", min=64, max=8192, help="K, the numbers of a sketch.")
    ] = 1024,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="S",
            autocompletion=values("float32", "float16", "int8"),
            help="Numbers that sketches are stored in: float32, float16 or int8.",
        ),
    ] = "float32",
    clusters: Annotated[
        int, typer.Option("--clusters", metavar="C", min=1, help="Clusters of the pass of k-means.")
    ] = 1000,
    unit_seconds: Annotated[
        float | None,
        typer.Option(
            "--unit-seconds",
            metavar="S",
            min=1.0,
            help="How long a worker is to take for a work unit; its rows are then for --unit-rows of the run. "
            "(Default: 60, with 4,096 rows at most, as a run cuts a corpus by itself.)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Reckon what a run costs: hours, time, bytes, work units, and the passes over its sketches.

    Every figure says how it is known: given by you, measured (on which machine,
    at which commit), scaled from a measured one, assumed, or computed from the
    others. Nothing is sketched or indexed; with DATA some of its rows are read.

    Example: gvendi plan --rows 5e7 --tokens 600 --device h100 --workers 16
    Example: gvendi plan data.jsonl --proxy tiny --measure
    """
    from gvendi_fast.analysis.planning import COMPUTED, GIVEN, Figure, Work, Worker, worker_of
    from gvendi_fast.analysis.planning import plan as planned

    _check_sizes(
        {
            "--rows": rows,
            "--tokens": tokens,
            "--row-bytes": row_bytes,
            "--proxy-parameters": proxy_parameters,
            "--workers": workers,
            "--tokens-per-second": tokens_per_second,
            "--clusters": clusters,
            "--unit-seconds": unit_seconds,
        }
    )
    _check(
        proxy_parameters, tokens_per_second, utilisation, measure, bool(data) or None not in (rows, tokens)
    )
    parameters, found = None, None
    if proxy_parameters is not None:
        parameters = Figure(proxy_parameters, "parameters", GIVEN, "--proxy-parameters")
    if parameters is None or data:
        from gvendi_fast.sketching.corpus import longest
        from gvendi_fast.sketching.proxy.encode import Encoder
        from gvendi_fast.sketching.proxy.load import load_tokenizer
        from gvendi_fast.sketching.proxy.size import proxy_size

        of = load_tokenizer(home(proxy))
        if parameters is None:
            count = proxy_size(of.config).multiplied
            parameters = Figure(count, "parameters", COMPUTED, f"by the configuration of '{proxy}'")
        if data:
            bound = longest(of.name, of.positions, None)
            found = _looked(data, Encoder(of.tokenizer, bound, "completion", of.vocabulary))
    size = _size(rows, tokens, row_bytes, found)
    if tokens_per_second is not None:
        worker = Worker(device, Figure(tokens_per_second, "tokens/s", GIVEN, "--tokens-per-second"))
    elif measure:
        worker = _measured(proxy, dim, size["tokens_per_row"].value, found)
    else:
        worker = worker_of(device, parameters.value, utilisation=utilisation)
    made = planned(
        Work(
            **size,
            parameters=parameters,
            worker=worker,
            workers=workers,
            dim=dim,
            store=store,
            clusters=clusters,
            unit_seconds=unit_seconds,
        )
    )
    if as_json:
        put_json({"device": worker.device, "workers": workers, "dim": dim, "store": store, **made.to_dict()})
    else:
        _print(console(), made, worker, workers)


def _check_sizes(given: Mapping[str, float | None]) -> None:
    """Raises GvendiError for an option whose products no float and no page would hold."""
    for name, value in given.items():
        if value is not None and value > MOST:
            raise GvendiError(f"{name} is {value}; wanted at most {MOST:g}")


def _check(
    parameters: float | None, rate: float | None, utilisation: float | None, measure: bool, is_sized: bool
) -> None:
    """Raises GvendiError for options that contradict one another."""
    if not is_sized:
        raise GvendiError("how large the corpus is cannot be told; give DATA, or both --rows and --tokens")
    if measure and parameters is not None:
        raise GvendiError(
            "--measure loads --proxy, and --proxy-parameters stands for one; leave one of them out"
        )
    if (rate is not None) + measure + (utilisation is not None) > 1:
        raise GvendiError(
            "--tokens-per-second, --measure and --utilisation are three ways to a rate; give one"
        )


def _looked(data: list[str], encoder: Encoder) -> CorpusSize:
    from gvendi_fast.analysis.corpus_size import look_at_size

    found = look_at_size([home(item) for item in data], encoder)
    if found.refused:
        note(
            f"{found.refused:,} of {found.refused + len(found.samples):,} rows that were looked at are refused"
        )
    return found


def _size(
    rows: float | None, tokens: float | None, row_bytes: float | None, found: CorpusSize | None
) -> dict[str, Figure | None]:
    """Rows, and tokens and bytes of a row: as given, else as the look at DATA shows."""
    from gvendi_fast.analysis.planning import GIVEN, MEASURED, Figure

    of_rows = None if rows is None else Figure(rows, "rows", GIVEN, "--rows")
    of_tokens = None if tokens is None else Figure(tokens, "tokens", GIVEN, "--tokens")
    of_bytes = None if row_bytes is None else Figure(row_bytes, "bytes", GIVEN, "--row-bytes")
    if found is not None:
        if of_rows is None:
            if found.rows is None:
                raise GvendiError(
                    "how many rows DATA has cannot be told without reading it to the end; give --rows as well"
                )
            of_rows = Figure(found.rows, "rows", MEASURED, found.counted)
        said = f"the mean of {len(found.samples):,} rows of DATA"
        of_tokens = of_tokens or Figure(found.tokens_per_row, "tokens", MEASURED, said)
        said = f"{found.bytes:,} bytes in {found.files:,} file{'s' * (found.files != 1)} of DATA / rows"
        of_bytes = of_bytes or Figure(found.bytes / of_rows.value, "bytes", MEASURED, said)
    return {"rows": of_rows, "tokens_per_row": of_tokens, "bytes_per_row": of_bytes}


def _measured(proxy: str, dim: int, tokens: float, found: CorpusSize | None) -> Worker:
    from gvendi_fast.analysis.measured_rate import measure_rate

    note(f"sketching some rows with '{proxy}', to measure the rate")
    return measure_rate(home(proxy), dim, round(tokens), None if found is None else found.samples)


def _print(out: Console, made: Plan, worker: Worker, workers: int) -> None:
    from gvendi_fast.cli.tables import headline, print_table, say

    (hours,) = (figure for name, figure in made.results.items() if name.endswith("hours"))
    unit = "GPU hours" if worker.is_gpu else "core hours"
    headline(
        out,
        f"{_number(hours.value)} {unit}  of {worker.device}, {clock(made.results['wall time'].value)} with {workers:,} "
        f"worker{'s' * (workers != 1)}",
    )
    for title, figures in (("from", made.inputs), ("so there are", made.results)):
        say(out, f"{title}:")
        for name, figure in figures.items():
            say(out, f"  {name:<23} {in_words(figure):<26} {figure.basis}: {figure.source}", 53)
    rows = [
        (
            one.name,
            f"{one.passes}",
            clock(one.seconds.value),
            clock(one.passes * one.seconds.value),
            one.seconds.basis,
        )
        for one in made.passes
    ]
    print_table(out, ("over the sketches", "passes, up to", "one takes", "all take", "basis"), rows)
    for text in made.notes:
        say(out, f"note: {text}", 2)


def in_words(figure: Figure) -> str:
    """A figure with its unit, as people read it."""
    if figure.unit.startswith("bytes"):
        return _bytes(figure.value) + figure.unit.removeprefix("bytes")
    if figure.unit == "seconds":
        return clock(figure.value)
    number, unit = _number(figure.value), figure.unit
    return f"{number} {unit.removesuffix('s') if number == '1' and '/' not in unit else unit}"


def _bytes(value: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    size = 0
    while value >= 1000 and size < len(_BYTES) - 1:
        value, size = value / 1000, size + 1
    return f"{value:,.4g} {_BYTES[size]}"


def _number(value: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:,.4g} {name}"
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:,.4g}"
