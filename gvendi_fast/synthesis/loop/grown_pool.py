"""The pool while it grows: rows, unit sketches, the state of G-Vendi, and the rounds that its sizes make.

A round begins with the first block, and again behind the block with which the pool has grown by the set share. Rows
are only ever added, so the pool at the start of a round is the first `size` rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.filters.decontaminate import Seen
from gvendi_fast.synthesis.tasks.task import Task, text_fields
from gvendi_fast.vendi.state import VendiState


@dataclass(frozen=True)
class Round:
    """number: from 0. block: the first that is decided in it. size: rows of the pool at its start."""

    number: int
    block: int
    size: int


class GrownPool:
    """ids, records (dicts) and sketches [N, K] of the seed pool; grows by `add`.

    growth: share by which the pool grows in a round. refresh: share by which it grows until `recent_state`, which gains
    are made with, follows: new eigenvectors cost as much as sketching dozens of rows.
    prefix: of the ids of new rows; no seed has it. Raises GvendiError where no row can be shown in a prompt.
    Memory: the sketches in float32, 4 K bytes a row, and the records.
    """

    def __init__(
        self,
        ids: Sequence[str],
        records: Sequence[Mapping[str, Any]],
        sketches: torch.Tensor,
        task: Task,
        growth: float,
        refresh: float = 0.0,
    ) -> None:
        self.ids, self.records, self.seeds = list(ids), list(records), len(ids)
        self.task, self.growth, self.refresh = task, growth, refresh
        self.prefix = _free_prefix(self.ids)
        self._matrix, self._used = sketches.float().contiguous(), len(sketches)
        self.state = VendiState(sketches.shape[1]).update(sketches)
        self.start_gvendi = self.state.gvendi()
        self.seen = Seen()
        self._shown: list[int] = []
        for number in range(self.seeds):
            self._take_up(number)
        if not self._shown:
            why = task.shot(self.records[0])
            raise GvendiError(
                f"no row of the pool can be shown in a prompt of the task '{task.name}' (first row: {why})"
            )
        self.rounds: list[Round] = []
        self.begin_round(0)

    def __len__(self) -> int:
        return self._used

    @property
    def round(self) -> Round:
        """The present one."""
        return self.rounds[-1]

    def round_of(self, block: int) -> Round:
        """The round in which this block is decided; of those that have begun."""
        return next(r for r in reversed(self.rounds) if r.block <= max(block, 0))

    def sketches(self, size: int | None = None) -> torch.Tensor:
        """Unit sketches of the first `size` rows (all): float32 [size, K], a view."""
        return self._matrix[: self._used if size is None else size]

    def showable(self, size: int) -> np.ndarray:
        """Numbers of the rows below `size` that prompts can show."""
        shown = np.asarray(self._shown, np.int64)
        return shown[: np.searchsorted(shown, size)]

    def add(self, id_: str, record: Mapping[str, Any], sketch: torch.Tensor) -> None:
        """Take up a row; the state follows with `settle`."""
        if self._used == len(self._matrix):
            grown = torch.empty(self._used + max(1024, self._used // 4), self._matrix.shape[1])
            grown[: self._used] = self._matrix
            self._matrix = grown
        self._matrix[self._used] = sketch
        self._used += 1
        self.ids.append(id_)
        self.records.append(record)
        self._take_up(self._used - 1)

    def settle(self, block: int) -> bool:
        """Count the rows of a block, which is over, to the state; whether the next block begins a round."""
        if self._used > self.state.n:
            # One update a block: sums are the same, bit for bit, when a run is resumed.
            self.state.update(self._matrix[self.state.n : self._used])
        grown = self._used > self.round.size and self._used >= self.round.size * (1 + self.growth)
        if grown:
            self.begin_round(block + 1)
        elif self._used > self.recent_state.n and self._used >= self.recent_state.n * (1 + self.refresh):
            self.recent_state = self._copy_of_state()
        return grown

    def digest(self) -> str:
        """BLAKE2b (8 bytes, hex) of the seeds' ids and records."""
        digest = hashlib.blake2b(digest_size=8)
        for id_, record in zip(self.ids[: self.seeds], self.records, strict=False):
            digest.update(json.dumps([id_, record], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def begin_round(self, block: int) -> None:
        """The pool as it is now is the start of a round."""
        self.rounds.append(Round(len(self.rounds), block, self._used))
        self.round_state = self.recent_state = self._copy_of_state()

    def _copy_of_state(self) -> VendiState:
        return VendiState(self.state.dim).merge(self.state)

    def _take_up(self, number: int) -> None:
        record = self.records[number]
        if not isinstance(self.task.shot(record), Reason):
            self._shown.append(number)
        texts = text_fields(record)
        if not isinstance(texts, Reason):
            self.seen.add(texts[0])


def _free_prefix(ids: Sequence[str]) -> str:
    """A pool may hold the rows of earlier runs."""
    number = 1
    while any(id_.startswith(f"synthetic{number}-") for id_ in ids):
        number += 1
    return f"synthetic{number}-"
