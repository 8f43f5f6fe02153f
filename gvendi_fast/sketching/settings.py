"""How a corpus is sketched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.leases import Terms
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields
from gvendi_fast.data.stored_sketches import check_store
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.adapters import check_choice
from gvendi_fast.sketching.gradients.layers import check_groups, check_preset


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
    unit_rows, unit_bytes: rows of a work unit, and bytes of their text unless it is one row, at most; a run directory
        goes on with those that it was begun with (both None: about a minute of work by the proxy's rate on a few rows,
        512 rows where the corpus takes a few minutes; one alone: the other does not matter, up to 4096 rows).
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
    terms: when a work unit is taken from whoever has it, and when it is given up.
    retry_failed: try work units again that were given up.
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
    unit_rows: int | None = None
    unit_bytes: int | None = None
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
    terms: Terms = field(default_factory=Terms)
    retry_failed: bool = False
    store: str | None = None

    def __post_init__(self) -> None:
        check_store(self.store)
        check_preset(self.layers)
        check_choice(self.parameters)
        check_groups(self.groups)
        for name in (
            "batch_tokens",
            "unit_rows",
            "unit_bytes",
            "rows_together",
            "limit",
            "max_tokens",
            "max_row_bytes",
        ):
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
