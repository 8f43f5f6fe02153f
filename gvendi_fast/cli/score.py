"""`gvendi score` and `gvendi sketch`: sketch a corpus, and score the sketches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.files import atomic_write
from gvendi_fast.base.places import place
from gvendi_fast.base.printing import console, json_text, put, put_json, warn
from gvendi_fast.base.shown import shown
from gvendi_fast.cli.options import (
    CorpusOptions,
    Data,
    EngineOptions,
    Json,
    Order,
    UnitOptions,
    home,
    path_or_url,
    saved_mean,
    unbundled,
    warn_unfinished,
)
from gvendi_fast.data.listing import list_files
from gvendi_fast.data.rejections import Kind, kinds_of, listed
from gvendi_fast.data.run_files import SCORE, score_content

if TYPE_CHECKING:
    from rich.console import Console

    from gvendi_fast.analysis.scoring import Score
    from gvendi_fast.base.engine import Engine
    from gvendi_fast.data.run_directory import RunDirectory
    from gvendi_fast.sketching.settings import Settings
    from gvendi_fast.vendi.diagnosis import Diagnosis

TINY_NOTE = " (for trying things out: report no numbers made with it)"


@unbundled
def score(
    data: Data,
    corpus: CorpusOptions,
    engines: EngineOptions,
    units: UnitOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="DIR",
            help="Keep the sketches and score.json in this run directory, made if need be. The same command again goes "
            "on where it stopped, or scores what is there; other settings are refused. (Default: keep nothing.)",
        ),
    ] = None,
    order: Order = None,
    mean: Annotated[
        Path | None,
        typer.Option(
            "--mean",
            parser=path_or_url,
            metavar="FILE",
            help="A file that --save-mean wrote: the mean that the 'centred' value leaves out, one for all corpora "
            "that are compared. (Default: this corpus' own.)",
        ),
    ] = None,
    save_mean: Annotated[
        Path | None,
        typer.Option(
            "--save-mean",
            parser=path_or_url,
            metavar="FILE",
            help="Write the mean of this corpus' sketches, for --mean of other scores and 'gvendi select --center'; a "
            "mean that is there is replaced.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a corpus, or a run directory that 'gvendi sketch' made.

    Prints G-Vendi with the 95 % interval of what another n rows of the same
    source would score, then what limits it: the most it can be, K (--dim), n
    (the rows), the proxy. Without --out nothing is kept.

    Example: gvendi score data.jsonl --out runs/mine --by source

    unlimited K: what exact gradients of these rows would score.
    by rows: G-Vendi of a quarter and half of the rows, and a forecast for twice
    as many.
    centred: the value of the rows less their mean: a diagnosis of what the
    proxy's own habits do to the score, not a better score.
    """
    from gvendi_fast.analysis import scoring
    from gvendi_fast.analysis.layers import choose_layers
    from gvendi_fast.data.run_directory import RunDirectory
    from gvendi_fast.vendi.centered import RowMean

    orders, data = order or (), [home(item) for item in data]
    reference = None if mean is None else saved_mean(mean)
    if save_mean is not None:
        RowMean.check_savable(save_mean)
    if len(data) == 1 and (place(data[0]) / "spec.json").is_file():
        if out is not None:
            raise GvendiError(
                f"--out does not go with a run directory: '{data[0]}' holds its sketches already; leave --out out"
            )
        corpus.only("by", "seed", "layers", command="score of a run directory")
        run = RunDirectory.load(data[0])
        if corpus.layers is not None:
            run = choose_layers(run, corpus.layers)
        with engines.over(run.path) as engine:
            if engine.is_first:
                warn_unfinished(run)
            result = scoring.score_run(
                run,
                by=corpus.by,
                orders=orders,
                mean=reference,
                save_mean=save_mean if engine.is_first else None,
                seed=corpus.seed,
                engine=engine,
            )
        if not engine.is_first:
            return
        _show(result, corpus.by, mean, as_json)
        for found in result.warnings:
            warn(found["text"])
        for path, why in result.unreadable.items():
            warn(f"passed over '{path}': {why}")
        return
    settings = units.added_to(corpus.settings())
    with engines.open(is_shared=out is not None) as engine:
        if not engine.is_first and out is not None:
            run = _sketch(data, out, corpus, settings, engine, "score")
            if run.missing() is None:
                scoring.score_run(run, by=settings.fields.by, orders=orders, mean=reference, engine=engine)
            return
        _check_data(data, settings.skip_unreadable, out)
        # Without --out the folder lasts until its score is printed.
        with ExitStack() as around:
            if out is None:
                folder = around.enter_context(scoring.temporary_run())
            else:
                folder = out
                around.enter_context(_keeping_units(out, "score"))
            result = scoring.score(
                data,
                proxy=corpus.load_proxy(engine),
                out=folder,
                settings=settings,
                orders=orders,
                mean=reference,
                save_mean=save_mean,
                progress=_progress(),
                engine=engine,
            )
            with _written(result, folder):
                _show(result, corpus.by, mean, as_json)


@contextmanager
def _written(result: Score, folder: Path) -> Iterator[None]:
    """The score in score.json before the block prints it; where it cannot be written, it is printed all the same."""
    path, failed = folder / SCORE, None
    try:
        with atomic_write(path) as stream:
            stream.write(json_text(score_content(result.to_dict()), indent=1).encode() + b"\n")
    except OSError as error:
        failed = error
    kept = f"the sketches are kept in '{folder}': 'gvendi score {folder}' scores them again"
    if failed is None:
        kept = f"the score is in '{path}'"
    with keeping(lambda _: kept):
        yield
        if failed is not None:
            raise failed


def _show(result: Score, by: str | None, mean: Path | None, as_json: bool) -> None:
    if as_json:
        put_json(result.to_dict())
    else:
        _print_score(result, by, mean)


@unbundled
def sketch(
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="DIR",
            help="The run directory, made if need be. The same command again goes on where it stopped; other settings "
            "are refused.",
        ),
    ],
    corpus: CorpusOptions,
    engines: EngineOptions,
    units: UnitOptions,
) -> None:
    """Sketch a corpus into a run directory, which all other commands read.

    It holds, as Parquet, each row's id, sketch, loss and gradient norm, and in
    rejected.jsonl the rows that cannot be used, with the reason. 'gvendi score
    DIR' then scores it, 'report', 'select', 'compare' and 'cluster' go on.

    Example: gvendi sketch data.jsonl --out runs/mine --by source
    """
    from gvendi_fast.analysis.scoring import damaged_of

    settings, data = units.added_to(corpus.settings()), [home(item) for item in data]
    with engines.open() as engine:
        run = _sketch(data, out, corpus, settings, engine, "sketch")
    if not engine.is_first:
        return
    for path, why in damaged_of(run).items():
        warn(f"'{path}' is not whole: {why}")
    kinds = kinds_of(run.rejected())
    count = sum(kind.count for kind in kinds)
    where = f" ({listed(kinds)}; each is in '{run.path / 'rejected.jsonl'}')" if count else ""
    with keeping(lambda _: f"the sketches are whole, in '{run.path}'"):
        put(
            f"{run.units_done} work unit{'s' * (run.units_done != 1)} in {run.path}, "
            f"{count:,} row{'s' * (count != 1)} rejected{where}; 'gvendi score {run.path}' scores them"
        )
        if count and run.advice:
            warn(run.advice)


def _sketch(
    data: list[str], out: Path, corpus: CorpusOptions, settings: Settings, engine: Engine, command: str
) -> RunDirectory:
    from gvendi_fast.sketching.corpus import sketch_corpus

    _check_data(data, settings.skip_unreadable, out)
    with _keeping_units(out, command):
        return sketch_corpus(data, out, corpus.load_proxy(engine), settings, _progress(), engine=engine)


def _check_data(data: list[str], skip_unreadable: bool, out: Path | None) -> None:
    """A wrong path, or name on the hub, is reported before a proxy is fetched."""
    from gvendi_fast.data.hub_data import check_names

    check_names(list_files(data, skip_unreadable, with_hub=True).hub, out)


def _progress():
    from gvendi_fast.base.progress import progress_for

    return progress_for()


def _print_score(result: Score, by: str | None, mean: Path | None) -> None:
    from gvendi_fast.cli.self_check import coverage_sentence
    from gvendi_fast.cli.tables import headline, say

    out = console()
    headline(
        out,
        f"G-Vendi {result.gvendi:.2f}  95 % interval {result.low:.2f} to {result.high:.2f}  n = {result.n:,}  "
        f"K = {result.dim:,}",
    )
    for sentence in _missing(result):
        say(out, f"  {sentence}", 4)
    for sentence in result.limits:
        say(out, f"  limited by {sentence}", 4)
    reasons = listed(
        Kind(reason, count, *_size(result.rejected_sizes.get(reason)))
        for reason, count in result.rejected_by_reason.items()
    )
    proxy = result.spec["proxy"]["name"]
    lines = {
        "the interval": f"is for another {result.n:,} row{'s' * (result.n != 1)} of the same source",
        **_values(result, mean),
        **{f"of order {name}": f"{value:.2f}" for name, value in result.orders.items()},
        "entropy": f"{shown(result.entropy, '.4f')} nats",
        "one direction": _direction(result.diagnosis),
        **_layers(result.norm_shares),
        "tokens": f"{result.tokens:,}",
        "rejected rows": f"{result.rejected:,}" + (f" ({reasons})" if reasons else ""),
        "coverage": coverage_sentence(result.coverage, result.spec["coverage"].get("left_out", {})),
        "proxy": f"{proxy} in {result.spec['dtype']}{TINY_NOTE if proxy == 'tiny' else ''}",
    }
    if result.tokens_per_second:
        lines["time"] = f"{result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s"
    for name, value in lines.items():
        say(out, f"  {name:<16}{value}", 18)
    if by is not None:
        _print_groups(out, result, by)


def _size(size: dict[str, Any] | None) -> tuple[Any, ...]:
    return () if size is None else (size["from"], size["to"], size["unit"])


def _missing(result: Score) -> list[str]:
    """Sentences on what of the corpus is not in the number, though it was named."""
    sentences = [f"not whole: '{path}' is a {why}" for path, why in list(result.damaged.items())[:3]]
    if len(result.damaged) > 3:
        sentences.append(f"not whole: {len(result.damaged) - 3:,} more files")
    if result.unreadable:
        first = next(iter(result.unreadable))
        more = f" and {len(result.unreadable) - 1:,} more" if len(result.unreadable) > 1 else ""
        sentences.append(f"not read: '{first}'{more}, passed over as --skip-unreadable asks")
    return sentences


def _values(result: Score, mean: Path | None) -> dict[str, str]:
    """The other values of the same rows, and of more and fewer."""
    of = result.unlimited_k
    between = f"{of.low:.2f} to {of.high:.2f}"
    known = (
        f"known only roughly, {between}" if of.is_bound_only else f"{of.value:.2f}, 95 % interval {between}"
    )
    lines = {"unlimited K": known}
    if result.growth is not None:
        points, ahead = result.growth.points, result.growth.forecast
        known = ", ".join(f"{point.mean:.2f} at {point.n:,}" for point in points)
        lines["by rows"] = (
            f"{known}; forecast {ahead.value:.2f} at {ahead.n:,} ({ahead.low:.2f} to {ahead.high:.2f})"
        )
        most = result.growth.unlimited
        lines["unlimited n"] = (
            f"not known: {result.growth.why_not}"
            if most is None
            else f"{most.value:.2f} ({most.low:.2f} to {most.high:.2f})"
        )
    centred = result.centered
    value = "none" if centred.value is None else f"{centred.value:.2f}"
    less = "their mean" if mean is None else f"the mean of {mean.name}"
    lines["centred"] = f"{value}, rows less {less}" + (f" ({centred.note})" if centred.note else "")
    return lines


def _direction(of: Diagnosis) -> str:
    cosine = "" if of.mean_cosine is None else f"; mean cosine of two rows {shown(of.mean_cosine, '.3f')}"
    rest = "" if of.without_first is None else f"; G-Vendi of the others {of.without_first:.2f}"
    return f"the first holds {shown(100 * of.first_share, '.1f')} %{rest}{cosine}"


def _layers(shares: dict[str, float] | None) -> dict[str, str]:
    if shares is None:
        return {}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return {"squared norm": ", ".join(f"{name} {shown(100 * share, '.1f')} %" for name, share in ordered)}


def _print_groups(out: Console, result: Score, by: str) -> None:
    from gvendi_fast.analysis.equal_n import pooled_sentence, saturation_sentence
    from gvendi_fast.cli.tables import print_table, say, short_names

    scored = {name: group for name, group in result.by.items() if group.gvendi is not None}
    first = next(iter(scored.values()))
    most = max(group.draws for group in scored.values())
    drawn = f", mean of {most} draws" if most > 1 else ""
    say(out, "")
    say(out, f"by {by}, at n = {first.n:,} rows each{drawn}")
    ranked = sorted(scored.items(), key=lambda item: (-item[1].gvendi, item[0]))
    rows = [
        (
            name,
            f"{group.gvendi:.2f}",
            f"{group.low:.2f} to {group.high:.2f}",
            f"{group.unlimited_k:.2f}",
            "none" if group.centered is None else f"{group.centered:.2f}",
            f"{group.rows:,}",
        )
        for name, (_, group) in zip(short_names([name for name, _ in ranked]), ranked, strict=True)
    ]
    print_table(out, (by, "G-Vendi", "95 % interval", "unlimited K", "centred", "rows"), rows)
    values = [group.gvendi for group in scored.values()]
    for sentence in (pooled_sentence(result.by), saturation_sentence(values, first.n, result.dim)):
        if sentence:
            say(out, sentence)


def _keeping_units(out: Path, command: str) -> AbstractContextManager[None]:
    """Say with what ends a run early what its directory keeps and how to go on."""

    def said(error: BaseException) -> str | None:
        from gvendi_fast.data.run_directory import is_any_done
        from gvendi_fast.sketching.corpus import TooManyRejectedError

        if isinstance(error, TooManyRejectedError):
            return f"finished work units are kept in '{out}'; the same command with a higher --max-rejected goes on"

        # What cannot be used cannot be used by the same command again; that message has its own remedy.
        if isinstance(error, GvendiError):
            return None
        if not is_any_done(out):
            return "no work unit was finished, so nothing is kept"
        return f"finished work units are kept in '{out}'; to go on, run the same 'gvendi {command}' command"

    return keeping(said)
