"""What one pass of k-means collects: exact sums, and the rows with the lowest cosines to their centroids.

A sum of unit rows is held in integers of UNIT: |z| 2^36 rounds once a row, by at most 2^-37, and integers add without
error in any order.
"""

from __future__ import annotations

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters.seeds import SAME_DIRECTION, row_keys
from gvendi_fast.kernels import ops

# Unit of the integer sums; 2^26 coordinates of size 1 stay below 2^63.
UNIT, MAX_ROWS = 2.0**-36, 1 << 26
ADD_ROWS = 256
# Empty clusters that one pass can re-seed.
RESEEDS = 64


class Tally:
    """Exact sums of unit rows int64 [C, K], their numbers int64 [C] and the sum of their cosines int64 [], in UNIT."""

    def __init__(self, centroids: torch.Tensor) -> None:
        self.sums = torch.zeros_like(centroids, dtype=torch.int64)
        self.counts = torch.zeros_like(centroids[:, 0], dtype=torch.int64)
        self.cosines = self.counts.new_zeros(())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums, "counts": self.counts, "cosines": self.cosines}

    def add(self, rows: torch.Tensor, label: torch.Tensor, cosine: torch.Tensor) -> None:
        # A few rows at a time, so that their integers stay in the cache.
        for part, into in zip(rows.split(ADD_ROWS), label.split(ADD_ROWS), strict=True):
            self.sums.index_add_(0, into, whole(part))
        self.counts += torch.bincount(label, minlength=len(self.counts))
        self.cosines += whole(cosine).sum()
        self._check_room()

    def merge(self, other: Tally) -> None:
        for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine += theirs
        self._check_room()

    def mean_cosine(self) -> float:
        total = int(self.counts.sum())
        return int(self.cosines) * UNIT / total if total else float("nan")

    def directions(self, before: torch.Tensor) -> torch.Tensor:
        """Sums scaled to length 1, float32 [C, K]; where a sum has no direction, the previous centroid."""
        sums = self.sums.double() * UNIT
        norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        # Where rows cancel, rounding of this size is left.
        return torch.where(norm > SAME_DIRECTION, sums / norm, before.double()).float()

    def _check_room(self) -> None:
        if int(self.counts.sum()) > MAX_ROWS:
            raise GvendiError(
                f"the pool has more than {MAX_ROWS:,} rows, the most that exact sums can hold; cluster a subset of them"
            )


class Worst:
    """The distinct rows with the lowest cosines, worst first; equal cosines in the order of the keys."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.cosine, self.keys = np.empty(0, np.float32), np.empty(0, np.uint64)

    @property
    def number(self) -> int:
        return len(self.keys)

    def offer(self, rows: torch.Tensor, cosine: np.ndarray, keys: np.ndarray) -> None:
        # A row that lies on its centroid is no better anywhere else.
        far = np.flatnonzero(cosine < 1 - SAME_DIRECTION)
        far = far[_lowest(cosine[far], keys[far])]
        merged = rows[far] if self.rows is None else torch.cat([self.rows, rows[far]])
        cosine, keys = np.append(self.cosine, cosine[far]), np.append(self.keys, keys[far])
        order = _lowest(cosine, keys)
        self.rows, self.cosine, self.keys = merged[order], cosine[order], keys[order]

    def merge(self, other: Worst) -> None:
        if other.rows is not None:
            self.offer(other.rows, other.cosine, other.keys)


def _lowest(cosine: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Positions of the RESEEDS lowest cosines of distinct rows, lowest first."""
    order = np.lexsort((keys, cosine))
    return order[np.sort(np.unique(keys[order], return_index=True)[1])][:RESEEDS]


def whole(x: torch.Tensor) -> torch.Tensor:
    """float32 numbers from -1 to 1 as integers in UNIT, so that their sums are exact."""
    # A power of two scales float32 exactly.
    return (x / UNIT).round_().to(torch.int64)


class Keys:
    """The keys of a chunk's rows, uint64; see seeds.py. `Sums` of a pass, as are the others below."""

    def __init__(self, seed: int) -> None:
        self._seed, self._found = seed, [np.empty(0, np.uint64)]

    def add(self, first: int, rows: torch.Tensor) -> None:
        self._found.append(row_keys(rows, self._seed))

    def result(self) -> np.ndarray:
        return np.concatenate(self._found)


class Counted:
    """A chunk's rows counted to centroids: its `Tally` and `Worst`; the rows' keys go along."""

    def __init__(self, centroids: torch.Tensor) -> None:
        self._centroids, self._tally, self._worst = centroids, Tally(centroids), Worst()

    def add(self, first: int, rows: torch.Tensor, keys: np.ndarray) -> None:
        here = rows.to(self._centroids.device)
        label, cosine, _, _ = ops.assign(here, self._centroids)
        self._tally.add(here, label, cosine)
        self._worst.offer(rows, cosine.cpu().numpy(), keys)

    def result(self) -> tuple[Tally, Worst]:
        return self._tally, self._worst


class Nearest:
    """The nearest centroid of a chunk's rows and the runner-up, as `ops.assign` returns them."""

    def __init__(self, centroids: torch.Tensor) -> None:
        self._centroids = centroids
        self._found: list[list[np.ndarray]] = []

    def add(self, first: int, rows: torch.Tensor) -> None:
        nearest = ops.assign(rows.to(self._centroids.device), self._centroids)
        self._found.append([column.cpu().numpy() for column in nearest])

    def result(self) -> list[np.ndarray]:
        return [np.concatenate(columns) for columns in zip(*self._found, strict=True)]
