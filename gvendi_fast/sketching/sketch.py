"""`gvendi_fast.sketch`: rows or files -> a run directory."""

from __future__ import annotations

import os
from dataclasses import replace

from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.in_memory import Corpus
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy


def sketch(
    data: Corpus,
    *,
    out: str | os.PathLike,
    proxy: str | Proxy = "Qwen/Qwen2.5-0.5B-Instruct",
    settings: Settings | None = None,
    by: str | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> RunDirectory:
    """Sketch every row into the run directory `out`, and go on where an earlier call stopped.

    data: what is sketched, either of
        - paths: a file, folder or glob of JSON lines or Parquet, or a data set of the Hugging Face hub,
          "owner/name:configuration:split", or several of them;
        - rows: dicts with the fields of a row of a file, or texts, in a list, a generator or anything else that gives
          them one after the other; a pandas or polars DataFrame, a pyarrow Table, RecordBatchReader or Dataset; a
          Dataset or IterableDataset of the package datasets; a dict of columns.
    out: the run directory; the sketches are in its parts. Rows are kept there too, as rows.jsonl: they are iterated
        over once, and one is in memory at a time.
    proxy: "tiny", a local folder, a hub name, or a loaded Proxy.
    settings: how the corpus is sketched.
    by: a field whose values make groups.
    progress: where the run reports.
    engine: which processes do the work (default: this one), see `gvendi_fast.engines`.

    Values that JSON has not are written the obvious way: numbers and arrays of numpy as numbers and lists, times as
    ISO 8601, Decimal and UUID as text, bytes as the UTF-8 text that they are, NaN as null, sets as sorted lists. A row
    with any other value (an image, say) in a field that is read is refused, and so is an item that is no row; the
    reasons are in rejected.jsonl, and the run goes on.

    The same call again resumes, or has nothing to do. With rows behind those of before what is done stays and the new
    ones are sketched; other rows are refused.

    Returns the run directory, which `gvendi_fast.select`, `gvendi_fast.analysis.scoring.score_run` and every command
    take: its parts hold [n, K] float32 sketches (`RunDirectory.iterate`). Raises GvendiError for data that is neither
    paths nor rows, that holds no rows, or from which `out` was not made, and as `sketch_corpus` does.
    """
    settings = settings or Settings()
    if by is not None:
        settings = replace(settings, fields=replace(settings.fields, by=by))
    engine = engine or LocalEngine()
    if isinstance(proxy, str):
        proxy = load_proxy(proxy, dtype=engine.dtype(), device=engine.device)
    return sketch_corpus(data, out, proxy, settings, progress, engine=engine)
