"""`gvendi compare`: run directories side by side, what each adds to the others, and their nearest rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import is_url
from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import console, put_json
from gvendi_fast.base.shown import shown
from gvendi_fast.cli.options import Json, path_or_url, saved_mean, warn_unfinished

if TYPE_CHECKING:
    from rich.console import Console

    from gvendi_fast.analysis.compare import Comparison, Difference
    from gvendi_fast.data.pool import RunPool
    from gvendi_fast.data.run_directory import RunDirectory

Texts = dict[str, dict[int, str]]
_ID_WIDTH = 32


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            parser=path_or_url,
            metavar="DIR",
            help="Two or more run directories, with the same options of 'What is computed' in 'gvendi sketch --help'.",
        ),
    ],
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            help="Rows to compare of each set, drawn by id. (Default: as many as the smallest has, at most 50,000.)",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs",
            metavar="P",
            min=0,
            help="Nearest pairs of rows to show for each two sets; 0 shows none and reads no corpus. (Default: 10, and "
            "3 where there are more than two sets.)",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            metavar="C",
            min=-1.0,
            max=1.0,
            help="Cosine of two rows' sketches, up to 1, from which they count as near duplicates.",
        ),
    ] = 0.95,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            parser=path_or_url,
            metavar="DIR",
            help="Folder that holds the files of the corpora now, if they have moved.",
        ),
    ] = None,
    no_text: Annotated[
        bool,
        typer.Option("--no-text", help="Do not read the corpora: show only the ids of the nearest pairs."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of the draw of rows.")] = 0,
    mean: Annotated[
        Path | None,
        typer.Option(
            "--mean",
            parser=path_or_url,
            metavar="FILE",
            help="A file that 'gvendi score --save-mean FILE' wrote: the mean that centred values leave out. (Default: "
            "that of the rows compared, each set weighing the same.)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare data sets: which is more diverse, what each adds, which rows they share.

    G-Vendi grows with the number of rows, so n rows of each set are compared,
    drawn by id. A difference counts as more than noise if the 95 % interval of
    the ratio of two sets' G-Vendi at n excludes 1.

    95 % interval: for the G-Vendi of n other rows from the set's source.
    unlimited K: what exact gradients of the same rows would score.
    centred: the value of the rows less one mean, the same for all sets: a
    diagnosis of the proxy's own habits, not a better score.

    adds: how much higher G-Vendi of n rows is when the set takes its equal
    share of them than when all n come from the other sets.
    between sets: the entropy between the sets, not within them, compared with
    that of random sets of the same rows: from 0 % (the same kind of data) to
    100 % (nothing in common).
    nearest pairs: rows of two sets whose gradients point the same way: leaks,
    near duplicates, and what both sets teach alike.

    Example: gvendi compare runs/train runs/test --pairs 20
    """
    from gvendi_fast.analysis.compare import compare as compare_sets
    from gvendi_fast.data.pool import as_pool
    from gvendi_fast.data.run_directory import RunDirectory
    from gvendi_fast.data.texts import locate_corpus

    reference = None if mean is None else saved_mean(mean)
    names = set_names(directories)
    if len(names) < 2:
        raise GvendiError(f"DIR names one run directory, '{directories[0]}'; wanted two or more to compare")
    runs = {name: RunDirectory.load(path) for name, path in zip(names, directories, strict=True)}
    pairs = (10 if len(runs) == 2 else 3) if pairs is None else pairs
    with_text = pairs > 0 and not no_text
    for run in runs.values():
        warn_unfinished(run)
        if with_text:
            locate_corpus(run, corpus)
    pools = {name: as_pool(run) for name, run in runs.items()}
    found = compare_sets(pools, n=n, pairs=pairs, threshold=threshold, seed=seed, mean=reference)
    texts = _texts(found, pools, corpus) if with_text else {name: {} for name in names}
    if as_json:
        put_json(_as_dict(found, runs, texts))
    else:
        _print(found, texts, mean)


def set_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A name for each path: the last folders of it, as many as make the names unique."""
    parts = [
        tuple(os.fspath(path).split("/")) if is_url(path) else Path(os.path.abspath(path)).parts
        for path in paths
    ]
    if len(set(parts)) < len(parts):
        twice = next(
            os.fspath(given) for given, path in zip(paths, parts, strict=True) if parts.count(path) > 1
        )
        raise GvendiError(f"DIR: '{twice}' is given twice; give every run directory once")
    length = [1] * len(parts)
    while True:
        names = ["/".join(path[-size:]) for path, size in zip(parts, length, strict=True)]
        if len(set(names)) == len(names):
            return names
        length = [size + (names.count(name) > 1) for size, name in zip(length, names, strict=True)]


def _texts(found: Comparison, pools: dict[str, RunPool], corpus: Path | None) -> Texts:
    """For each set, the texts of its rows that are in pairs, by row number in its pool."""
    from gvendi_fast.data.texts import row_texts

    places: dict[str, set[int]] = {name: set() for name in pools}
    for overlap in found.overlaps:
        places[overlap.first] |= {pair.first for pair in overlap.pairs}
        places[overlap.second] |= {pair.second for pair in overlap.pairs}
    texts = {}
    for name, pool in pools.items():
        ordinals = pool.numbers("row")
        written = row_texts(pool.run, (int(ordinals[place]) for place in places[name]), corpus)
        texts[name] = {place: written[int(ordinals[place])] for place in places[name]}
    return texts


def _as_dict(found: Comparison, runs: dict[str, RunDirectory], texts: Texts) -> dict[str, Any]:
    result = found.to_dict()
    for name, content in result["sets"].items():
        content["path"] = str(runs[name].path)
    for overlap in result["overlaps"]:
        for pair in overlap["pairs"]:
            pair["first_text"] = texts[overlap["first"]].get(pair["first"])
            pair["second_text"] = texts[overlap["second"]].get(pair["second"])
    return result


def _print(found: Comparison, texts: Texts, mean: Path | None) -> None:
    from gvendi_fast.analysis.equal_n import saturation_sentence
    from gvendi_fast.analysis.set_numbers import noise_sentence
    from gvendi_fast.cli.tables import print_table, short_names

    out = console()
    say = _plain(out)
    say(f"{len(found.sets)} sets, n = {found.n:,} rows of each, K = {found.dim:,}")
    ranked = sorted(found.sets.items(), key=lambda item: (-item[1].gvendi, item[0]))
    rows = [
        (
            name,
            f"{score.rows:,}",
            f"{score.gvendi:.2f}",
            f"{score.low:.2f} to {score.high:.2f}",
            f"{score.unlimited_k.value:.2f}",
            "none" if score.centered.value is None else f"{score.centered.value:.2f}",
            shown(score.adds, "+.2f"),
        )
        for name, (_, score) in zip(short_names([name for name, _ in ranked]), ranked, strict=True)
    ]
    print_table(out, ("set", "rows", "G-Vendi", "95 % interval", "unlimited K", "centred", "adds"), rows)
    say(
        f"adds: G-Vendi of {found.n:,} rows, the set's equal share among them, less that of {found.n:,} of the others"
    )
    of = f"the mean of {mean}" if mean else "one mean, in which each of these sets weighs the same"
    say(f"centred: rows less {of}")
    say(f"all {len(found.sets) * found.n:,} rows together: G-Vendi {found.union:.2f}")
    say(
        f"between sets: {found.between:.3f} nats, {found.between_chance:.3f} by chance (random sets of the same rows): "
        f"{shown(100 * found.between_share, '.0f')} % of the way from one kind of data to nothing in common"
    )
    scores = found.sets.values()
    for said in (
        saturation_sentence([score.gvendi for score in scores], found.n, found.dim),
        noise_sentence(score.unlimited_k for score in scores),
    ):
        if said:
            say(said)
    say("")
    if len(found.sets) == 2:
        say(sentence(found.differences[0]))
    else:
        _print_differences(out, found.differences)
    _print_overlaps(out, found, texts)


def sentence(d: Difference) -> str:
    """What a difference says: which set is more diverse, by how much, and whether that is more than noise."""
    more, less, ratio, low, high = d.first, d.second, d.ratio, d.ratio_low, d.ratio_high
    if ratio < 1:
        more, less, ratio, low, high = less, more, 1 / ratio, 1 / high, 1 / low
    interval = f"{ratio:.2f} times (95 % interval {low:.2f} to {high:.2f}, {_p(d.p_value)})"
    if d.real:
        return f"{more} is more diverse than {less}: {interval} the G-Vendi, which is more than noise."
    return f"{d.first} and {d.second} do not differ by more than noise: {more} has {interval} the G-Vendi of {less}."


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def _plain(out: Console) -> Callable[[str], None]:
    """Print a sentence as it is: brackets in names are no markup."""
    from gvendi_fast.cli.tables import say

    return lambda text: say(out, text)


def _print_differences(out: Console, differences: Sequence[Difference]) -> None:
    from gvendi_fast.cli.tables import print_table, short_names

    say = _plain(out)
    names = sorted({name for d in differences for name in (d.first, d.second)})
    short = dict(zip(names, short_names(names), strict=True))
    rows = [
        (
            short[d.first],
            short[d.second],
            f"{d.ratio:.2f}",
            f"{d.ratio_low:.2f} to {d.ratio_high:.2f}",
            _p(d.p_value).removeprefix("p ").removeprefix("= "),
            "yes" if d.real else "no",
        )
        for d in differences
    ]
    print_table(out, ("set", "against", "ratio", "95 % interval", "p", "differ"), rows, names=2)
    real = sum(d.real for d in differences)
    say(
        f"{real} of {len(differences)} differences of G-Vendi at n are more than noise; if no two sets differed, "
        f"{0.05 * len(differences):.1f} would be expected to seem so"
    )


def _print_overlaps(out: Console, found: Comparison, texts: Texts) -> None:
    say = _plain(out)
    for overlap in found.overlaps:
        a, b = overlap.first, overlap.second
        say("")
        say(
            f"{a} and {b}: {100 * overlap.share_of_first:.1f} % of {a} have a neighbour in {b} at cosine "
            f"{overlap.threshold:g} or above, {100 * overlap.share_of_second:.1f} % of {b} one in {a}"
        )
        if overlap.same_ids or overlap.same_sketches:
            say(f"  in both: {overlap.same_ids:,} ids, {overlap.same_sketches:,} equal sketches of {a}")
        for name, compared in zip((a, b), overlap.compared, strict=True):
            if compared < found.sets[name].rows:
                say(f"  {compared:,} rows of {name} were compared, drawn by id")
        for pair in overlap.pairs:
            _print_row(say, out.width, shown(pair.cosine, "7.4f"), pair.first_id, texts[a].get(pair.first))
            _print_row(say, out.width, "", pair.second_id, texts[b].get(pair.second))


def _print_row(say, width: int, lead: str, name: str, text: str | None) -> None:
    from gvendi_fast.data.texts import snippet

    # The end of an id says more than its beginning, as a row without an id is called file:line.
    name = printable(name)
    end = name if len(name) <= _ID_WIDTH else "…" + name[1 - _ID_WIDTH :]
    line = f"  {lead:<7}  {end:<{_ID_WIDTH}}"
    say(line.rstrip() if text is None else f"{line}  {snippet(text, max(width - len(line) - 2, 60))}")
