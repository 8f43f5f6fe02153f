"""`gvendi weights`: how much of each source makes the most diverse mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from gvendi_fast.base.printing import console, put, put_json
from gvendi_fast.base.shown import at_most
from gvendi_fast.cli.options import EngineOptions, Json, path_or_url, unbundled, warn_unfinished
from gvendi_fast.cli.tables import headline, print_table, short_names


@unbundled
def weights(
    run: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,
            metavar="DIR",
            help="A run directory that was sketched with --by FIELD, at most 256 values.",
        ),
    ],
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="FIELD",
            help="The field that names a row's source: the --by that the run was sketched with.",
        ),
    ],
    engines: EngineOptions,
    floor: Annotated[
        float,
        typer.Option(
            "--floor", metavar="W", help="Smallest weight that a source may have, from 0 to 1 / sources."
        ),
    ] = 0.0,
    cap: Annotated[
        float,
        typer.Option(
            "--cap", metavar="W", help="Largest weight that a source may have, from 1 / sources to 1."
        ),
    ] = 1.0,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="NATS",
            help="Stop when the entropy is this close to its optimum; 0.001 nats are 0.1 % of G-Vendi.",
        ),
    ] = 1e-3,
    as_json: Json = False,
) -> None:
    """Weigh sources so that their mixture is as diverse as possible.

    The weights maximise the entropy of the mixed covariance, which has one
    optimum; the bound says what no weights exceed. A weight is a share of
    training samples, whatever the number of rows: the table says how often a
    source's rows would repeat in a mixture of as many rows as the directory
    holds. It reads the sketches once, prints, and writes no file.

    Example: gvendi weights runs/mine --by source --cap 0.5
    """
    from gvendi_fast.analysis.asked_groups import check_by
    from gvendi_fast.analysis.mixture import mixture_entropy, mixture_weights, source_states
    from gvendi_fast.data.run_directory import RunDirectory

    directory = RunDirectory.load(run)
    with engines.over(directory.path) as engine:
        if engine.is_first:
            warn_unfinished(directory)
        check_by(directory, by)
        states = source_states(directory, engine)
    if not engine.is_first:
        return
    mixture = mixture_weights(states, floor=floor, cap=cap, tolerance=tolerance)
    total = sum(state.n for state in states.values())
    natural = {name: state.n / total for name, state in states.items()}
    uniform = dict.fromkeys(states, 1 / len(states))
    sources = {
        name: {
            "rows": state.n,
            "gvendi": state.gvendi(),
            "share": natural[name],
            "weight": mixture.weights[name],
            "repeats": mixture.weights[name] * total / state.n,
        }
        for name, state in states.items()
    }
    result = {
        "by": by,
        "sources": sources,
        "gvendi": {
            "as it is": math.exp(mixture_entropy(states, natural)),
            "uniform": math.exp(mixture_entropy(states, uniform)),
            "best": math.exp(mixture.entropy),
            "bound": math.exp(mixture.entropy + mixture.gap),
        },
        "gap_nats": mixture.gap,
        "steps": mixture.steps,
        "rows": total,
        "spec": directory.sketch_spec,
    }
    if as_json:
        put_json(result)
    else:
        _print(result)


def _print(result: dict) -> None:
    out = console()
    values = result["gvendi"]
    headline(out, f"G-Vendi {values['best']:.2f}  of the best mixture")
    put(f"  as it is        {values['as it is']:.2f}")
    put(f"  uniform         {values['uniform']:.2f}")
    put(f"  bound           no weights within the limits give a G-Vendi above {at_most(values['bound'])}")
    put()
    ranked = sorted(result["sources"].items(), key=lambda item: (-item[1]["weight"], item[0]))
    rows = [
        (
            name,
            f"{source['rows']:,}",
            f"{source['gvendi']:.2f}",
            f"{100 * source['share']:.1f} %",
            f"{100 * source['weight']:.1f} %",
            f"{source['repeats']:.2f}",
        )
        for name, (_, source) in zip(short_names([name for name, _ in ranked]), ranked, strict=True)
    ]
    headings = ("rows", "G-Vendi (all rows)", "share now", "best weight", "times each row")
    print_table(out, (result["by"], *headings), rows)
    put(f"times each row: in a mixture of {result['rows']:,} rows")
    # A source that appears once more by rounding does not repeat.
    if any(source["repeats"] > 1.005 for source in result["sources"].values()):
        put("rows that repeat bring no direction that was not there; --cap limits how often they do")
    if len({source["rows"] for source in result["sources"].values()}) > 1:
        put(
            "the sources have different numbers of rows, and G-Vendi grows with them: "
            "to compare sources, use 'gvendi score --by'"
        )
