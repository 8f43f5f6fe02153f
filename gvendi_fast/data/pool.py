"""A pool of sketches, read in blocks or by row number, from memory or a run directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_rows
from gvendi_fast.data.run_directory import RunDirectory

POOL_BLOCK = 4096
NUMBERS = ("row", "tokens", "length", "loss", "gradient_norm")


class Pool:
    """The sketches of N rows, scaled to length 1: [N, K] with ids; `len(pool)` is N. Made by `as_pool`.

    dim: K.
    ids: one string a row, unique.
    groups: one string a row, or None.
    spec: how the sketches were made, or None.
    Any number of threads may read a pool at once.
    """

    dim: int
    ids: Sequence[str]
    groups: Sequence[str] | None
    spec: dict | None

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, float32 [n, K] of length 1) over the whole pool in order; each call begins anew."""
        raise NotImplementedError

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The sketches of the rows with these numbers, in this order: float32 [m, K] of length 1."""
        raise NotImplementedError

    def numbers(self, name: str) -> np.ndarray:
        """One number a row [N]: "row" (ordinal in the corpus), "tokens", "length", "loss" or "gradient_norm"."""
        raise GvendiError(f"the pool is a matrix and has no {name!r}; give a run directory, which stores it")


class MatrixPool(Pool):
    """Sketches in memory."""

    def __init__(
        self, rows: Rows, ids: Sequence[str] | None = None, groups: Sequence[str] | None = None
    ) -> None:
        check_matrix(rows)
        self.dim, self.spec = rows.shape[1], None
        self.ids = [str(i) for i in range(len(rows))] if ids is None else list(ids)
        self.groups = None if groups is None else list(groups)
        for name, given in (("ids", self.ids), ("groups", self.groups)):
            if given is not None and len(given) != len(rows):
                raise GvendiError(
                    f"{name} has {len(given)} entries for {len(rows)} rows; give one for each row"
                )
        if len(set(self.ids)) != len(self.ids):
            raise GvendiError("ids holds an id twice; give every row an id of its own")
        self._rows = rows

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, len(self), POOL_BLOCK):
            yield first, unit_rows(self._rows[first : first + POOL_BLOCK], first=first).float()

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        wanted = np.asarray(numbers, np.int64)
        out = torch.empty(len(wanted), self.dim)
        # In blocks, because float64 takes twice the memory.
        for first in range(0, len(wanted), POOL_BLOCK):
            here = wanted[first : first + POOL_BLOCK]
            out[first : first + len(here)] = unit_rows(self._rows[here]).float()
        return out


class _Parts(Pool):
    """The sketches of a run directory, read from its parts on each call, one part in memory at a time."""

    run: RunDirectory

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        first = 0
        for part in self.run.iterate(["sketch"]):
            if len(part.sketches):
                yield first, unit_rows(part.sketches, first=first).float()
            first += len(part.sketches)


class BlockPool(_Parts):
    """The n sketches of a run directory in blocks alone: rows have no ids, and nothing of them is held in memory."""

    def __init__(self, run: RunDirectory, n: int) -> None:
        self.run, self.spec, self.dim = run, run.sketch_spec, run.dim
        self.ids, self.groups, self._rows = (), None, n

    def __len__(self) -> int:
        return self._rows


class RunPool(_Parts):
    """The sketches of a run directory with what it stores of each row."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.spec, self.dim = run, run.sketch_spec, run.dim
        self.ids, self.groups, self._starts, self._numbers = [], [], [0], {name: [] for name in NUMBERS}
        self._units = []
        for part in run.iterate(["id", "group", *NUMBERS]):
            self.ids += part.ids
            self.groups += part.groups
            self._units.append(part.unit)
            self._starts.append(len(self.ids))
            for name, column in zip(
                NUMBERS,
                (part.rows, part.tokens, part.length, part.loss, part.gradient_norm),
                strict=True,
            ):
                self._numbers[name].append(column)
        if not self.ids:
            raise GvendiError(f"'{run.path}' holds no sketches; run 'gvendi sketch' to the end first")

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        wanted = np.asarray(numbers, np.int64)
        out = torch.empty(len(wanted), self.dim)
        part_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for index in np.unique(part_of):
            here = np.flatnonzero(part_of == index)
            (part,) = self.run.iterate(["sketch"], units=[self._units[index]])
            out[torch.from_numpy(here)] = unit_rows(part.sketches[wanted[here] - self._starts[index]]).float()
        return out

    def numbers(self, name: str) -> np.ndarray:
        if name not in NUMBERS:
            raise GvendiError(
                f"{name!r} is not a number that a run directory stores; choose one of {', '.join(NUMBERS)}"
            )
        return self._joined[name]

    @cached_property
    def _joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(columns) for name, columns in self._numbers.items()}


PoolLike = Pool | RunDirectory | str | os.PathLike | Rows


def as_pool(source: PoolLike) -> Pool:
    """A pool from a matrix [N, K], a run directory or its path; a pool comes back as it is."""
    if isinstance(source, Pool):
        return source
    if isinstance(source, str | os.PathLike):
        source = RunDirectory.load(source)
    return RunPool(source) if isinstance(source, RunDirectory) else MatrixPool(source)
