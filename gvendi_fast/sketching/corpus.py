"""Corpus -> run directory: read, tokenise, sketch and store every row, one work unit after the other.

A work unit that is done is on disk whole, and a run that was killed goes on with the missing ones. On a CPU a batch
holds rows of one work unit only, so that a resumed run ends with the same bytes. On a GPU a batch holds rows of
several, to be large enough to keep it busy, and the sketches of a resumed run are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gvendi_fast.base.caller import caller
from gvendi_fast.base.differences import PARAMETERS
from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists
from gvendi_fast.base.places import place
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.data.growth import growing_index_for, index_for
from gvendi_fast.data.hub_data import HubRows
from gvendi_fast.data.in_memory import Corpus, index_of, is_paths
from gvendi_fast.data.index import Manifest, index_corpus, index_files
from gvendi_fast.data.index_ahead import IndexAhead
from gvendi_fast.data.kinds import STANDARD_INPUT
from gvendi_fast.data.leases import forget_failures, quarantined
from gvendi_fast.data.listing import list_files
from gvendi_fast.data.named_fields import fault_of_named_fields
from gvendi_fast.data.run_directory import RunDirectory, check_free, recorded_store, sketch_spec
from gvendi_fast.data.run_files import write_warnings
from gvendi_fast.data.sketched_parameters import SketchedParameters
from gvendi_fast.data.stored_sketches import FLOAT32
from gvendi_fast.data.worker_records import LOST, read_workers
from gvendi_fast.sketching.chosen_dim import chosen_dim, recorded_dim
from gvendi_fast.sketching.gradients.compiled import CompileError, choose_compile
from gvendi_fast.sketching.gradients.names import plain_model
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.hand_out import UnitsFailedError
from gvendi_fast.sketching.inspection import Inspection, InspectionWarning, look
from gvendi_fast.sketching.proxy.encode import Encoder
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.sketching.proxy.text_config import positions_of
from gvendi_fast.sketching.settings import Settings
from gvendi_fast.sketching.stages import Stages, TooManyRejectedError
from gvendi_fast.sketching.unit_size import BYTES_A_TOKEN, bytes_of, choose_cut
from gvendi_fast.sketching.unit_worker import ProxyByName, UnitJob, encoder_for
from gvendi_fast.vendi.centered import RowMean, centred_spec

__all__ = ["Settings", "TooManyRejectedError", "UnitsFailedError", "sketch_corpus"]

# Changes whenever the same settings would give other sketches than before. 2: norms and heads of bfloat16 proxies.
# 3: what is supervised of a conversation under templates that rewrite turns or add text to each of them, and control
# tokens that a content spells out.
FORMAT = 3
DEFAULT_MAX_TOKENS = 4096
# Of a trial's samples, by which the pass is compiled for every length.
TRIAL_TOKENS = 64


def sketch_corpus(
    data: Corpus,
    out: str | os.PathLike,
    proxy: Proxy,
    settings: Settings | None = None,
    progress: Progress | None = None,
    mean: RowMean | None = None,
    engine: Engine | None = None,
) -> RunDirectory:
    """Sketch every row of a corpus into the run directory `out`, going on where an earlier run stopped.

    data: files, folders or globs of JSON, CSV, Parquet and Arrow as `list_files` takes them, "-" for standard input,
        a data set of the Hugging Face hub (`data.hub_names`); or rows (`data.in_memory`).
    proxy: the model whose gradients are sketched, with wrappers (`gradients.names`) or without.
    out: the run directory.
    settings: how the corpus is sketched.
    progress: where the run reports.
    engine: which processes do the work (default: this one). Of several ranks each calls this with the same arguments;
        the first reports, and raises UnitsFailedError where work units failed too often.
    mean: one that the rows are to be centred by later; of other settings it is refused before any row is sketched.
    Rows that cannot be scored are recorded with file, line and reason and the run goes on. Of a corpus that has grown
    since (a higher limit, lines behind those of a file, more files) what is done stays: see `data.growth`. Raises
    GvendiError for a corpus or a directory that cannot be used, for other settings than the directory's, for a corpus
    that changes under the run, and when more than `max_rejected` rows are rejected (what was done is kept). Every part
    of an earlier run is read first; those that are damaged or belong elsewhere are named and computed again.
    """
    settings, engine = settings or Settings(), engine or LocalEngine()
    progress = (progress if engine.is_first else None) or Silent()
    _check_shared(data, engine)
    if os.fspath(out):
        # Before the corpus is read, which may take long.
        check_free(place(out))
        if engine.world > 1:
            engine.folder = out
    proxy = replace(proxy, model=plain_model(proxy.model))
    if settings.terms.hang_after_s is None:
        settings = replace(settings, terms=replace(settings.terms, hang_after_s=engine.hang_after_s))
    reading: dict[str, Any] = {
        "max_row_bytes": settings.max_row_bytes,
        "skip_unreadable": settings.skip_unreadable,
        "hub": HubRows(out, progress, waits=engine.world > 1),
        "engine": engine,
    }
    index = index_of(data, out, partial(index_corpus, **reading), settings.fields, settings.limit)
    limit = longest(proxy.name, positions_of(proxy.model.config), settings.max_tokens)
    encoder = encoder_for(proxy, settings, limit)
    measured = partial(sketcher_for, proxy.model, settings)
    cut = choose_cut(data, out, index, proxy, encoder, measured, settings, engine, progress)
    asked = (settings.fields, cut.rows, settings.limit, cut.bytes)
    if _may_begin_early(data, settings, engine):
        manifests = growing_index_for(out, partial(index_files, data, **reading), *asked)
    else:
        manifests = (manifest for manifest in [index_for(out, index, *asked)])
    with IndexAhead(manifests) as ahead:
        manifest = ahead.newest()
        fault = fault_of_named_fields(manifest)
        if fault is not None and not manifest.is_whole:
            # Another file may have what no row of these has.
            manifest = ahead.newest(is_whole=True)
            fault = fault_of_named_fields(manifest)
        remarks = _Remarks(progress)
        remarks.say(manifest)
        if fault is not None:
            raise fault
        size = None if manifest.is_whole else bytes_of(data, out, settings)
        is_here, tokens = not engine.is_remote, _about_tokens(manifest, size)
        is_compiled = is_here and choose_compile(settings.compile, proxy.device, tokens)[0]
        found = _look(manifest, encoder, settings.strict, progress, engine.is_first)
        if settings.auto_dim:
            dim = recorded_dim(out, progress) or chosen_dim(
                manifest, proxy, encoder, sketcher_for, settings, progress
            )
            # Another rank may have been quicker, and chosen otherwise on another GPU.
            dim = (recorded_dim(out, Silent()) if engine.world > 1 else None) or dim
            settings = replace(settings, spec=replace(settings.spec, dim=dim))
        sketcher = sketcher_for(proxy.model, settings)
        settings = replace(settings, store=settings.store or recorded_store(out))
        spec = spec_of(proxy, sketcher, settings, limit)
        if mean is not None:
            centred_spec(sketch_spec(spec), mean, settings.spec.dim)
        run = RunDirectory.open(out, spec, manifest.to_dict(), parameters_of(sketcher, settings))
        if (note := run.no_digest()) is not None:
            progress.note(note)
        run.advice = manifest.advice
        write_warnings(run.path, [fault.to_dict() for fault in found.faults])
        # What other ranks have tried meanwhile counts.
        if settings.retry_failed and engine.is_first:
            forget_failures(run.path, quarantined(run.path))
        make_job = partial(
            UnitJob,
            path=run.path,
            spec=run.spec,
            settings=settings,
            longest=limit,
            make_sketcher=sketcher_for if is_here else partial(sketcher_there, tokens),
            proxy=proxy if is_here else ProxyByName.of(proxy),
            run=engine.run_id,
            engine=engine.name,
            rank=engine.rank,
            progress=progress if is_here else None,
        )

        def look_again(manifest: Manifest) -> None:
            known = {fault.kind for fault in found.faults}
            now = _look(manifest, encoder, settings.strict, progress, engine.is_first, known)
            write_warnings(run.path, [fault.to_dict() for fault in now.faults])

        make_sketcher = partial(compiled_for, proxy.model, settings) if is_compiled else lambda: sketcher
        stages = Stages(run, settings, engine, progress, make_job, make_sketcher, is_compiled)
        stages.work(manifest, ahead, remarks.say, look_again)
    if engine.is_first or _is_alone(run, engine):
        run.finish()
    return run


def _check_shared(data: Corpus, engine: Engine) -> None:
    """GvendiError for a corpus that several ranks cannot read alike."""
    if engine.world == 1:
        return
    said = f"engine is {engine.name!r} with {engine.world} processes"
    if not is_paths(data):
        raise GvendiError(
            f"data holds rows, and {said}, each of which would write them into the run directory; write them to a "
            "file first, such as JSON lines, and give its path, or use the engine 'local'"
        )
    named = [data] if isinstance(data, str | os.PathLike) else list(data)
    if any(os.fspath(item) == STANDARD_INPUT for item in named):
        raise GvendiError(
            f"data is '-', standard input, and {said}, of which one at most is given it; write it to a file and name "
            "that, or use the engine 'local'"
        )


def _may_begin_early(data: Corpus, settings: Settings, engine: Engine) -> bool:
    """Whether the first files may be worked on while others are read: nothing asked for needs to know all rows."""
    if not is_paths(data) or engine.world > 1:
        return False
    if settings.auto_dim or settings.strict or isinstance(settings.max_rejected, float):
        return False
    listing = list_files(data, settings.skip_unreadable, with_hub=True)
    return not listing.hub and STANDARD_INPUT not in listing.files and len(listing.files) > 1


class _Remarks:
    """What is said of a corpus, once, as more of it is known."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[str] = set()

    def say(self, manifest: Manifest) -> None:
        for note in manifest.remarks():
            if note not in self._said:
                self._said.add(note)
                self._progress.note(note)


def _is_alone(run: RunDirectory, engine: Engine) -> bool:
    """Whether a rank that is not the first is to list the rejected rows, as the first one is lost, or was never there.

    A list that is there is that of the corpus, as one that grows removes it.
    """
    if exists(run.path / "rejected.jsonl") or set(quarantined(run.path)) - set(run.done()):
        return False
    states = [
        record.state()
        for record in read_workers(run.path).found.values()
        if record.run == engine.run_id and record.rank == 0
    ]
    return LOST in states or not states


def _look(
    manifest: Manifest,
    encoder: Encoder,
    strict: bool,
    progress: Progress,
    is_first: bool,
    known: Collection[str] = (),
) -> Inspection:
    """Say what a look at a few rows shows; known: kinds of faults that were told before.

    Raises GvendiError for a warning where `strict` asks for it.
    """
    found = look(manifest, encoder)
    progress.note(found.summary())
    for fault in found.faults if is_first else ():
        if fault.kind in known:
            continue
        # Without a registry, which would pass over the same words of the next corpus.
        warnings.warn_explicit(InspectionWarning(str(fault)), InspectionWarning, *caller())
    if strict and found.faults:
        count = len(found.faults)
        raise GvendiError(
            f"strict is set, and the look at {found.looked_at:,} rows gives the warning{'s' * (count > 1)} above "
            f"({count}): mend the rows, or leave it out"
        )
    return found


def _about_tokens(manifest: Manifest, size: int | None) -> int:
    """About how many tokens a corpus has, by the size of its files, if more than these; too few if compressed."""
    return max(size or 0, sum(file.size for file in manifest.files)) // BYTES_A_TOKEN


def sketcher_for(model: Any, settings: Settings, is_compiled: bool = False) -> GradientSketcher:
    """The sketcher that a run of these settings has."""
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


def compiled_for(model: Any, settings: Settings) -> GradientSketcher:
    """`sketcher_for` with its pass compiled; as it is, with a warning, if that fails and was not demanded."""
    positions = positions_of(model.config) or TRIAL_TOKENS
    trial = torch.ones(2, min(TRIAL_TOKENS, positions), dtype=torch.int64)
    try:
        found = sketcher_for(model, settings, is_compiled=True)
        found(trial, trial)
    except CompileError as error:
        if settings.compile == "on":
            raise
        warnings.warn(f"{error}; the run goes on without it", RuntimeWarning, stacklevel=3)
        return sketcher_for(model, settings)
    return found


def sketcher_there(tokens: int, model: Any, settings: Settings) -> GradientSketcher:
    """The sketcher of a worker elsewhere in a run over about `tokens` tokens, compiled if that pays on its device."""
    device = next(model.parameters()).device
    is_compiled, _ = choose_compile(settings.compile, device, tokens)
    return (compiled_for if is_compiled else sketcher_for)(model, settings)


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


def longest(proxy: str, positions: int | None, asked: int | None) -> int:
    """Tokens of the longest sequence of a run: what was asked for, else what the proxy reads, at most 4096.

    Raises GvendiError where more is asked for than the proxy reads.
    """
    if asked is None:
        return min(positions or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    if positions and asked > positions:
        raise GvendiError(f"max_tokens is {asked}, but the proxy {proxy!r} reads at most {positions} tokens")
    return asked
