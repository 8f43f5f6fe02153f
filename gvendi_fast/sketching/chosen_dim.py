"""The dimension K that `auto_dim` stands for: as the run directory has it, else by rows spread over the corpus."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gvendi_fast.base.places import place
from gvendi_fast.base.progress import Progress
from gvendi_fast.base.spread import evenly
from gvendi_fast.base.unit_length import has_direction
from gvendi_fast.data.index import Manifest, Rejected, UnitReader
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.sketching.settings import Settings
from gvendi_fast.vendi.choose_dim import DIMS, choose_dim

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# Rows that choose K, spread over so many work units: predictions from 512 of 3,000 rows are within a tenth of the bias.
CHOOSING_ROWS, CHOOSING_UNITS = 512, 16


def recorded_dim(out: str | os.PathLike, progress: Progress) -> int | None:
    """The dimension of the run directory `out`, None where there is none yet."""
    if not (place(out) / "spec.json").is_file():
        return None
    dim = RunDirectory.load(out).dim
    progress.note(f"K = {dim}, as the sketches in '{out}'")
    return dim


def chosen_dim(
    manifest: Manifest,
    proxy: Proxy,
    encoder: Encoder,
    make_sketcher: Callable[[Any, Settings], GradientSketcher],
    settings: Settings,
    progress: Progress,
) -> int:
    """The dimension that `auto_dim` stands for, with one line that says why.

    make_sketcher: what makes a sketcher of a model and settings.
    """
    # Its spectrum is that of a dense sketch, which would take 8192 additions a parameter and row.
    spec = SketchSpec(DIMS[-1], seed=settings.spec.seed)
    sketcher = make_sketcher(proxy.model, replace(settings, spec=spec, groups=None))
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
