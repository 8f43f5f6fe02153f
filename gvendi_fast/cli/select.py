"""`gvendi select`: the most diverse rows of a run directory, written as they are in the corpus."""

from __future__ import annotations

import os
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import IO, Annotated

import typer

from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.places import is_url
from gvendi_fast.base.printing import put, put_json
from gvendi_fast.base.shown import at_most, significant
from gvendi_fast.cli.options import (
    Corpus,
    EngineOptions,
    Json,
    path_or_url,
    saved_mean,
    unbundled,
    warn_unfinished,
)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# Numbers of each row that a run directory holds.
_KNOWN = ("loss", "gradient_norm", "tokens", "length")


class ObjectiveName(str, Enum):
    """What is maximised."""

    vendi = "vendi"
    logdet = "logdet"
    facility = "facility"
    quality = "quality"


class Method(str, Enum):
    """How the rows are picked."""

    lazy = "lazy"
    stochastic = "stochastic"
    two_round = "two-round"
    relaxed = "relaxed"


@unbundled
def select(
    engines: EngineOptions,
    directory: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,
            metavar="DIR",
            help="A run directory that 'gvendi sketch' or 'score --out' made: its rows are the pool to choose from.",
        ),
    ],
    size: Annotated[
        int,
        typer.Option("--size", metavar="N", help="How many rows to choose, at most as many as the pool has."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="FILE.jsonl",
            help="Where the chosen rows are written; FILE.parquet beside it says of each its id, rank and gain.",
        ),
    ],
    objective: Annotated[
        ObjectiveName,
        typer.Option(
            "--objective",
            help="What is to be as large as possible. vendi: G-Vendi of the chosen rows; logdet: a determinant, which "
            "favours rare directions more; facility: the cosine of each row of the pool to the nearest chosen one; "
            "quality: the mean of --quality times G-Vendi.",
        ),
    ] = ObjectiveName.vendi,
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            help="How. lazy: row by row, each time the one that adds most; stochastic: each time the best of a random "
            "sample; two-round: in parts of the pool, then among their picks, for a pool far larger than --memory; "
            "relaxed: weights for all rows, then whole rows, for millions of rows, with a bound on what any choice can "
            "reach.",
        ),
    ] = Method.lazy,
    include: Annotated[
        Path | None,
        typer.Option(
            "--include",
            parser=path_or_url,
            metavar="DIR2",
            help="A run directory, sketched alike, whose rows count as chosen already: choose rows that add to them.",
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            "--per",
            metavar="FIELD",
            help="Choose equally many rows for every value of this field; a dotted path such as meta.task works.",
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            "--quality",
            metavar="FIELD",
            help="A field with a number above 0 in every row, larger for better; or, where the rows have no such "
            "field, what the run directory knows of each: loss (its sum, nats), gradient_norm, tokens (supervised) or "
            "length (all tokens). Makes the objective quality.",
        ),
    ] = None,
    center: Annotated[
        bool,
        typer.Option(
            "--center",
            help="Choose by rows without their mean direction (a habit of the proxy, or what all rows share), scaled "
            "to length 1 again; G-Vendi of the chosen rows as they are is printed beside. A diagnosis, not a better "
            "choice.",
        ),
    ] = False,
    mean: Annotated[
        Path | None,
        typer.Option(
            "--mean",
            parser=path_or_url,
            metavar="FILE",
            help="With --center: the mean that 'gvendi score --save-mean FILE' wrote, in place of the pool's own.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="S", help="Seed of all random samples and subsets.")
    ] = 0,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="BYTES",
            help="Memory for the sketches and the work, such as 512MB or 4GiB.",
        ),
    ] = "4GiB",
    max_passes: Annotated[
        int | None,
        typer.Option(
            "--max-passes",
            metavar="N",
            min=1,
            help="With --method relaxed: how often it weighs the whole pool at most; each time takes as long as the "
            "first, and fewer times leave a larger gap to the bound that is printed. By default 12, or until 0.5 % "
            "are left.",
        ),
    ] = None,
    corpus: Corpus = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite --out and the file beside it; without it they are an error."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Choose the most diverse rows of a corpus that has been sketched.

    FILE.jsonl gets the chosen rows of the corpus in the order of picking:
    JSON lines byte for byte as in the corpus, rows of Parquet files as JSON.
    With lazy and without --per, its first m lines are the choice of m rows.
    FILE.parquet has for each row its id, rank (from 1), gain, surprisal (nats;
    how unlike the others it is) and cluster (empty here).

    gain is what the pick added, in the order of picking; the command prints
    what it is, and the column's metadata say so too:
    vendi: nats of -tr(A ln A), A the sum of z z' over the chosen unit sketches
    z. That / n + ln n is the entropy of n rows, whose exp is G-Vendi.
    quality: nats of ln(mean quality) + entropy; the first is its value.
    logdet: nats of the logarithm of the determinant.
    facility: a mean cosine.
    relaxed, which picks no row before another: nats of entropy that the choice
    would lose without the row.

    Example: gvendi select runs/mine --size 1000 --per source --out best.jsonl

    The score of random subsets of the same size, under the same --per and
    --include, is printed beside that of the choice. Diversity is a means:
    pushed to the extreme it favours odd rows, facility is then the better
    objective, and random subsets are hard to beat in training. Look at what
    was chosen.
    """
    from gvendi_fast import selection
    from gvendi_fast.base.files import atomic_write
    from gvendi_fast.base.progress import progress_for
    from gvendi_fast.data.originals import locate_corpus
    from gvendi_fast.data.pool import as_pool
    from gvendi_fast.data.run_directory import RunDirectory

    began, budget = time.perf_counter(), parse_bytes(memory)
    engine = engines.over(directory)
    # What the first rank may have written by now is no error.
    sidecar = _check_out(out, force or not engine.is_first)
    if quality is not None and objective is ObjectiveName.vendi:
        objective = ObjectiveName.quality
    if (quality is not None) != (objective is ObjectiveName.quality):
        raise GvendiError(
            "--quality FIELD goes with --objective quality, and that objective needs it; give both or neither"
        )
    if mean is not None and not center:
        raise GvendiError(f"--mean '{mean}' goes with --center, which is not given; give both or neither")
    if max_passes is not None and method is not Method.relaxed:
        raise GvendiError(
            f"--max-passes {max_passes} goes with --method relaxed, and the method is {method.value}; give both or "
            "leave it out"
        )
    reference = saved_mean(mean)
    run = RunDirectory.load(directory)
    if engine.is_first:
        warn_unfinished(run)
    # A missing corpus is reported before the work, not after it.
    written = [path if is_url(path) else os.path.realpath(path) for path in map(os.fspath, (out, sidecar))]
    there = [path for path in written if os.path.exists(path)]
    for path in locate_corpus(run, corpus):
        # Path.resolve raises for links in a circle; where the system ignores case, one file has several paths.
        is_own = path in written or os.path.realpath(path) in written
        if is_own or (not is_url(path) and any(os.path.samefile(path, name) for name in there)):
            raise GvendiError(f"--out: '{path}' is a file of the corpus itself; give another name")
    pool = as_pool(run)
    groups, scores = _columns(run, pool, per, quality, corpus)
    with engine:
        chosen = selection.select(
            pool,
            size,
            objective.value,
            method=method.value,
            must_include=include,
            groups=groups,
            quotas=None if groups is None else selection.equal_quotas(groups, size),
            quality=scores,
            seed=seed,
            memory=budget,
            center=reference or center,
            max_passes=max_passes,
            progress=progress_for(verb="choosing") if engine.is_first else None,
            engine=engine,
        )
    if not engine.is_first:
        return
    # Both files are complete before either gets its name.
    with atomic_write(sidecar) as about, atomic_write(out) as rows:
        _write_sidecar(about, chosen)
        _write_rows(rows, None if is_url(out) else out.parent, run, pool.numbers("row")[chosen.rows], corpus)
    summary = {
        **chosen.to_dict(),
        "pool_rows": len(pool),
        "out": str(out),
        "sidecar": str(sidecar),
        "seconds": time.perf_counter() - began,
    }
    with keeping(lambda _: f"the chosen rows are in '{out}', their gains in '{sidecar}'"):
        if as_json:
            put_json(summary)
        else:
            _print_summary(summary)


def parse_bytes(text: str) -> int:
    """ "512MB" -> 512,000,000, "4GiB" -> 4 x 2^30, "1000" -> 1000."""
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise GvendiError(f"--memory must be a size such as 512MB or 4GiB, got {text!r}")
    size = float(number) * _UNITS[unit]
    if size >= 1 << 63:
        raise GvendiError(f"--memory must be a size that a machine can have, such as 4GiB, got {text[:40]!r}")
    return int(size)


def _check_out(out: Path, force: bool) -> Path:
    if out.suffix != ".jsonl":
        raise GvendiError(
            f"--out is '{out}'; wanted a name that ends in .jsonl (FILE.parquet is written beside it)"
        )
    sidecar = out.with_suffix(".parquet")
    if not (is_url(out) or out.parent.is_dir()):
        raise GvendiError(f"--out: the folder '{out.parent}' does not exist; make it first")
    for path in (out, sidecar):
        if path.is_dir() or (path.exists() and not force):
            raise GvendiError(
                f"--out: '{path}' already exists; give another name, or --force to overwrite it"
            )
    return sidecar


def _columns(run, pool, per: str | None, quality: str | None, corpus: Path | None):
    """A label and a quality for each row of the pool, from the run where it holds them, else from the corpus."""
    from gvendi_fast.data.originals import number_of, original_rows
    from gvendi_fast.data.rows import record_group

    stored = per is not None and per == run.by
    if stored and not any(pool.groups):
        raise _no_row_has(per)
    rows = pool.numbers("row")
    known = _is_known(run, rows[:1].tolist(), quality, corpus)
    groups, scores = {}, {}
    is_read = (per is not None and not stored) or (quality is not None and not known)
    # An object a row only where each row is read.
    ordinals = rows.tolist() if is_read else []
    for original in original_rows(run, ordinals, corpus) if is_read else ():
        if per is not None and not stored:
            groups[original.ordinal] = str(record_group(original.record(), per))
        if quality is not None and not known:
            scores[original.ordinal] = number_of(original, quality)
    if per is not None and not stored and not any(groups.values()):
        raise _no_row_has(per)
    labels = pool.groups if stored else [groups[i] for i in ordinals] if groups else None
    if known:
        return labels, pool.numbers(quality)
    return labels, [scores[i] for i in ordinals] if quality is not None else None


def _is_known(run, ordinals: list[int], quality: str | None, corpus: Path | None) -> bool:
    """Whether a quality is one of the run's own numbers: no field of the rows, by the first of them, has its name."""
    from gvendi_fast.data.originals import original_rows
    from gvendi_fast.data.rows import field_of

    if quality not in _KNOWN:
        return False
    return all(field_of(one.record(), quality) is None for one in original_rows(run, ordinals[:1], corpus))


def _no_row_has(per: str) -> GvendiError:
    return GvendiError(f"--per is {per!r}, which no row has; name a field of the rows")


def _write_sidecar(stream: IO[bytes], chosen) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(chosen)
    table = pa.table(
        {
            "id": pa.array(chosen.ids, pa.string()),
            "rank": pa.array(range(1, n + 1), pa.int64()),
            "gain": pa.array(chosen.gain, pa.float64()),
            "surprisal": pa.array(chosen.surprisal, pa.float64()),
            "cluster": pa.array([None] * n if chosen.cluster is None else chosen.cluster, pa.int64()),
        }
    )
    told = {"gain": chosen.gain_is, "surprisal": "how unlike the other chosen rows it is, in nats"}
    table = table.cast(
        pa.schema(
            [
                one.with_metadata({"description": told[one.name]}) if one.name in told else one
                for one in table.schema
            ]
        )
    )
    pq.write_table(table, stream)


def _write_rows(stream: IO[bytes], folder: Path | None, run, ordinals, corpus: Path | None) -> None:
    """The rows in the order of `ordinals`; they come in the corpus' order, so a file without a name sorts them."""
    from gvendi_fast.data.originals import original_rows

    place: dict[int, tuple[int, int]] = {}
    with tempfile.TemporaryFile(dir=folder) as spool:
        for original in original_rows(run, ordinals.tolist(), corpus):
            place[original.ordinal] = spool.tell(), len(original.raw)
            spool.write(original.raw)
        for ordinal in ordinals.tolist():
            offset, length = place[ordinal]
            spool.seek(offset)
            stream.write(spool.read(length) + b"\n")


def _print_summary(summary: dict) -> None:
    random, name = summary["random"], summary["objective"]
    # Relaxed chooses all rows at once and lists them by surprisal.
    listed = "the most unlike the others first" if summary["method"] == "relaxed" else "best first"
    put(f"{summary['size']:,} of {summary['pool_rows']:,} rows in {summary['out']}, {listed}")
    centred = summary["centered"] is not None
    lines = [("G-Vendi", "gvendi")]
    lines += [("centred", "centered")] if centred else []
    lines += [(name, "value")] if name != "vendi" else []
    for title, key in lines:
        low, high = random[f"{key}_band"]
        put(
            f"  {title:<12}{significant(summary[key])}   random subsets {significant(random[key])} "
            f"(lowest {significant(low)}, highest {significant(high)} of {random['draws']} draws)"
        )
    if summary["value"] <= random["value_band"][1] * (1 + 1e-9):
        put("  a random subset reaches as much: by its objective this choice is no better than chance")
    bounds = (
        ("gvendi_bound", "G-Vendi"),
        ("centered_bound", "centred G-Vendi"),
        ("value_bound", f"{name} (centred)" if centred else name),
    )
    for key, what in bounds:
        if key in summary["details"]:
            put(f"  no choice of as many rows has a {what} above {at_most(summary['details'][key])}")
    if summary["n"] != summary["size"]:
        put(f"  these scores include {summary['n'] - summary['size']:,} rows given by --include")
    if centred:
        put(f"  {_centred_by(summary['details']['center'], name)}")
    put(f"  gain of a row: {summary['gain_is']}")
    put(f"  id, rank, gain, surprisal and cluster of each: {summary['sidecar']}")


def _centred_by(center: dict, name: str) -> str:
    """What the rows were chosen by, and which rows could not be."""
    what = "their centred G-Vendi" if name == "vendi" else f"{name} of centred rows"
    of = _rows(center["mean_rows"])
    out = f"rows are chosen by {what}, and gain and surprisal are of centred rows: less the mean of {of}"
    for key, where in (("left_out", "of the pool"), ("left_out_given", "of --include")):
        if center[key]:
            out += f"; {_rows(center[key])} {where} equal to it left out"
    return out


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
