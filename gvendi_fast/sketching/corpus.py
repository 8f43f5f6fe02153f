"""Corpus -> run directory: read, tokenise, sketch and store every row, one work unit after the other.

A work unit that is done is on disk whole, and a run that was killed goes on with the missing ones. On a CPU a batch
holds rows of one work unit only, so that a resumed run ends with the same bytes. On a GPU a batch holds rows of
several, to be large enough to keep it busy, and the sketches of a resumed run are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.caller import caller
from gvendi_fast.base.differences import PARAMETERS
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.base.transfer import Fetched, fetch
from gvendi_fast.base.unit_length import has_direction, refused_gradient
from gvendi_fast.data.growth import growth_note, index_for
from gvendi_fast.data.hub_data import HubRows
from gvendi_fast.data.in_memory import Corpus, index_of
from gvendi_fast.data.index import Fields, Manifest, Rejected, Unit, UnitReader, index_corpus
from gvendi_fast.data.named_fields import check_named_fields
from gvendi_fast.data.rejections import kinds_of, listed, remedies
from gvendi_fast.data.rows import MAX_ROW_BYTES
from gvendi_fast.data.run_directory import Part, RunDirectory, recorded_store, sketch_spec
from gvendi_fast.data.run_files import write_warnings
from gvendi_fast.data.sketched_parameters import SketchedParameters
from gvendi_fast.data.standard_input import keep_in
from gvendi_fast.data.stored_sketches import FLOAT32, check_store
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.gradients.adapters import check_choice
from gvendi_fast.sketching.gradients.compiled import CompileError, choose_compile
from gvendi_fast.sketching.gradients.layers import check_groups, check_preset
from gvendi_fast.sketching.gradients.names import plain_model
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.inspection import Inspection, InspectionWarning, evenly, look
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.sketching.proxy.text_config import positions_of
from gvendi_fast.vendi.centered import RowMean, centred_spec
from gvendi_fast.vendi.choose_dim import DIMS, choose_dim

# Changes whenever the same settings would give other sketches than before. 2: norms and heads of bfloat16 proxies.
# 3: what is supervised of a conversation under templates that rewrite turns or add text to each of them, and control
# tokens that a content spells out.
FORMAT = 3
DEFAULT_MAX_TOKENS = 4096
# Of a trial's samples, by which the pass is compiled for every length.
TRIAL_TOKENS = 64
# English text; only for the choice of compiling.
BYTES_A_TOKEN = 4
# Work units share batches on a GPU until they have this many rows or tokens. The 7,473 rows of GSM8K make 148 batches
# of 10,400 padded tokens (7.8 % padding, budget 65,536) in units of 512, 26 of 56,500 (3.1 %) from 8192 rows on. Tokens
# bound long rows: 34 MB of ids and labels, twice with the group that is tokenised ahead. A kill loses one group.
ROWS_TOGETHER, TOKENS_TOGETHER = 8192, 1 << 22
# Rows that choose K, spread over so many work units: predictions from 512 of 3,000 rows are within a tenth of the bias.
CHOOSING_ROWS, CHOOSING_UNITS = 512, 16
# Parts that the line on damaged ones names.
NAMED = 5


@dataclass(frozen=True)
class Settings:
    """How a corpus is sketched. Sizes of batches and work units, `max_rejected` and `compile` leave sketches alone.

    spec: dimension, kind and seed of the sketch.
    auto_dim: choose the dimension in place of `spec.dim`: that of the run directory if there is one, else the smallest
        power of two from 512 to 8192 at which the bias of all rows is predicted below 5 %, from up to 512 of them,
        spread over the corpus and sketched at 8192 (`choose_dim.choose_dim`). It depends on corpus, proxy and settings.
    fields: names of the row's fields, and the shape of the rows: `Fields(format="alpaca")`, or "auto", which recognises
        it from the first rows.
    max_tokens: longest sequence (None: the longest that the proxy reads, at most 4096).
    batch_tokens: padded tokens of one batch (None: 2048 on a CPU, what fits into the free memory of a GPU).
    mask: "completion", or "released" for the masking of the released G-Vendi code.
    limit: read the first `limit` rows only (None: all).
    unit_rows: rows of a work unit, at most; a run directory goes on with those that it was begun with.
    rows_together: work units share batches until they have this many rows (None: 8192 on a GPU, and one work unit at
        a time on a CPU).
    max_rejected: most rejected rows, an int for a count or a float below 1 for a share of all rows; with more the run
        ends with an error (None: no limit).
    exclude: patterns of parameters to leave out.
    layers: which kinds of layers are sketched, one of `layers.PRESETS`, or "last-N", the last N blocks.
    parameters: of an adapted model: "trainable", "adapters" or "base", see `GradientSketcher`.
    groups: also store sketches by group of layers, one of `layers.GROUPINGS` or {name: patterns of parameter names}.
    compile: "auto", "on" or "off", see `compiled.choose_compile`.
    max_row_bytes: longest row, in bytes of its JSON line, or of the columns in use of Parquet; a longer one is rejected
        before it is held in memory.
    skip_unreadable: pass over files and folders that cannot be read; the run directory lists them.
    control_tokens: "text", or "tokens", what control tokens are that a conversation's content spells out, see
        `encode.Encoder`.
    strict: end with an error, before any row is sketched, where the look at the first rows gives a warning.
    store: how the run directory keeps sketches, "float32", "float16" or "int8", see `data.stored_sketches` (None: as it
        was begun, float32 in a new one).
    """

    spec: SketchSpec = field(default_factory=SketchSpec)
    fields: Fields = field(default_factory=Fields)
    max_tokens: int | None = None
    batch_tokens: int | None = None
    mask: str = "completion"
    limit: int | None = None
    unit_rows: int = 512
    rows_together: int | None = None
    max_rejected: int | float | None = None
    exclude: tuple[str, ...] = ()
    layers: str = "all"
    groups: str | Mapping[str, Sequence[str]] | None = None
    compile: str = "auto"
    auto_dim: bool = False
    max_row_bytes: int = MAX_ROW_BYTES
    skip_unreadable: bool = False
    control_tokens: str = "text"
    strict: bool = False
    parameters: str = "trainable"
    store: str | None = None

    def __post_init__(self) -> None:
        check_store(self.store)
        check_preset(self.layers)
        check_choice(self.parameters)
        check_groups(self.groups)
        for name in ("batch_tokens", "unit_rows", "rows_together", "limit", "max_tokens", "max_row_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GvendiError(f"{name} must be at least 1, got {value}")
            # What a file can count; units.json takes no more.
            if value is not None and value > 1 << 62:
                raise GvendiError(f"{name} must be at most 2^62, got {value}; leave the setting out")
        share = self.max_rejected
        if share is not None and (share < 0 or (isinstance(share, float) and share >= 1)):
            raise GvendiError(
                f"max_rejected must be a count (an int from 0) or a share (a float from 0.0 to below 1), got {share!r}"
            )


class TooManyRejectedError(GvendiError):
    """More rows were rejected than `max_rejected` allows; the finished work units are kept."""


def sketch_corpus(
    data: Corpus,
    out: str | os.PathLike,
    proxy: Proxy,
    settings: Settings | None = None,
    progress: Progress | None = None,
    mean: RowMean | None = None,
) -> RunDirectory:
    """Sketch every row of a corpus into the run directory `out`, going on where an earlier run stopped.

    data: files, folders or globs of JSON, CSV, Parquet and Arrow as `list_files` takes them, "-" for standard input,
        a data set of the Hugging Face hub (`data.hub_names`); or rows (`data.in_memory`).
    proxy: the model whose gradients are sketched, with wrappers (`gradients.names`) or without.
    out: the run directory.
    settings: how the corpus is sketched.
    progress: where the run reports.
    mean: one that the rows are to be centred by later; of other settings it is refused before any row is sketched.
    Rows that cannot be scored are recorded with file, line and reason and the run goes on. Of a corpus that has grown
    since (a higher limit, lines behind those of a file, more files) what is done stays: see `data.growth`. Raises
    GvendiError for a corpus or a directory that cannot be used, for other settings than the directory's, for a corpus
    that changes under the run, and when more than `max_rejected` rows are rejected (what was done is kept). Every part
    of an earlier run is read first; those that are damaged or belong elsewhere are named and computed again.
    """
    settings, progress = settings or Settings(), progress or Silent()
    proxy = replace(proxy, model=plain_model(proxy.model))
    index = index_of(
        data,
        out,
        partial(
            index_corpus,
            max_row_bytes=settings.max_row_bytes,
            skip_unreadable=settings.skip_unreadable,
            hub=HubRows(out, progress),
        ),
        settings.fields,
        settings.limit,
    )
    manifest = index_for(out, index, settings.fields, settings.unit_rows, settings.limit)
    for note in manifest.remarks():
        progress.note(note)
    check_named_fields(manifest)
    is_compiled, _ = choose_compile(settings.compile, proxy.device, _about_tokens(manifest))
    positions = positions_of(proxy.model.config)
    limit = longest(proxy.name, positions, settings.max_tokens)
    encoder = Encoder(proxy.tokenizer, limit, settings.mask, proxy.vocabulary, settings.control_tokens)
    found = _look(manifest, encoder, settings.strict, progress)
    if settings.auto_dim:
        dim = _recorded_dim(out, progress) or _chosen_dim(manifest, proxy, encoder, settings, progress)
        settings = replace(settings, spec=replace(settings.spec, dim=dim))
    sketcher = _sketcher(proxy.model, settings)
    settings = replace(settings, store=settings.store or recorded_store(out))
    spec = spec_of(proxy, sketcher, settings, limit)
    if mean is not None:
        centred_spec(sketch_spec(spec), mean, settings.spec.dim)
    run = RunDirectory.open(out, spec, manifest.to_dict(), parameters_of(sketcher, settings))
    if (note := run.no_digest()) is not None:
        progress.note(note)
    run.advice = manifest.advice
    write_warnings(run.path, [fault.to_dict() for fault in found.faults])
    manifest = manifest.recorded_as(run.manifest)
    for source in manifest.files:
        keep_in(run.path, source.path, source.kind, source.here or source.path)
    allowed = _allowed_rejects(settings.max_rejected, manifest.rows)
    done = _usable(run, manifest, progress)
    if (note := growth_note(manifest, done)) is not None:
        progress.note(note)
    todo = [unit for unit in manifest.units if unit.ordinal not in done]
    rejected = sum(1 for _ in run.rejected(sorted(done)))
    progress.start(manifest.rows, manifest.rows - sum(unit.rows for unit in todo))
    try:
        _check_rejects(rejected, allowed, run, done)
        if is_compiled and todo:
            progress.note("compiling the proxy's blocks, once; that takes seconds to a minute")
            sketcher = _compiled(sketcher, settings)
        # If all is done, the trial batches of a GPU's budget would be wasted.
        batch_tokens = choose_batch_tokens(sketcher, settings.batch_tokens) if todo else 0
        on_gpu = proxy.device.type == "cuda"
        rows = settings.rows_together or (ROWS_TOGETHER if on_gpu else 1)
        columns = Columns(sketcher.spec.dim, sketcher.groups.names, settings.groups is not None)
        groups = _ahead(_together(manifest, todo, encoder, columns, rows))
        queued = _queued(groups, sketcher, proxy, batch_tokens, columns.keeps_groups)
        for group, batch, fetched in _behind(queued, int(on_gpu)):
            if fetched is not None:
                group.take(batch, fetched)
                progress.advance(len(batch), sum(sample.length for sample in batch), 0)
            # Finished work units are written before the limit can end the run.
            for unit in group.finished():
                refused = len(unit.refused) + unit.write(run)
                done.add(unit.unit.ordinal)
                progress.advance(len(unit.refused), 0, refused)
                rejected += refused
            _check_rejects(rejected, allowed, run, done)
    finally:
        progress.close()
    run.finish()
    return run


def _look(manifest: Manifest, encoder: Encoder, strict: bool, progress: Progress) -> Inspection:
    """Say what a look at a few rows shows. Raises GvendiError for a warning where `strict` asks for it."""
    found = look(manifest, encoder)
    progress.note(found.summary())
    for fault in found.faults:
        # Without a registry, which would pass over the same words of the next corpus.
        warnings.warn_explicit(InspectionWarning(str(fault)), InspectionWarning, *caller())
    if strict and found.faults:
        count = len(found.faults)
        raise GvendiError(
            f"strict is set, and the look at {found.looked_at:,} rows gives the warning{'s' * (count > 1)} above "
            f"({count}): mend the rows, or leave it out"
        )
    return found


def _usable(run: RunDirectory, manifest: Manifest, progress: Progress) -> set[int]:
    """The work units whose parts can stay; one line names those that cannot."""
    broken = run.broken({unit.ordinal: unit.digest for unit in manifest.units})
    if broken:
        names = ", ".join(f"{damage.path.name} ({damage.why})" for damage in broken[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        count = "1 part is" if len(broken) == 1 else f"{len(broken)} parts are"
        progress.note(
            printable(
                f"{count} damaged or of another run in '{run.parts}', and computed again: {names}{more}"
            )
        )
    return set(run.done()) - {damage.unit for damage in broken}


def _recorded_dim(out: str | os.PathLike, progress: Progress) -> int | None:
    """The dimension of the run directory `out`, None where there is none yet."""
    if not (Path(out) / "spec.json").is_file():
        return None
    dim = RunDirectory.load(out).dim
    progress.note(f"K = {dim}, as the sketches in '{out}'")
    return dim


def _chosen_dim(
    manifest: Manifest, proxy: Proxy, encoder: Encoder, settings: Settings, progress: Progress
) -> int:
    """The dimension that `auto_dim` stands for, with one line that says why."""
    # Its spectrum is that of a dense sketch, which would take 8192 additions a parameter and row.
    spec = SketchSpec(DIMS[-1], seed=settings.spec.seed)
    sketcher = GradientSketcher(
        proxy.model, spec, exclude=settings.exclude, layers=settings.layers, parameters=settings.parameters
    )
    samples = _spread_samples(manifest, encoder, CHOOSING_ROWS)
    sketches = [torch.empty(0, spec.dim)]
    if samples:
        budget = choose_batch_tokens(sketcher, settings.batch_tokens)
        pad = proxy.tokenizer.pad_token_id
        progress.note(f"choosing K from {len(samples):,} row{'s' * (len(samples) != 1)}")
        sketches += [
            sketch_batch(sketcher, batch, 0 if pad is None else pad).z.cpu()
            for batch in batches(samples, budget)
        ]
    rows = torch.cat(sketches)
    rows = rows[has_direction(torch.linalg.vector_norm(rows.double(), dim=1))]
    if len(rows) == 0:
        progress.note(f"K = {settings.spec.dim}: none of the rows that would choose it has a gradient")
        return settings.spec.dim
    chosen = choose_dim(rows, manifest.rows - manifest.duplicates)
    progress.note(chosen.sentence)
    return chosen.dim


def _spread_samples(manifest: Manifest, encoder: Encoder, count: int) -> list[Sample]:
    """Up to `count` samples, evenly spread over each of up to CHOOSING_UNITS evenly spread work units."""
    units = evenly(manifest.units, CHOOSING_UNITS if manifest.rows > count else len(manifest.units))
    share = -(-count // len(units)) if manifest.rows > count else count
    samples: list[Sample] = []
    with UnitReader(manifest) as reader:
        for unit in units:
            # All are tokenised, since the texts of a work unit may be too large to choose among.
            readable = (row for row in reader.read(unit) if not isinstance(row, Rejected))
            encoded = evenly(list(encoder.stream(readable)), share)
            samples += [sample for sample in encoded if isinstance(sample, Sample)]
    return samples[:count]


def _about_tokens(manifest: Manifest) -> int:
    """About how many tokens a corpus has, by the size of its files; too few if they are compressed."""
    return sum(file.size for file in manifest.files) // BYTES_A_TOKEN


def _sketcher(model: Any, settings: Settings, is_compiled: bool = False) -> GradientSketcher:
    # By kind in every run, for the norms' shares: one addition a layer more, and the same sketches to the bit.
    groups = "kind" if settings.groups is None else settings.groups
    return GradientSketcher(
        model,
        settings.spec,
        exclude=settings.exclude,
        layers=settings.layers,
        groups=groups,
        parameters=settings.parameters,
        compile=is_compiled,
    )


def _compiled(sketcher: GradientSketcher, settings: Settings) -> GradientSketcher:
    """The sketcher with its pass compiled; the one given, with a warning, if that fails and was not demanded."""
    positions = positions_of(sketcher.model.config) or TRIAL_TOKENS
    trial = torch.ones(2, min(TRIAL_TOKENS, positions), dtype=torch.int64)
    try:
        compiled = _sketcher(sketcher.model, settings, is_compiled=True)
        compiled(trial, trial)
    except CompileError as error:
        if settings.compile == "on":
            raise
        warnings.warn(f"{error}; the run goes on without it", RuntimeWarning, stacklevel=3)
        return sketcher
    return compiled


def spec_of(proxy: Proxy, sketcher: GradientSketcher, settings: Settings, max_tokens: int) -> dict[str, Any]:
    """Everything the sketches depend on, as written to spec.json: sketches of two specs are never mixed.

    Device, backend, attention and compiling are left out: they change only the rounding, so that a run which began on
    one machine may go on on another.
    """
    local = proxy.revision.startswith("sha256:")
    template = getattr(proxy.tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = json.dumps(template, sort_keys=True)
    # Only where asked for, so that directories of earlier versions go on.
    chosen: dict[str, Any] = {} if settings.layers == "all" else {"layers": settings.layers}
    if settings.parameters != "trainable":
        chosen["parameters"] = settings.parameters
    if settings.store not in (None, FLOAT32):
        chosen["store"] = settings.store
    if proxy.weights:
        chosen["weights"] = proxy.weights
    if settings.control_tokens != "text":
        chosen["control_tokens"] = settings.control_tokens
    # Most templates go through their messages in a loop that tells whose turn it is.
    if template and (turns := Encoder(proxy.tokenizer).method) != "loop":
        chosen["turns"] = turns
    if settings.groups is not None:
        chosen["groups"] = {
            "by": settings.groups if isinstance(settings.groups, str) else dict(settings.groups),
            **sketcher.groups.as_dict(),
        }
    return {
        **chosen,
        "format": FORMAT,
        # A folder is identified by its digest, wherever it is.
        "proxy": {"name": Path(proxy.name).name if local else proxy.name, "revision": proxy.revision},
        "sketch": sketcher.spec.as_dict(),
        "dtype": str(next(proxy.model.parameters()).dtype).removeprefix("torch."),
        "mask": settings.mask,
        "template": template and hashlib.blake2b(template.encode(), digest_size=8).hexdigest(),
        "max_tokens": max_tokens,
        "exclude": list(settings.exclude),
        "coverage": sketcher.coverage.as_dict(),
        PARAMETERS: parameters_of(sketcher).digest,
    }


def parameters_of(sketcher: GradientSketcher, settings: Settings | None = None) -> SketchedParameters:
    """What a sketcher sketches, as parameters.json has it; settings: by their groups too, where those are kept."""
    keeps = settings is not None and settings.groups is not None
    return SketchedParameters(sketcher.shapes, sketcher.groups.of if keeps else None)


@dataclass(frozen=True)
class Columns:
    """What is stored of a row. dim: K. groups: names of groups of layers. keeps_groups: their sketches too."""

    dim: int
    groups: tuple[str, ...]
    keeps_groups: bool


def _shares(norms: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """{group: its share of the sum over groups of squared norms}: norms [n, G]."""
    squares = np.square(norms.astype(np.float64))
    shares = (squares / squares.sum(axis=1, keepdims=True)).astype(np.float32)
    return {name: shares[:, i] for i, name in enumerate(groups)}


class UnitSketches:
    """The sketches of a work unit's samples, in input order whatever the order of its batches.

    refused: rows of the work unit that gave no sample. columns: what is stored of a row.
    """

    def __init__(
        self, unit: Unit, samples: Sequence[Sample], refused: Sequence[Rejected], columns: Columns
    ) -> None:
        self.unit, self.samples, self.refused, self.columns = unit, samples, refused, columns
        self.missing = len(samples)
        self._place = {sample.row: i for i, sample in enumerate(samples)}
        dim, count = columns.dim, len(columns.groups)
        self._sketches = np.zeros((len(samples), dim), np.float32)
        self._norms = np.zeros((len(samples), count), np.float32)
        self._by_group = np.zeros((len(samples), count if columns.keeps_groups else 0, dim), np.float32)
        self._loss = np.zeros(len(samples), np.float32)
        self._tokens = np.zeros(len(samples), np.int32)

    def take(
        self,
        samples: Sequence[Sample],
        z: np.ndarray,
        loss: np.ndarray,
        tokens: np.ndarray,
        norms: np.ndarray,
        by_group: np.ndarray,
    ) -> None:
        """Store the results of some of the work unit's samples.

        z [B, K], loss [B], tokens [B], norms [B, G] of the groups' sketches, and the sketches [B, G, K] (or [B, 0, K]).
        """
        where = [self._place[sample.row] for sample in samples]
        self._sketches[where], self._loss[where], self._tokens[where] = z, loss, tokens
        self._norms[where], self._by_group[where] = norms, by_group
        self.missing -= len(samples)

    def write(self, run: RunDirectory) -> int:
        """Write the part; returns how many samples had no usable gradient."""
        norm = np.linalg.norm(self._sketches.astype(np.float64), axis=1)
        usable = has_direction(norm)
        bad = [
            Rejected(s.file, s.line, refused_gradient(norm[i]), s.id)
            for i, s in enumerate(self.samples)
            if not usable[i]
        ]
        kept = [sample for i, sample in enumerate(self.samples) if usable[i]]
        part = Part(
            self.unit.ordinal,
            ids=[s.id for s in kept],
            groups=[s.group for s in kept],
            rows=np.array([self.unit.first_row + s.row for s in kept], np.int64),
            sketches=self._sketches[usable],
            tokens=self._tokens[usable],
            length=np.array([s.length for s in kept], np.int32),
            loss=self._loss[usable],
            gradient_norm=norm[usable].astype(np.float32),
            norm_shares=_shares(self._norms[usable], self.columns.groups),
            group_sketches=self._by_group[usable].reshape(len(kept), math.prod(self._by_group.shape[1:]))
            if self.columns.keeps_groups
            else None,
        )
        run.write_part(part, [*self.refused, *bad], self.unit.digest)
        return len(bad)


class UnitsTogether:
    """Work units whose samples share batches; each is handed out when all its results are there."""

    def __init__(self, units: Sequence[UnitSketches]) -> None:
        self._open = list(units)
        self._owner = {id(sample): unit for unit in units for sample in unit.samples}
        self.samples = [sample for unit in units for sample in unit.samples]

    def take(self, batch: Sequence[Sample], fetched: Fetched) -> None:
        """Store a batch's results, as `_queued` fetches them, after waiting for them if they are still computed."""
        results = [x.numpy() for x in fetched.wait()]
        shares: dict[int, list[int]] = {}
        for place, sample in enumerate(batch):
            shares.setdefault(id(self._owner[id(sample)]), []).append(place)
        for places in shares.values():
            unit = self._owner[id(batch[places[0]])]
            unit.take([batch[i] for i in places], *(x[places] for x in results))

    def finished(self) -> list[UnitSketches]:
        """The complete work units that were not handed out yet, in input order."""
        done = [unit for unit in self._open if unit.missing == 0]
        self._open = [unit for unit in self._open if unit.missing]
        return done


_Queued = tuple[UnitsTogether, list[Sample], Fetched | None]


def _queued(
    groups: Iterable[UnitsTogether],
    sketcher: GradientSketcher,
    proxy: Proxy,
    batch_tokens: int,
    keeps_groups: bool,
) -> Iterator[_Queued]:
    """Each group with each of its batches, whose results may still be computed; once with None if it has no batch."""
    pad = proxy.tokenizer.pad_token_id
    for group in groups:
        if not group.samples:
            yield group, [], None
        for batch in batches(group.samples, batch_tokens):
            got = sketch_batch(sketcher, batch, 0 if pad is None else pad)
            norms = torch.linalg.vector_norm(got.by_group, dim=-1)
            kept = got.by_group if keeps_groups else got.by_group[:, :0]
            yield group, batch, fetch(got.z, got.loss, got.tokens, norms, kept)


def _behind(items: Iterable[_Queued], count: int) -> Iterator[_Queued]:
    """The items in order, each one when `count` more have been made.

    With a GPU, one: a batch's results are waited for when the next batch is queued, so the GPU has work even while a
    part is written. On a CPU results are ready at once, and a work unit that is done is written at once.
    """
    waiting: deque[_Queued] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _ahead(groups: Generator[UnitsTogether, None, None]) -> Iterator[UnitsTogether]:
    """Each group read and tokenised while the one before it runs through the proxy."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        following = pool.submit(next, groups, None)
        try:
            while (group := following.result()) is not None:
                following = pool.submit(next, groups, None)
                yield group
        finally:
            # A run that ends early leaves an open file, which belongs to the thread that reads it.
            pool.submit(groups.close).result()


def _together(
    manifest: Manifest, todo: Sequence[Unit], encoder: Encoder, columns: Columns, rows: int
) -> Generator[UnitsTogether, None, None]:
    """Whole work units, read and tokenised, in groups of at least `rows` rows or TOKENS_TOGETHER tokens."""
    with UnitReader(manifest) as reader:
        units, held, tokens = [], 0, 0
        for unit in todo:
            refused: list[Rejected] = []
            samples: list[Sample] = []
            # Streamed, since the texts of a work unit may be large.
            for sample in encoder.stream(reader.read(unit)):
                (samples if isinstance(sample, Sample) else refused).append(sample)
            units.append(UnitSketches(unit, samples, refused, columns))
            held, tokens = held + unit.rows, tokens + sum(sample.length for sample in samples)
            if held >= rows or tokens >= TOKENS_TOGETHER:
                yield UnitsTogether(units)
                units, held, tokens = [], 0, 0
        if units:
            yield UnitsTogether(units)


def longest(proxy: str, positions: int | None, asked: int | None) -> int:
    """Tokens of the longest sequence of a run: what was asked for, else what the proxy reads, at most 4096.

    Raises GvendiError where more is asked for than the proxy reads.
    """
    if asked is None:
        return min(positions or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    if positions and asked > positions:
        raise GvendiError(f"max_tokens is {asked}, but the proxy {proxy!r} reads at most {positions} tokens")
    return asked


def _allowed_rejects(limit: int | float | None, rows: int) -> int | None:
    return int(limit * rows) if isinstance(limit, float) else limit


def _check_rejects(rejected: int, allowed: int | None, run: RunDirectory, done: set[int]) -> None:
    if allowed is None or rejected <= allowed:
        return
    first = [
        f"  {r.file}:{r.line}: {r.reason}" for r, _ in zip(run.rejected(sorted(done)), range(3), strict=False)
    ]
    kinds = kinds_of(run.rejected(sorted(done)))
    advice = f"\n{run.advice or remedies(kinds)}"
    raise TooManyRejectedError(
        f"{rejected} rows are rejected and --max-rejected allows {allowed}; mend the rows, or allow "
        f"more. By kind: {listed(kinds)}{advice}\nThe first:\n" + "\n".join(first)
    )
