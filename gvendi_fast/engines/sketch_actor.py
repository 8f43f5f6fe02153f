"""Rows in, sketches out, in other people's pipelines: for `map_batches` of Ray Data and whatever hands out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Rejected, row_reader
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.corpus import Settings, longest, sketcher_for
from gvendi_fast.sketching.proxy.encode import Sample, batches
from gvendi_fast.sketching.proxy.load import DEFAULT_PROXY, load_proxy
from gvendi_fast.sketching.proxy.text_config import positions_of
from gvendi_fast.sketching.unit_worker import encoder_for


class SketchActor:
    """Sketches rows as they pass by; there is no run directory, and what is lost is whoever calls it to repeat.

    proxy: as `load_proxy` takes it, as device and dtype; it is loaded once, where the object is made.
    settings: how rows are sketched (default: `Settings()`): spec, fields, max_tokens, mask, layers, exclude,
        parameters, control_tokens and batch_tokens count.
    column: what `__call__` names the sketches.

    A row's sketch depends in its last bits on the rows beside it, as batches are made of the rows of one call.
    Raises GvendiError as `load_proxy`, and for settings that cannot be used.
    """

    def __init__(
        self,
        proxy: str = DEFAULT_PROXY,
        settings: Settings | None = None,
        column: str = "sketch",
        *,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        settings = settings or Settings()
        if settings.auto_dim:
            raise GvendiError(
                "auto_dim is set, and choosing K needs the whole corpus; give spec=SketchSpec(dim=...)"
            )
        loaded = load_proxy(proxy, device=device, dtype=dtype)
        self.column, self.dim = column, settings.spec.dim
        self._read = row_reader(settings.fields)
        limit = longest(loaded.name, positions_of(loaded.model.config), settings.max_tokens)
        self._encoder = encoder_for(loaded, settings, limit)
        self._sketcher = sketcher_for(loaded.model, settings)
        self._batch_tokens = choose_batch_tokens(self._sketcher, settings.batch_tokens)
        pad = loaded.tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad

    def sketch(self, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, list[str | None]]:
        """Sketches float32 [n, K] on the CPU, and for each row why it has none (it gets zeros), or None."""
        out = torch.zeros(len(rows), self.dim)
        reasons: list[str | None] = [None] * len(rows)
        parsed = [self._read(dict(row), place, "row", place + 1) for place, row in enumerate(rows)]
        encoded = self._encoder.encode([row for row in parsed if not isinstance(row, Rejected)])
        for found in (*parsed, *encoded):
            if isinstance(found, Rejected):
                reasons[found.line - 1] = found.reason
        for batch in batches(
            [sample for sample in encoded if isinstance(sample, Sample)], self._batch_tokens
        ):
            z = sketch_batch(self._sketcher, batch, self._pad).z
            out[[sample.row for sample in batch]] = z.float().cpu()
        return out, reasons

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The table with two columns more: the sketches, and, named `column`_rejected, why a row has none (null).

        Raises GvendiError for a batch of another kind, and for a table that has such a column.
        """
        if not isinstance(batch, pa.Table):
            raise GvendiError(
                f"the batch is a {type(batch).__name__}, and SketchActor takes tables of pyarrow; give map_batches "
                "batch_format='pyarrow'"
            )
        reason = f"{self.column}_rejected"
        if taken := [name for name in (self.column, reason) if name in batch.column_names]:
            raise GvendiError(
                f"the rows have a column {taken[0]!r} already; drop it first (drop_columns), or name the sketches "
                "otherwise, by the argument 'column'"
            )
        z, reasons = self.sketch(batch.to_pylist())
        sketches = pa.FixedSizeListArray.from_arrays(pa.array(z.numpy().reshape(-1)), self.dim)
        return batch.append_column(self.column, sketches).append_column(
            reason, pa.array(reasons, pa.string())
        )
