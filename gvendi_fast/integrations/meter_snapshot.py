"""What a meter's figures are computed from: the last batch, the windows with and without it, sources, the average."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.meter_moments import Moment
from gvendi_fast.integrations.meter_stream import Averaged, Held
from gvendi_fast.vendi.gains import surprisals

# The series of sources beyond the largest.
OTHER = "other"


@dataclass(frozen=True)
class Counts:
    """Samples since the start: all, those with a zero gradient, and those with one that is not finite."""

    seen: int
    zero: int
    non_finite: int


def series_of(counts: Mapping[str, int], most: int) -> dict[str, str]:
    """The series of each source: its own for the `most` largest (by name where equal), `OTHER` for the rest."""
    own = set(sorted(counts, key=lambda name: (-counts[name], name))[:most])
    return {name: name if name in own else OTHER for name in counts}


def less(whole: Moment, part: Moment) -> Moment:
    """The rows of a whole that are not in a part, as a sum; for entropies, which rounding hardly moves."""
    return Moment.of_sum(whole.state.matrix - part.state.matrix, whole.n - part.n)


class Snapshot(ABC):
    """A meter's content at one moment. What is asked for is computed once; nothing here is changed."""

    def __init__(self, batch: torch.Tensor, norms: np.ndarray, counts: Counts) -> None:
        self.batch, self.norms, self.counts = Moment(batch), norms, counts

    @property
    @abstractmethod
    def window(self) -> Moment:
        """The window's rows."""

    @property
    @abstractmethod
    def before(self) -> Moment:
        """The window as it was before the last batch."""

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, Moment]:
        """{name: its rows in the window}, by name."""

    @property
    @abstractmethod
    def sources_seen(self) -> int:
        """How many sources the window has, those of `OTHER` among them."""

    @property
    @abstractmethod
    def average(self) -> Averaged:
        """The exponential average."""

    @abstractmethod
    def without(self, name: str) -> Moment:
        """The window without a source."""

    @cached_property
    def _surprise(self) -> torch.Tensor:
        """-ln Sigma of the window, float64 [K, K]."""
        state = self.window.state
        vectors = state.eigenbasis()[1]
        return (vectors * surprisals(state)) @ vectors.T

    def surprisal_of(self, name: str) -> float:
        """Mean surprisal of a source's rows against the window."""
        return self.sources[name].mean_form(self._surprise)

    @cached_property
    def average_moment(self) -> Moment | None:
        """The average as a second moment: every sample since the start has a part in it. None before the first one."""
        matrix = self.average.matrix
        return None if matrix is None else Moment.of_sum(matrix, self.counts.seen)

    @cached_property
    def novelty(self) -> tuple[float, float] | None:
        """Mean surprisal and gain of the batch against the window before it; None without one of the two."""
        rows = self.batch.rows
        if len(rows) == 0 or self.before.n == 0:
            return None
        state = self.before.state
        return float(state.contributions(rows.double()).mean()), float(state.gain(rows.double()).mean())


class RowSnapshot(Snapshot):
    """Of the rows that one meter holds, or several together."""

    def __init__(
        self,
        batch: torch.Tensor,
        norms: np.ndarray,
        counts: Counts,
        held: Held | Callable[[], Held],
        most_sources: int,
    ) -> None:
        """held: all that is held, or what gives it when a figure needs more than the batch."""
        super().__init__(batch, norms, counts)
        self._held, self._most = held, most_sources

    @classmethod
    def of(cls, held: Held, most_sources: int) -> RowSnapshot:
        """Of what is held."""
        counts = Counts(held.seen, held.zero, held.non_finite)
        return cls(held.batch, held.norms, counts, held, most_sources)

    @cached_property
    def held(self) -> Held:
        """The rows."""
        return self._held if isinstance(self._held, Held) else self._held()

    @cached_property
    def _older(self) -> Moment:
        """What the window has in common with the one before the last batch."""
        return Moment(self.held.older)

    @cached_property
    def window(self) -> Moment:
        """As in `Snapshot`."""
        return self._older.joined(self.held.in_window)

    @cached_property
    def before(self) -> Moment:
        """As in `Snapshot`."""
        return self._older.joined(self.held.left)

    @property
    def average(self) -> Averaged:
        """As in `Snapshot`."""
        return self.held.average

    @cached_property
    def counts_of_sources(self) -> dict[str, int]:
        """{name: rows in the window} of every source."""
        codes = self.held.window_codes
        numbers, counts = np.unique(codes[codes >= 0], return_counts=True)
        return {self.held.names[code]: int(n) for code, n in zip(numbers, counts, strict=True)}

    @property
    def sources_seen(self) -> int:
        """As in `Snapshot`."""
        return len(self.counts_of_sources)

    @cached_property
    def _places(self) -> dict[str, np.ndarray]:
        """{series: which rows of the window are its own}, by name."""
        return places(self.held, series_of(self.counts_of_sources, self._most))

    @cached_property
    def sources(self) -> dict[str, Moment]:
        """As in `Snapshot`."""
        return {name: Moment(self._picked(rows)) for name, rows in self._places.items()}

    def without(self, name: str) -> Moment:
        """As in `Snapshot`."""
        rest = np.setdiff1d(np.arange(self.window.n), self._places[name], assume_unique=True)
        few = len(rest) < self.window.dim
        return Moment(self._picked(rest)) if few else less(self.window, self.sources[name])

    def _picked(self, rows: np.ndarray) -> torch.Tensor:
        window = self.window.rows
        return window[torch.from_numpy(rows).to(window.device)]


def places(held: Held, series: Mapping[str, str]) -> dict[str, np.ndarray]:
    """{series: the numbers of its rows in the window}, by name. series: of each source."""
    codes = held.window_codes
    number = {name: i for i, name in enumerate(sorted(set(series.values())))}
    # Sources without rows in the window have no series; the last entry is what an unlabelled row's code, -1, picks.
    table = np.array([*(number.get(series.get(name, ""), -1) for name in held.names), -1])
    return {name: np.flatnonzero(table[codes] == i) for name, i in number.items()}


class SumSnapshot(Snapshot):
    """Of several ranks whose windows are known as sums of outer products, by source."""

    def __init__(
        self,
        batch: torch.Tensor,
        norms: np.ndarray,
        counts: Counts,
        window: Moment,
        before: Moment,
        sources: Mapping[str, Moment],
        sources_seen: int,
        average: Averaged,
    ) -> None:
        super().__init__(batch, norms, counts)
        self._window, self._before, self._sources = window, before, sources
        self._sources_seen, self._average = sources_seen, average

    @property
    def window(self) -> Moment:
        """As in `Snapshot`."""
        return self._window

    @property
    def before(self) -> Moment:
        """As in `Snapshot`."""
        return self._before

    @property
    def sources(self) -> Mapping[str, Moment]:
        """As in `Snapshot`."""
        return self._sources

    @property
    def sources_seen(self) -> int:
        """As in `Snapshot`."""
        return self._sources_seen

    @property
    def average(self) -> Averaged:
        """As in `Snapshot`."""
        return self._average

    def without(self, name: str) -> Moment:
        """As in `Snapshot`."""
        return less(self.window, self.sources[name])


def rows_of(snapshot: Snapshot) -> Held:
    """The rows of a snapshot; GvendiError where it has sums alone."""
    if isinstance(snapshot, RowSnapshot):
        return snapshot.held
    raise GvendiError(
        "this meter was made by sync from sums of outer products and holds no rows of the window: merge or synchronise "
        "the meters of the ranks themselves"
    )
