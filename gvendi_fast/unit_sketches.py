"""Work units while their batches come in: results put into input order, unusable gradients refused, parts written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gvendi_fast.rows import Rejected
from gvendi_fast.store import Part, RunDirectory
from gvendi_fast.text import Sample
from gvendi_fast.transfer import Fetched
from gvendi_fast.units import Unit


class UnitSketches:
    """The sketches of a unit's samples, in input order whatever the order of its batches.

    refused: rows of the unit that no sample was made of. dim: K.
    """

    def __init__(self, unit: Unit, samples: Sequence[Sample], refused: Sequence[Rejected], dim: int) -> None:
        self.unit, self.samples, self.refused = unit, samples, refused
        self.missing = len(samples)
        self._place = {sample.row: i for i, sample in enumerate(samples)}
        self._sketches = np.zeros((len(samples), dim), np.float32)
        self._loss = np.zeros(len(samples), np.float32)
        self._tokens = np.zeros(len(samples), np.int32)

    def take(self, samples: Sequence[Sample], z: np.ndarray, loss: np.ndarray, tokens: np.ndarray) -> None:
        """Store the results of some of the unit's samples: z [B, K], loss [B], tokens [B]."""
        where = [self._place[sample.row] for sample in samples]
        self._sketches[where], self._loss[where], self._tokens[where] = z, loss, tokens
        self.missing -= len(samples)

    def write(self, run: RunDirectory) -> int:
        """Write the part; returns how many samples had no usable gradient."""
        norm = np.linalg.norm(self._sketches.astype(np.float64), axis=1)
        usable = np.isfinite(norm) & (norm > 0)
        bad = [
            Rejected(s.file, s.line, "zero gradient" if norm[i] == 0 else "non-finite gradient", s.id)
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
        )
        run.write_part(part, [*self.refused, *bad])
        return len(bad)


class UnitsTogether:
    """Units whose samples share batches: each result goes to its own unit, each unit is handed out when it is whole."""

    def __init__(self, units: Sequence[UnitSketches]) -> None:
        self._open = list(units)
        self._owner = {id(sample): unit for unit in units for sample in unit.samples}
        self.samples = [sample for unit in units for sample in unit.samples]

    def take(self, batch: Sequence[Sample], fetched: Fetched) -> None:
        """Store a batch's (z [B, K], loss [B], tokens [B]), waiting for them where they are under way."""
        z, loss, tokens = (x.numpy() for x in fetched.wait())
        shares: dict[int, list[int]] = {}
        for place, sample in enumerate(batch):
            shares.setdefault(id(self._owner[id(sample)]), []).append(place)
        for places in shares.values():
            unit = self._owner[id(batch[places[0]])]
            unit.take([batch[i] for i in places], z[places], loss[places], tokens[places])

    def finished(self) -> list[UnitSketches]:
        """The units that miss no result any more and were not handed out yet, in input order."""
        done = [unit for unit in self._open if unit.missing == 0]
        self._open = [unit for unit in self._open if unit.missing]
        return done
