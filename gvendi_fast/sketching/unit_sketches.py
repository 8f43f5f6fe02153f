"""The results of work units while they are computed: the samples of several share batches, each becomes a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvendi_fast.base.transfer import Fetched
from gvendi_fast.base.unit_length import has_direction, refused_gradient
from gvendi_fast.data.manifest import Unit
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.sketching.proxy.encode import Sample


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
        # Those whose results are here.
        self.taken: list[Sample] = []
        self._place = {sample.row: i for i, sample in enumerate(samples)}
        dim, count = columns.dim, len(columns.groups)
        self._sketches = np.zeros((len(samples), dim), np.float32)
        self._norms = np.zeros((len(samples), count), np.float32)
        self._by_group = np.zeros((len(samples), count if columns.keeps_groups else 0, dim), np.float32)
        self._loss = np.zeros(len(samples), np.float32)
        self._tokens = np.zeros(len(samples), np.int32)

    @property
    def missing(self) -> int:
        """How many samples have no results yet."""
        return len(self.samples) - len(self.taken)

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
        self.taken += samples

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
        """Store a batch's results, as the worker fetches them, after waiting for them if they are still computed."""
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

    def unfinished(self) -> list[UnitSketches]:
        """The work units that were not handed out; none of their results is kept."""
        left, self._open = self._open, []
        return left
