"""`DiversityMeter`: the diversity of what a model is learning from, batch by batch, as figures for a training log.

It takes sketches in and says G-Vendi of the last batch, of a window of the last samples and of an exponential average,
by source too. `update` computes no spectrum and waits for no device; `compute` computes what it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.caller import caller
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import OneThread, changes
from gvendi_fast.base.unit_length import has_direction
from gvendi_fast.integrations.meter_figures import (
    SourceFigures,
    check_figures,
    check_orders,
    source_figures,
    values,
)
from gvendi_fast.integrations.meter_input import (
    Label,
    Labels,
    Sources,
    check_alike,
    check_decay,
    sketch_rows,
)
from gvendi_fast.integrations.meter_ranks import Exchange, ProcessGroup, Ranks, exchanged
from gvendi_fast.integrations.meter_saved import check_saved, restored, saved
from gvendi_fast.integrations.meter_snapshot import OTHER, Counts, RowSnapshot, Snapshot, rows_of
from gvendi_fast.integrations.meter_stream import Held, Stream, together
from gvendi_fast.vendi.state import VendiState, plain_spec

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketches import Sketches

# Rows that wait until their lengths are looked at.
_WAITING = 1024


class DiversityMeter(OneThread):
    """Diversity of a stream of sketches: of the last batch, of a window and of an exponential average, by source.

    dim: K, the width of the sketches; None: that of the first ones.
    window: how many of the last samples count, at least 1. Memory: 4 K bytes each.
    decay: in (0, 1): a sample's weight in the average is decay to the number of samples after it, so the horizon does
        not depend on the batch size; the average is worth (1 + decay) / (1 - decay) samples. None: no average, which
        takes 8 K^2 bytes.
    orders: of G-Vendi; order 2 needs no spectrum.
    figures: which ones `compute` says: some of "batch", "novelty", "norms", "window", "average", "sources" and
        "source_gain"; None: all but the last, which takes a spectrum [K, K] for each source.
    max_sources: how many sources have figures of their own, the largest of the window; others count as "other".
    names: {label: name} of sources that `group` or the sketches' tags give by number; two labels of one name are one
        source.
    spec: a dict of JSON values that says how sketches are made, such as `dataclasses.asdict(sketcher.spec)` with
        the model's name; meters of different ones do not merge.
    device: where sketches are kept; None: where the first ones are.

    Rows are kept in float32 with length 1, second moments are float64. Samples whose sketch is zero or not finite are
    left out and counted. Any number of threads may not share a meter: each has its own, and `merge_state` joins them.
    The names that `compute` gives are in docs/training/meter.md. `exchange`, of a meter that `sync` returned, says what
    travelled.
    """

    def __init__(
        self,
        dim: int | None = None,
        window: int = 4096,
        decay: float | None = 0.999,
        *,
        orders: Sequence[float] = (1.0,),
        figures: Iterable[str] | None = None,
        max_sources: int = 64,
        names: Mapping[Label, str] | None = None,
        spec: dict | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if dim is not None:
            dim = whole(dim, "dim", "the width of the sketches, at least 1, or None", 1)
        self.window = whole(window, "window", "a number of samples, at least 1", 1)
        self.decay = check_decay(decay)
        self.orders = check_orders(orders, "orders")
        self.figures = check_figures(figures, "figures")
        self.max_sources = whole(max_sources, "max_sources", "a number of sources, at least 1", 1)
        self.names = names
        self.spec = plain_spec(spec)
        self._dim, self._device = dim, None if device is None else torch.device(device)
        self._said: set[str] = set()
        self._start()

    def _start(self) -> None:
        self.dim, self.device = self._dim, self._device
        self._stream: Stream | None = None
        # Sketches and sources of batches whose lengths nobody has looked at.
        self._pending: list[tuple[torch.Tensor, np.ndarray]] = []
        self._sources = Sources(self.names)
        self._seen = self._zero = self._non_finite = 0
        # What figures were computed from since the last update; for a union of meters, what it holds.
        self._snapshot: Snapshot | None = None
        self._is_union = False
        self.exchange: Exchange | None = None

    def __repr__(self) -> str:
        return f"DiversityMeter(dim={self.dim}, window={self.window}, decay={self.decay}, spec={self.spec})"

    @changes
    def update(
        self, sketches: Sketches | torch.Tensor | np.ndarray, group: Labels | None = None
    ) -> DiversityMeter:
        """Take the sketches of one batch in; returns self. They are copied, and nothing waits for a GPU.

        sketches: `Sketches`, or a float tensor or array [S, K]; S may be 0 and differ from batch to batch.
        group: the source of all samples, or of each one [S]: str or int, and 1 and "1" are one source. None: the tags
            that the sketches carry, if any.
        A wrong shape or number of labels raises GvendiError and changes nothing.
        """
        if self._is_union:
            raise GvendiError(
                "this meter holds what several meters were merged into, which takes no more sketches; update those, or "
                "call reset() first"
            )
        rows = sketch_rows(sketches, self.dim)
        if group is None:
            group = getattr(sketches, "tags", None)
        codes = self._sources.codes(group, len(rows))
        self.dim, self.device = rows.shape[1], self.device or rows.device
        self._pending.append((rows.clone(), codes))
        self._snapshot = None
        if sum(len(rows) for rows, _ in self._pending) >= _WAITING:
            self._settle()
        return self

    @changes
    def compute(
        self, figures: Iterable[str] | None = None, orders: Sequence[float] | None = None
    ) -> dict[str, float]:
        """The figures by name, ready for a log. What cannot be said yet is left out.

        figures, orders: in place of the meter's own. What was computed since the last update is not computed again.
        """
        wanted = self.figures if figures is None else check_figures(figures, "figures")
        asked = self.orders if orders is None else check_orders(orders, "orders")
        snapshot = self._now()
        if snapshot is None:
            return {"samples/seen": 0.0, "samples/zero": 0.0, "samples/non_finite": 0.0}
        if {"sources", "source_gain"} & {*wanted}:
            self._check_sources(snapshot)
        return values(snapshot, wanted, asked)

    def __call__(
        self, sketches: Sketches | torch.Tensor | np.ndarray, group: Labels | None = None
    ) -> dict[str, float]:
        """`update`, and the figures of this batch alone, which need no spectrum [K, K]."""
        return self.update(sketches, group).compute(("batch", "norms"))

    forward = __call__

    @changes
    def by_source(self) -> dict[str, SourceFigures]:
        """{name: figures} of the sources in the window, by name; each takes up to two spectra [K, K]."""
        snapshot = self._now()
        if snapshot is None:
            return {}
        self._check_sources(snapshot)
        return source_figures(snapshot)

    @changes
    def window_state(self) -> VendiState:
        """A `VendiState` of the window's rows, for gains of candidates; a copy."""
        snapshot = self._now()
        return self._state(None if snapshot is None else snapshot.window.state)

    @changes
    def source_states(self) -> dict[str, VendiState]:
        """{name: a `VendiState` of its rows in the window}, by name, as `mixture_weights` takes them; copies."""
        snapshot = self._now()
        if snapshot is None:
            return {}
        self._check_sources(snapshot)
        return {name: self._state(source.state) for name, source in snapshot.sources.items()}

    @changes
    def merge_state(self, metrics: DiversityMeter | Iterable[DiversityMeter]) -> DiversityMeter:
        """Make this meter one of its own samples and those of other meters; returns self.

        Its window is all of their windows, the window before the batch that of theirs before each one's last batch, and
        its average gives each sample the weight that it has in its own meter. After it, `update` is refused until
        `reset`. Other settings or another spec raise GvendiError and change nothing.
        """
        others = [metrics] if isinstance(metrics, DiversityMeter) else list(metrics)
        for other in others:
            if not isinstance(other, DiversityMeter) or other is self:
                what = "this meter itself" if other is self else f"a {type(other).__name__}"
                raise GvendiError(f"metrics holds {what}; wanted other meters: DiversityMeter")
        everyone = [self, *others]
        check_alike(
            [meter._settings() for meter in everyone], "meters", "merge meters of one kind (this one is 0)"
        )
        held = [rows_of(now) for meter in everyone if (now := meter._now()) is not None]
        dims = [meter.dim for meter in everyone if meter.dim is not None]
        specs = [meter.spec for meter in everyone if meter.spec is not None]
        self._start()
        if held:
            union = together(held)
            self._snapshot, self.device = RowSnapshot.of(union, self.max_sources), union.older.device
        self.dim, self.spec = next(iter(dims), None), next(iter(specs), None)
        self._is_union = True
        return self

    @changes
    def sync(self, group: Any = None) -> DiversityMeter:
        """A meter over those of all ranks, as `merge_state` makes one; this one is left as it is and goes on.

        group: a process group of torch.distributed, every rank of which has to call this; None: the default one, or
            this process alone where none is set up.
        Every rank gets the same figures to the bit, on equal machines. Its window travels as rows or as one all-reduce
        of second moments, whichever is fewer bytes: `exchange` of the meter returned says which.
        """
        from torch import distributed

        if group is None and not (distributed.is_available() and distributed.is_initialized()):
            now = self._now()
            return self._union(None if now is None else RowSnapshot.of(rows_of(now), self.max_sources))
        return self._joined(ProcessGroup(group, self.device))

    def _joined(self, ranks: Ranks) -> DiversityMeter:
        """As `sync`, over these ranks."""
        settings = ranks.gathered(self._settings() | {"max_sources": self.max_sources})
        check_alike(settings, "meters of the ranks", "make them alike on every rank")
        dims = [one["dim"] for one in settings if one["dim"] is not None]
        if not dims:
            return self._union(None)
        if (now := self._now()) is None:
            held = Stream(dims[0], 1, None, self.device or ranks.device).held([], 0, 0, 0)
        else:
            held = rows_of(now)
        snapshot, exchange = exchanged(held, ranks, self.max_sources)
        union = self._union(snapshot)
        union.dim, union.device, union.exchange = dims[0], held.older.device, exchange
        union.spec = next((one["spec"] for one in settings if one["spec"] is not None), None)
        return union

    @changes
    def reset(self) -> DiversityMeter:
        """Forget every sample; returns self."""
        self._start()
        return self

    @changes
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on to the bit: tensors on the CPU, lists, numbers and strings; copies."""
        if self._is_union:
            raise GvendiError("this meter was merged from several: save the state_dict of each of those")
        self._settle()
        return saved(self._stream, self._settings(), self._sources.names, self._counts())

    @changes
    def load_state_dict(self, state: Mapping[str, Any]) -> DiversityMeter:
        """Go on from a `state_dict` of a meter of the same dim, window, decay and spec; returns self.

        GvendiError for other settings, or for what no `state_dict` has written; it changes nothing.
        """
        check_saved(state)
        own = self._settings() | {"dim": self._dim}
        check_alike(
            [own, state["settings"]], "the meter and state", "make the meter with the settings of state (1)"
        )
        # Without a device it moves to that of the next sketches.
        stream, names, counts = restored(state, self.window, self.decay, self._device or torch.device("cpu"))
        self._start()
        self.dim, self.spec = state["settings"]["dim"] or self._dim, self.spec or state["settings"]["spec"]
        self._stream = stream
        self._sources.number(names)
        self._seen, self._zero, self._non_finite = counts.seen, counts.zero, counts.non_finite
        return self

    @changes
    def to(self, device: str | torch.device) -> DiversityMeter:
        """Keep sketches on this device from now on; returns self."""
        if self._is_union:
            raise GvendiError("this meter was merged from several: move those and merge them again")
        self._settle()
        self.device = self._device = torch.device(device)
        if self._stream is not None:
            self._stream.to(self.device)
        self._snapshot = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # What is computed from the stream can be computed again.
        return state if self._is_union else state | {"_snapshot": None}

    def _now(self) -> Snapshot | None:
        """All that is held now; None before the first sketches."""
        if self._is_union:
            return self._snapshot
        self._settle()
        stream = self._stream
        if self._snapshot is None and stream is not None:
            counts, names = self._counts(), self._sources.names

            def hold() -> Held:
                return stream.held(names, counts.seen, counts.zero, counts.non_finite)

            self._snapshot = RowSnapshot(stream.batch, stream.norms, counts, hold, self.max_sources)
        return self._snapshot

    def _settle(self) -> None:
        """Take in what waits: look at lengths, leave out what has no direction, scale the rest to length 1."""
        pending, self._pending = self._pending, []
        for rows, codes in pending:
            device = self.device or rows.device
            if self._stream is None:
                self._stream = Stream(rows.shape[1], self.window, self.decay, device)
            elif self._stream.device != device:
                self._stream.to(device)
            blocks = rows.to(device).split(_WAITING)
            lengths = [torch.linalg.vector_norm(block.double(), dim=1) for block in blocks]
            norms = torch.cat([*lengths, rows.new_empty(0, dtype=torch.float64)]).cpu().numpy()
            good = has_direction(norms)
            unit = [
                (block.double() / norm[:, None]).float() for block, norm in zip(blocks, lengths, strict=True)
            ]
            kept = torch.cat(unit)[torch.from_numpy(np.flatnonzero(good)).to(device)]
            self._stream.add(kept, codes[good], norms[good])
            zero = int((norms == 0).sum())
            self._seen, self._zero = self._seen + len(norms), self._zero + zero
            self._non_finite += len(norms) - zero - int(good.sum())
        stream = self._stream
        # Labels without end are not to fill the memory.
        if stream is not None and len(self._sources) > 2 * self.window + _WAITING:
            table = self._sources.forget({*stream.codes.tolist(), *stream.batch_codes.tolist()})
            stream.codes, stream.batch_codes = table[stream.codes], table[stream.batch_codes]
        if self._zero + self._non_finite:
            self._warn(
                "left out",
                f"{self._zero} samples with a zero gradient and {self._non_finite} with one that is not finite are "
                "left out of the meter's figures; samples/zero and samples/non_finite go on counting them",
            )

    def _counts(self) -> Counts:
        return Counts(self._seen, self._zero, self._non_finite)

    def _check_sources(self, snapshot: Snapshot) -> None:
        if snapshot.sources_seen > self.max_sources:
            self._warn(
                "sources",
                f"the window has {snapshot.sources_seen} sources: the {self.max_sources} largest have figures of their "
                f"own and the rest counts as {OTHER!r}; give max_sources= or coarser labels",
            )

    def _warn(self, what: str, text: str) -> None:
        """Once for a meter."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn_explicit(text, UserWarning, *caller())

    def _settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "window": self.window, "decay": self.decay, "spec": self.spec}

    def _state(self, state: VendiState | None) -> VendiState:
        """A copy with the meter's spec."""
        if state is None:
            if self.dim is None:
                raise GvendiError(
                    "the meter has seen no sketches and has no dim; call update first, or give dim="
                )
            return VendiState(self.dim, self.spec, self.device or "cpu")
        own = VendiState(state.dim, None, state.matrix.device).merge(state)
        own.spec = self.spec
        return own

    def _union(self, snapshot: Snapshot | None) -> DiversityMeter:
        """A meter of these settings that holds a snapshot and takes no sketches."""
        union = DiversityMeter(
            self._dim, self.window, self.decay, orders=self.orders, figures=self.figures,
            max_sources=self.max_sources, names=self.names, spec=self.spec, device=self._device,
        )  # fmt: skip
        union.dim, union.device, union._said = self.dim, self.device, set(self._said)
        union._snapshot, union._is_union = snapshot, True
        return union
