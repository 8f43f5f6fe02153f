"""What a meter holds of a stream of samples: the window's rows, the last batch, and the exponential average.

    window   the last W unit rows, float32; every figure of it is computed from these rows, so nothing drifts
    average  M = sum_i d^(samples after i) z_i z_i^T, float64; weights d^age, effective number (sum w)^2 / sum w^2
Rows enter the average 256 at a time, so it is the same to the bit however the stream was cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

AT_ONCE = 256
UNLABELLED = -1


@dataclass(frozen=True)
class Averaged:
    """The exponential average as sums that add up over ranks.

    matrix: float64 [K, K], or None before the first sample.
    weight, squared: sums of the weights and of their squares.
    """

    matrix: torch.Tensor | None
    weight: float
    squared: float

    @property
    def effective(self) -> float:
        """How many equally weighted samples an average of these weights is worth."""
        return self.weight**2 / self.squared if self.squared else 0.0


class Average:
    """An exponential average of outer products, by a decay per sample."""

    def __init__(self, decay: float, dim: int, device: torch.device) -> None:
        self.decay = decay
        self.matrix = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.weight = self.squared = 0.0
        self.tail = torch.empty(0, dim, dtype=torch.float32, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Take rows in, the oldest first."""
        rows = torch.cat([self.tail, rows])
        whole = len(rows) - len(rows) % AT_ONCE
        for i in range(0, whole, AT_ONCE):
            self.weight, self.squared = self._into(self.matrix, rows[i : i + AT_ONCE])
        self.tail = rows[whole:].clone()

    def value(self) -> Averaged:
        """With the rows that wait for a full block."""
        if self.weight == 0 and len(self.tail) == 0:
            return Averaged(None, 0.0, 0.0)
        matrix = self.matrix.clone()
        return Averaged(matrix, *self._into(matrix, self.tail))

    def _into(self, matrix: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
        """Add rows to a matrix, in place; returns the weights' sums after it."""
        n = len(rows)
        powers = [self.decay**age for age in range(n - 1, -1, -1)]
        weights = torch.tensor(powers, dtype=torch.float64, device=rows.device)
        x = rows.double()
        matrix.mul_(self.decay**n).addmm_((x * weights[:, None]).T, x)
        weight = self.weight * self.decay**n + sum(powers)
        return weight, self.squared * self.decay ** (2 * n) + sum(power**2 for power in powers)


@dataclass
class Held:
    """What one meter holds, or several together. n window rows from before the last batch, m that it drove out.

    older: float32 [n, K], unit rows, the oldest first.
    older_codes: int64 [n], numbers of their sources in `names`, or `UNLABELLED`.
    left: float32 [m, K].
    batch: float32 [S, K], the last batch.
    batch_codes: int64 [S].
    norms: float64 [S], lengths of the batch's sketches.
    stayed: bool [S], which rows of the batch are in the window.
    names: of the sources.
    average: see `Averaged`.
    seen, zero, non_finite: samples since the start, and those that were left out.
    """

    older: torch.Tensor
    older_codes: np.ndarray
    left: torch.Tensor
    batch: torch.Tensor
    batch_codes: np.ndarray
    norms: np.ndarray
    stayed: np.ndarray
    names: list[str]
    average: Averaged
    seen: int
    zero: int
    non_finite: int

    def to(self, device: torch.device) -> Held:
        """On a device."""
        matrix = self.average.matrix
        return replace(
            self,
            older=self.older.to(device),
            left=self.left.to(device),
            batch=self.batch.to(device),
            average=replace(self.average, matrix=None if matrix is None else matrix.to(device)),
        )

    @property
    def in_window(self) -> torch.Tensor:
        """The batch's rows that are in the window."""
        if self.stayed.all():
            return self.batch
        return self.batch[torch.from_numpy(np.flatnonzero(self.stayed)).to(self.batch.device)]

    @property
    def window_codes(self) -> np.ndarray:
        """Of all rows of the window."""
        return np.concatenate([self.older_codes, self.batch_codes[self.stayed]])


def together(parts: list[Held]) -> Held:
    """What several meters hold, as one, in their order; on the device of the first."""
    device = parts[0].older.device
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    number = {name: code for code, name in enumerate(names)}

    def recoded(part: Held, codes: np.ndarray) -> np.ndarray:
        # The last entry is what UNLABELLED, -1, picks.
        return np.array([*(number[name] for name in part.names), UNLABELLED], np.int64)[codes]

    def rows(of: str) -> torch.Tensor:
        return torch.cat([getattr(part, of).to(device) for part in parts])

    return Held(
        older=rows("older"),
        older_codes=np.concatenate([recoded(part, part.older_codes) for part in parts]),
        left=rows("left"),
        batch=rows("batch"),
        batch_codes=np.concatenate([recoded(part, part.batch_codes) for part in parts]),
        norms=np.concatenate([part.norms for part in parts]),
        stayed=np.concatenate([part.stayed for part in parts]),
        names=names,
        average=sum_of([part.average for part in parts], device),
        seen=sum(part.seen for part in parts),
        zero=sum(part.zero for part in parts),
        non_finite=sum(part.non_finite for part in parts),
    )


def sum_of(averages: list[Averaged], device: torch.device) -> Averaged:
    """Averages of several streams as one: each sample keeps the weight that it has in its own."""
    matrices = [average.matrix.to(device) for average in averages if average.matrix is not None]
    matrix = torch.stack(matrices).sum(dim=0) if matrices else None
    return Averaged(matrix, sum(a.weight for a in averages), sum(a.squared for a in averages))


class Stream:
    """One rank's samples: rows go in, `held` says what is kept of them."""

    def __init__(self, dim: int, window: int, decay: float | None, device: torch.device) -> None:
        self.window, self.device = window, device
        self.average = None if decay is None else Average(decay, dim, device)
        self.ring = torch.empty(window, dim, dtype=torch.float32, device=device)
        self.codes = np.full(window, UNLABELLED, np.int64)
        # Of the oldest row in the ring, and how many there are.
        self.first = self.n = 0
        self.left = torch.empty(0, dim, dtype=torch.float32, device=device)
        self.batch = torch.empty(0, dim, dtype=torch.float32, device=device)
        self.batch_codes, self.norms = np.empty(0, np.int64), np.empty(0)

    def add(self, rows: torch.Tensor, codes: np.ndarray, norms: np.ndarray) -> None:
        """Take a batch in: unit rows float32 [S, K], their sources' codes [S] and the lengths they had [S]."""
        if self.average is not None:
            self.average.add(rows)
        stay = min(len(rows), self.window)
        gone = max(0, self.n + stay - self.window)
        self.left = self.aged(0, gone)
        at = (self.first + self.n + np.arange(stay)) % self.window
        self.ring[torch.from_numpy(at).to(self.device)] = rows[len(rows) - stay :]
        self.codes[at] = codes[len(rows) - stay :]
        self.first, self.n = (self.first + gone) % self.window, self.n + stay - gone
        self.batch, self.batch_codes, self.norms = rows, codes, norms

    def aged(self, begin: int, end: int) -> torch.Tensor:
        """A copy of rows of the window by age, the oldest is 0."""
        return self.ring[torch.from_numpy(self.places(begin, end)).to(self.device)]

    def places(self, begin: int, end: int) -> np.ndarray:
        """Where in the ring these rows are."""
        return (self.first + np.arange(begin, end)) % self.window

    def held(self, names: list[str], seen: int, zero: int, non_finite: int) -> Held:
        """All that is kept now; the window's rows are copied."""
        stay = min(len(self.batch), self.window)
        older = self.n - stay
        return Held(
            older=self.aged(0, older),
            older_codes=self.codes[self.places(0, older)],
            left=self.left,
            batch=self.batch,
            batch_codes=self.batch_codes,
            norms=self.norms,
            stayed=np.arange(len(self.batch)) >= len(self.batch) - stay,
            names=list(names),
            average=Averaged(None, 0.0, 0.0) if self.average is None else self.average.value(),
            seen=seen,
            zero=zero,
            non_finite=non_finite,
        )

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.device = device
        self.ring, self.left, self.batch = (x.to(device) for x in (self.ring, self.left, self.batch))
        if self.average is not None:
            self.average.matrix = self.average.matrix.to(device)
            self.average.tail = self.average.tail.to(device)
