"""Run directory -> score: G-Vendi with its interval, and groups compared at equal n."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from gvendi_fast.analysis.asked_groups import check_by
from gvendi_fast.analysis.equal_n import GroupScore, group_scores
from gvendi_fast.analysis.layers import norm_shares
from gvendi_fast.analysis.set_numbers import Sample, growth_of, limits, numbers_of, second_pass
from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.places import place
from gvendi_fast.base.progress import Progress
from gvendi_fast.base.temporary import keep, new_folder
from gvendi_fast.data.chunks import unit_chunks
from gvendi_fast.data.distinct import Distinct
from gvendi_fast.data.in_memory import Corpus
from gvendi_fast.data.parts import Part
from gvendi_fast.data.passes import over_run
from gvendi_fast.data.pool import BlockPool
from gvendi_fast.data.rejections import kinds_of, listed, remedies
from gvendi_fast.data.run_directory import RunDirectory, is_any_done
from gvendi_fast.data.run_files import read_warnings
from gvendi_fast.sketching.corpus import Settings, TooManyRejectedError, sketch_corpus
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy
from gvendi_fast.vendi.centered import CenteredScore, RowMean, centred_spec
from gvendi_fast.vendi.diagnosis import Diagnosis
from gvendi_fast.vendi.growth import Growth
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import UnlimitedK

_PROXY = "Qwen/Qwen2.5-0.5B-Instruct"

__all__ = ["GroupScore", "Score", "group_scores", "score", "score_run", "temporary_run"]


@dataclass(frozen=True)
class Score:
    """The diversity of a corpus.

    gvendi: exp of the entropy (nats) of the unit sketches' second moment, as the paper defines it; it grows with n.
    low, high: the 95 % interval for the G-Vendi of another n rows of the same source.
    entropy: in nats; gvendi is its exp.
    n: scored rows.
    dim: K.
    unlimited_k: what the exact gradients of these rows would score.
    centered: the value without the mean of a reference, the corpus itself unless another was given.
    diagnosis: what one direction does to the score.
    growth: G-Vendi of fewer rows, and a forecast for twice as many; None for too few rows.
    limits: sentences on what holds the value down or makes it say little; empty where nothing does.
    tokens: all tokens of the scored rows.
    seconds, tokens_per_second: of this run; None if there was nothing left to sketch.
    rejected: rows that could not be scored.
    by: {group: its score}, all at equal n.
    coverage: share of the proxy's parameters that the sketches cover.
    norm_shares: {kind of layer: its share of the squared gradient norm}; None where the run does not hold them.
    spec: what the sketches depend on.
    units: (done, total) work units.
    rejected_by_reason: {kind of reason: rejected rows}; rejected.jsonl has the whole reason of each.
    rejected_sizes: {kind of reason that names sizes: {"from", "to" and their "unit"}}.
    orders: G-Vendi of the other orders requested, by their names ("2", "inf").
    unreadable: {file or folder of the corpus that was passed over: why}.
    damaged: {file of the corpus of which only the rows before a damage are scored: what is wrong with it}.
    warnings: what a look at some rows of the corpus warns of, each with its `text`; empty where nothing.
    """

    gvendi: float
    low: float
    high: float
    entropy: float
    n: int
    dim: int
    unlimited_k: UnlimitedK
    centered: CenteredScore
    diagnosis: Diagnosis
    growth: Growth | None
    limits: list[str]
    tokens: int
    seconds: float | None
    tokens_per_second: float | None
    rejected: int
    by: dict[str, GroupScore]
    coverage: float
    norm_shares: dict[str, float] | None
    spec: dict[str, Any]
    units: tuple[int, int | None]
    rejected_by_reason: dict[str, int]
    rejected_sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    orders: dict[str, float] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi score --json` prints."""
        result = {name: value for name, value in vars(self).items() if name != "units"}
        result |= {name: getattr(self, name).to_dict() for name in ("unlimited_k", "centered", "diagnosis")}
        result["growth"] = self.growth and self.growth.to_dict()
        result |= {"units_done": self.units[0], "units_total": self.units[1]}
        return {**result, "by": {name: group.to_dict() for name, group in self.by.items()}}


def score(
    data: Corpus | RunDirectory,
    *,
    proxy: str | Proxy = _PROXY,
    out: str | os.PathLike | None = None,
    settings: Settings | None = None,
    by: str | None = None,
    orders: Sequence[float] = (),
    mean: RowMean | None = None,
    save_mean: str | os.PathLike | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Score:
    """Sketch a corpus and score it, or score what a run directory holds.

    data: files, folders or globs of JSON, CSV, Parquet and Arrow, "-" for standard input, data sets of the Hugging Face
        hub; or rows, as `gvendi_fast.sketch` takes them; or a run directory, by its path or as `gvendi_fast.sketch`
        returns it, whose sketches have a proxy and settings already.
    proxy: "tiny", a local folder, a hub name, or a loaded Proxy.
    out: a run directory that is kept and can be resumed; without it a temporary one is used. That stays where an
        error comes after the first finished work unit: `error.kept`, a note of the traceback, says where.
    by: a field whose values make groups.
    orders: compute G-Vendi of these orders too, beside order 1.
    mean: the reference that the centred value leaves out (None: the corpus' own mean); one for all that is compared.
    save_mean: write the corpus' own mean to this file, as the reference of later scores; it replaces a saved mean only.
    engine: which processes sketch: this one (None), or those of `gvendi_fast.engines`; several ranks need an `out`.
    Raises GvendiError for arguments and corpora that cannot be used.
    """
    _check_orders(orders)
    if save_mean is not None:
        RowMean.check_savable(save_mean)
    run = _run_of(data)
    if run is not None:
        _check_made_so(run, proxy, out, settings)
        if engine is not None and engine.folder is None:
            engine.folder = run.path
        return score_run(run, by=by, orders=orders, mean=mean, save_mean=save_mean, engine=engine)
    if out is None and engine is not None and engine.world > 1:
        raise GvendiError(
            f"out is None, and engine is {engine.name!r} with {engine.world} processes, which work together in one run "
            "directory; name it"
        )
    if isinstance(proxy, str):
        where = engine or LocalEngine()
        proxy = load_proxy(proxy, dtype=where.dtype(), device=where.device)
    settings = settings or Settings()
    if by is not None:
        settings = replace(settings, fields=replace(settings.fields, by=by))
    rest = (proxy, settings, orders, mean, save_mean, progress, engine)
    # A run directory has been scored above.
    corpus = cast("Corpus", data)
    if out is not None:
        return _sketch_and_score(corpus, out, *rest)
    with temporary_run() as folder:
        return _sketch_and_score(corpus, folder, *rest)


def _run_of(data: Corpus | RunDirectory) -> RunDirectory | None:
    """The run directory that is to be scored; None for a corpus."""
    if isinstance(data, RunDirectory):
        return data
    one: object = data[0] if isinstance(data, list | tuple) and len(data) == 1 else data
    if isinstance(one, str | os.PathLike) and (place(one) / "spec.json").is_file():
        return RunDirectory.load(one)
    return None


def _check_made_so(
    run: RunDirectory, proxy: str | Proxy, out: str | os.PathLike | None, settings: Settings | None
) -> None:
    """GvendiError for an argument of sketching that says otherwise than a run directory."""
    for name, value in (("out", out), ("settings", settings)):
        if value is not None:
            raise GvendiError(
                f"{name} does not go with a run directory: '{run.path}' holds its sketches already; leave {name} out"
            )
    asked, used = proxy if isinstance(proxy, str) else proxy.name, run.setting("proxy", "name", kind=str)
    if asked not in (_PROXY, used):
        raise GvendiError(
            f"proxy is {asked!r}, but the sketches of '{run.path}' were made with {used!r}; leave proxy out, or sketch "
            "the corpus with this one into another directory"
        )


@contextmanager
def temporary_run() -> Iterator[Path]:
    """The path of a run directory to make, deleted after the block.

    Where the block ends early, Ctrl-C included, and a work unit is finished, it stays, and `error.kept` says where.
    """
    folder = new_folder()
    run = folder / "run"
    try:
        with keeping(lambda error: _kept(run, error)):
            yield run
    except BaseException:
        if is_any_done(run):
            keep(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


class NoRowError(GvendiError):
    """All rows of a run directory were rejected."""


def _kept(run: Path, error: BaseException) -> str | None:
    if not is_any_done(run):
        none = "no work unit was finished, so nothing is kept; with --out DIR a run can be resumed"
        return None if isinstance(error, GvendiError) else none
    # Nothing is there to score, and the same rows would be rejected again.
    if isinstance(error, NoRowError):
        return f"'{run / 'rejected.jsonl'}' lists them"
    # With the same limit it would end again.
    more = " and a higher --max-rejected" if isinstance(error, TooManyRejectedError) else ""
    return (
        f"the sketches so far are kept in '{run}': 'gvendi score {run}' scores them, the same command with "
        f"--out {run}{more} goes on"
    )


def _sketch_and_score(
    data: Corpus,
    out: str | os.PathLike,
    proxy: Proxy,
    settings: Settings,
    orders: Sequence[float],
    mean: RowMean | None,
    save_mean: str | os.PathLike | None,
    progress: Progress | None,
    engine: Engine | None,
) -> Score:
    clock = _Clock(progress)
    run = sketch_corpus(data, out, proxy, settings, clock, mean, engine)
    return score_run(
        run,
        by=settings.fields.by,
        orders=orders,
        mean=mean,
        save_mean=save_mean,
        seconds=clock.seconds,
        fresh_tokens=clock.tokens,
        engine=engine,
    )


def score_run(
    run: RunDirectory,
    *,
    by: str | None = None,
    orders: Sequence[float] = (),
    mean: RowMean | None = None,
    save_mean: str | os.PathLike | None = None,
    seconds: float | None = None,
    fresh_tokens: int = 0,
    seed: int = 0,
    engine: Engine | None = None,
) -> Score:
    """Score what a run directory holds, complete or not, in two passes over its sketches.

    Memory is bounded by one part, some K x K numbers and 10 bytes a row.
    run: the directory.
    by: the field that it was sketched with; groups need the memory that `group_scores` names.
    orders, mean, save_mean: as in `score`.
    seed: of the draws of rows.
    engine: which processes make the passes; None is this one. The numbers are the same to the bit.
    """
    check_by(run, by)
    _check_orders(orders)
    if save_mean is not None:
        RowMean.check_savable(save_mean)
    if mean is not None:
        # Refused before the rows are read.
        centred_spec(run.sketch_spec, mean, run.dim)
    read = _read(run, engine)
    kinds = kinds_of(run.rejected())
    rejected = sum(kind.count for kind in kinds)
    if read.own.n == 0:
        mend = run.advice or remedies(kinds)
        advice = f"; {mend}" if mend else ""
        raise NoRowError(
            f"no row of {_corpus_of(run)} could be scored, {rejected:,} {'was' if rejected == 1 else 'were'} rejected: "
            f"{listed(kinds) or 'none'}{advice}"
        )
    sample = read.sample(run, mean)
    second = second_pass(sample, seed, engine)
    numbers = numbers_of(sample, second=second)
    grown = growth_of(sample, numbers.interval, seed, second)
    if save_mean is not None:
        read.own.save(save_mean)
    coverage = [run.setting("coverage", name) for name in ("sketched", "total")]
    return Score(
        gvendi=numbers.gvendi,
        low=numbers.interval.low,
        high=numbers.interval.high,
        entropy=numbers.entropy,
        n=numbers.n,
        dim=numbers.dim,
        unlimited_k=numbers.unlimited_k,
        centered=numbers.centered,
        diagnosis=numbers.diagnosis,
        growth=grown,
        limits=limits(numbers, grown),
        tokens=read.tokens,
        seconds=seconds if fresh_tokens else None,
        tokens_per_second=fresh_tokens / seconds if fresh_tokens and seconds else None,
        rejected=rejected,
        by={} if by is None else group_scores(run, seed, read.own if mean is None else mean, engine),
        coverage=coverage[0] / max(1, coverage[1]),
        norm_shares=norm_shares(run, engine),
        spec=run.spec,
        # While a corpus is indexed nobody knows how many there are.
        units=(run.units_done, run.units_total if run.is_indexed else None),
        rejected_by_reason={kind.reason: kind.count for kind in kinds},
        rejected_sizes={
            kind.reason: {"from": kind.low, "to": kind.high, "unit": kind.unit} for kind in kinds if kind.unit
        },
        orders={f"{q:g}": sample.state.gvendi(q) for q in orders},
        unreadable=unreadable_of(run),
        damaged=damaged_of(run),
        warnings=read_warnings(run.path),
    )


def _corpus_of(run: RunDirectory) -> str:
    """The files that a run directory was made from, as the user named them; else the directory."""
    files = [] if run.manifest is None else run.manifest.get("files", [])
    if not files:
        return f"'{run.path}'"
    more = f" and {len(files) - 1:,} more file{'s' * (len(files) > 2)}" if len(files) > 1 else ""
    return f"'{files[0]['path']}'{more}"


@dataclass
class _Read:
    """What one pass over a run's sketches gives, or over those of a chunk.

    own: the mean. state: of the rows, None while they are fewer than K; then `few` holds them, part by part.
    distinct: different rows. tokens: all of them. units, counts: the work units, and how many rows each has.
    """

    own: RowMean
    state: VendiState | None
    distinct: Distinct
    few: list[np.ndarray]
    tokens: int
    units: list[int]
    counts: list[int]

    def sample(self, run: RunDirectory, mean: RowMean | None) -> Sample:
        """The rows as `numbers_of` takes them."""
        distinct = self.distinct.count()
        if self.state is None:
            return Sample.of_rows(np.concatenate(self.few), mean, distinct)
        pool = BlockPool(run, unit_chunks(self.units, self.counts))
        return Sample(self.state, self.own, mean or self.own, pool, pool.dim, distinct)

    def merge(self, other: _Read) -> None:
        """Take up the rows behind."""
        self.own.merge(other.own)
        self.distinct.merge(other.distinct)
        self.tokens += other.tokens
        self.units += other.units
        self.counts += other.counts
        if self.state is None and other.state is None:
            self.few += other.few
            if self.own.n >= self.own.dim:
                self.state, self.few = _state_of(self.few), []
            return
        # A sum of chunks, each summed for itself.
        states = [of.state or _state_of(of.few) for of in (self, other) if of.state or of.few]
        self.state, self.few = states[0] if len(states) == 1 else states[0].merge(states[1]), []


def _state_of(few: Sequence[np.ndarray]) -> VendiState:
    state = VendiState(few[0].shape[1])
    for sketches in few:
        state.update(sketches)
    return state


def _read(run: RunDirectory, engine: Engine | None = None) -> _Read:
    dim, spec = run.dim, run.sketch_spec
    read = _Read(RowMean(dim, spec), None, Distinct(), [], 0, [], [])
    for more in over_run(engine, run, ["sketch", "length"], partial(_read_parts, dim, spec)):
        read.merge(more)
    return read


def _read_parts(dim: int, spec: dict[str, Any], parts: Iterator[Part]) -> _Read:
    read = _Read(RowMean(dim, spec), None, Distinct(), [], 0, [], [])
    for part in parts:
        read.own.update(part.sketches)
        read.distinct.update(part.sketches)
        read.tokens += int(part.length.sum())
        read.units.append(part.unit)
        read.counts.append(len(part.sketches))
        if read.state is not None:
            read.state.update(part.sketches)
            continue
        read.few.append(part.sketches)
        if read.own.n >= dim:
            read.state, read.few = _state_of(read.few), []
    return read


def _check_orders(orders: Sequence[float]) -> None:
    for q in orders:
        if not q > 0:
            raise GvendiError(f"orders holds {q}; wanted orders above 0, such as 0.5, 2 or inf")


def unreadable_of(run: RunDirectory) -> dict[str, str]:
    """{file or folder: why} of what was passed over because it could not be read."""
    return {item["path"]: item["reason"] for item in (run.manifest or {}).get("unreadable", [])}


def damaged_of(run: RunDirectory) -> dict[str, str]:
    """{file of the corpus that ends before it should: what is wrong with it}."""
    return {item["path"]: item["reason"] for item in (run.manifest or {}).get("damaged", [])}


class _Clock:
    """Passes progress on and measures the time and the tokens of this run."""

    def __init__(self, inner: Progress | None) -> None:
        self.inner, self.tokens, self.seconds, self._start = inner, 0, 0.0, 0.0

    def start(self, rows: int, done: int) -> None:
        self._start = time.perf_counter()
        if self.inner is not None:
            self.inner.start(rows, done)

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        self.tokens += tokens
        if self.inner is not None:
            self.inner.advance(rows, tokens, rejected)

    def note(self, text: str) -> None:
        if self.inner is not None:
            self.inner.note(text)

    def close(self) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.inner is not None:
            self.inner.close()
