"""How large the work units of a new run are: about a minute of work each, by the proxy's rate on a few rows.

A kill loses at most the units in work, and each unit is a file: with too large ones hours are lost on a slow proxy,
with too small ones a corpus is a million files. A corpus that takes less than a few minutes is not worth the question,
and has units of 512 rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.files import atomic_write, exists, make_folder
from gvendi_fast.base.places import place, size_of
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.growth import recorded_cut
from gvendi_fast.data.in_memory import Corpus, is_paths
from gvendi_fast.data.kinds import STANDARD_INPUT
from gvendi_fast.data.listing import list_files
from gvendi_fast.data.manifest import Manifest
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import check_free
from gvendi_fast.data.run_files import CUT, SPOOL, is_count, read_json
from gvendi_fast.data.unit_cuts import Cut, bytes_of_a_unit
from gvendi_fast.data.work_units import UnitReader
from gvendi_fast.sketching.batch_memory import sketch_batch
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.sketching.settings import Settings

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# Of a unit that is not cut by bytes, and of one that is, whose sketches are in memory until it is written.
ROWS, MOST_ROWS = 512, 4096
# English text.
BYTES_A_TOKEN = 4
# Rows that the rate is measured on: the shortest one, then a batch of so many tokens.
LOOKED_AT, TOKENS = 64, 2048
# A slow core's work in a second, and how long a corpus must take by it to be cut by bytes. One core of an AMD EPYC,
# in float32, does 2.8e10 of the proxy `tiny` and 5e10 of SmolLM2-135M.
FLOPS_A_SECOND, WORTH_S = 1e10, 60.0
# A first batch that takes so long tells the rate.
SLOW_S = 3.0
# Where workers have GPUs, which are not this process': half a minute of 0.5 B parameters on one of 2024.
BYTES_ON_GPUS = 1 << 24


def choose_cut(
    data: Corpus,
    out: str | os.PathLike,
    index: Callable[..., Manifest],
    proxy: Proxy,
    encoder: Encoder,
    make_sketcher: Callable[[], GradientSketcher],
    settings: Settings,
    engine: Engine,
    progress: Progress,
) -> Cut:
    """How the corpus is cut into work units: as asked for, as the run directory was begun, or by the proxy's rate.

    index: as `index_for` takes it; it reads the first rows alone. What is chosen is kept in the directory at once, so
    that all who begin it together choose alike.
    """
    if settings.unit_rows is not None or settings.unit_bytes is not None:
        return Cut(settings.unit_rows or MOST_ROWS, settings.unit_bytes)
    root = place(out)
    if (found := recorded_cut(out) or _agreed(root)) is not None:
        return found
    total = bytes_of(data, out, settings)
    parameters = sum(p.numel() for p in proxy.model.parameters())
    seconds_a_byte = 4 * parameters / FLOPS_A_SECOND / BYTES_A_TOKEN
    if total is None or total * seconds_a_byte < WORTH_S:
        return Cut(ROWS)
    if engine.is_remote and getattr(engine, "gpus_per_worker", 0):
        cut = Cut(MOST_ROWS, BYTES_ON_GPUS)
    else:
        limit = min(LOOKED_AT, settings.limit or LOOKED_AT)
        first = index(fields=settings.fields, rows_per_unit=ROWS, unit_bytes=None, limit=limit)
        rate = _rate(first, proxy, encoder, make_sketcher)
        if rate is None:
            return Cut(ROWS)
        cut = Cut(MOST_ROWS, bytes_of_a_unit(rate * BYTES_A_TOKEN))
        # A smaller corpus takes less than that in all.
        if total > cut.bytes:
            progress.note(
                f"work units of up to {cut.bytes:,} bytes of rows, about a minute of work at {rate:,.0f} tokens/s"
            )
    check_free(root)
    make_folder(root)
    with atomic_write(root / CUT, exclusive=True) as stream:
        stream.write(json.dumps({"unit_rows": cut.rows, "unit_bytes": cut.bytes}).encode() + b"\n")
    return _agreed(root) or cut


def _agreed(root: os.PathLike) -> Cut | None:
    """What another process, or one that was killed, has chosen before the corpus was recorded."""
    path = place(root) / CUT
    if not exists(path):
        return None
    found = read_json(path)
    rows, size = found.get("unit_rows"), found.get("unit_bytes")
    # It decides nothing yet that is not chosen as well anew.
    return Cut(rows, size) if is_count(rows) and rows and is_count(size) and size else None


def bytes_of(data: Corpus, out: str | os.PathLike, settings: Settings) -> int | None:
    """About how many bytes a corpus has; None where it is not known before it is read."""
    if not is_paths(data):
        return size_of(place(out) / SPOOL)
    listing = list_files(data, settings.skip_unreadable, with_hub=True)
    if listing.hub or STANDARD_INPUT in listing.files:
        return None
    total = 0
    for path in listing.files:
        try:
            total += size_of(path)
        # Whoever reads it says so, or passes it over.
        except OSError:
            continue
    return total


def _rate(
    manifest: Manifest, proxy: Proxy, encoder: Encoder, make_sketcher: Callable[[], GradientSketcher]
) -> float | None:
    """Tokens a second of the proxy on these rows; None where none can be sketched."""
    samples: list[Sample] = []
    with UnitReader(manifest) as reader:
        for unit in manifest.units:
            readable = (row for row in reader.read(unit) if not isinstance(row, Rejected))
            samples += [item for item in encoder.stream(readable) if isinstance(item, Sample)]
    if not samples:
        return None
    sketcher = make_sketcher()
    samples.sort(key=lambda sample: sample.length)
    rate = 0.0
    # The first pass has costs of its own; on a slow proxy it is enough.
    for batch in (samples[:1], next(iter(batches(samples, TOKENS)))):
        began = time.monotonic()
        sketch_batch(sketcher, batch, proxy.tokenizer.pad_token_id or 0).z.sum().item()
        seconds = max(time.monotonic() - began, 1e-6)
        rate = sum(sample.length for sample in batch) / seconds
        if seconds > SLOW_S:
            break
    return rate
