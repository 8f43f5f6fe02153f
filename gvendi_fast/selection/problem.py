"""The problem that a selection solves: pool, size, rows that are chosen already, quotas, and the order of ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gvendi_fast.base.draws import random_words
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress
from gvendi_fast.base.unit_length import cosine_blocks
from gvendi_fast.data.pool import POOL_BLOCK, Pool
from gvendi_fast.data.strings import codes_of
from gvendi_fast.vendi.state import VendiState

# Of `relaxed`, whose gap mostly is closed by then.
MAX_PASSES = 12


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose `size` of the rows `numbers` of a pool.

    pool: N rows.
    objective: its name.
    numbers: int64 [n], the candidates, ascending.
    size: how many rows to choose.
    rank: int64 [N], place of every row of the pool in the order of ids.
    labels: int64 [N], each row's label; None without quotas.
    limits: int64 [G]: at most limits[g] rows with label g; None without quotas.
    quality: float64 [N] or None.
    given: the rows that count as chosen already.
    targets: float32 [R, K], the rows that facility location represents.
    covered: float32 [R], how well the given rows represent them.
    eps: of logdet.
    seed: of all draws.
    memory: bytes that the selection may use.
    progress: where it reports.
    engine: which processes read the pool where it is a run directory; None is this one.
    max_passes: of relaxed.
    """

    pool: Pool
    objective: str
    numbers: np.ndarray
    size: int
    rank: np.ndarray
    labels: np.ndarray | None
    limits: np.ndarray | None
    quality: np.ndarray | None
    given: VendiState
    targets: torch.Tensor | None
    covered: torch.Tensor | None
    eps: float
    seed: int
    memory: int
    progress: Progress
    engine: Engine | None = None
    max_passes: int = MAX_PASSES

    def begun(self) -> VendiState:
        """A new state of the given rows, to which others can be added."""
        return VendiState(self.pool.dim, self.given.spec).merge(self.given)

    def part(self, numbers: np.ndarray) -> Problem:
        """The same problem with fewer candidates; `size` is lowered to what they allow."""
        return replace(self, numbers=numbers, size=min(self.size, most(self.labels, self.limits, numbers)))

    def words(self, stream: int) -> np.ndarray:
        """Random uint64 [N], one a row, that depend on the seed, the stream and the rank of the row's id alone."""
        return random_words(self.seed, stream, len(self.rank))[self.rank]

    def random(self, stream: int) -> np.ndarray:
        """`size` random rows of the pool that keep the quotas, ascending."""
        order = self.numbers[np.argsort(self.words(stream)[self.numbers], kind="stable")]
        if self.labels is not None:
            order = order[_places(self.labels[order]) < self.limits[self.labels[order]]]
        return np.sort(order[: self.size])


def raise_covered(covered: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise covered [R] to the cosines that the targets [R, K] have with the nearest of rows [m, K], where larger."""
    for _, cosine in cosine_blocks(targets, rows, POOL_BLOCK // 8):
        torch.maximum(covered, cosine.amax(1), out=covered)


def most(labels: np.ndarray | None, limits: np.ndarray | None, numbers: np.ndarray) -> int:
    """How many of the rows `numbers` can be chosen under the quotas."""
    if labels is None:
        return len(numbers)
    return int(np.minimum(np.bincount(labels[numbers], minlength=len(limits)), limits).sum())


def equal_quotas(groups: Iterable[str], size: int) -> dict[str, int]:
    """Equal quotas for all labels, with which exactly `size` rows can be chosen: {label: number}.

    A label with fewer rows gives all that it has, and the others share the rest. A remainder goes, one row each, to
    the labels with the most rows (of equal ones, to the first by name).
    """
    labels, names = codes_of(groups if isinstance(groups, Sequence) else list(groups))
    counts = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    total = sum(counts.values())
    if not 1 <= size <= total:
        raise GvendiError(f"size is {size}; wanted 1 to {total}, the number of rows in the pool")
    quotas, left = {}, size
    smallest = sorted(counts, key=lambda label: (counts[label], label))
    for i, label in enumerate(smallest):
        quotas[label] = min(counts[label], left // (len(smallest) - i))
        left -= quotas[label]
        if quotas[label] < counts[label]:
            # All labels from here on have enough rows.
            rest = sorted(smallest[i:], key=lambda name: (-counts[name], name))
            share, extra = divmod(left + quotas[label], len(rest))
            return quotas | {name: share + (place < extra) for place, name in enumerate(rest)}
    return quotas


def coded_quotas(
    pool: Pool, groups: Sequence[str] | None, quotas: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """labels [N] and limits [G] of Problem; a label without a quota has no limit. GvendiError if they do not fit."""
    groups = pool.groups if groups is None else groups
    if groups is None:
        raise GvendiError("quotas need groups, one label a row, and the pool has none; give groups=")
    if len(groups) != len(pool):
        raise GvendiError(f"groups has {len(groups)} labels for {len(pool)} rows; give one for each row")
    labels, names = codes_of(groups)
    code = {label: i for i, label in enumerate(names)}
    unknown = [label for label in quotas if label not in code]
    if unknown:
        raise GvendiError(
            f"quotas names {unknown[0]!r}, which no row has; the labels are, for example, "
            f"{', '.join(map(repr, list(code)[:5]))}"
        )
    wrong = [label for label, top in quotas.items() if not isinstance(top, int | np.integer) or top < 0]
    if wrong:
        raise GvendiError(
            f"quotas gives {wrong[0]!r} {quotas[wrong[0]]!r}; wanted a number of rows, 0 or more"
        )
    limits = np.array([quotas.get(label, len(pool)) for label in code], np.int64)
    return labels, limits


def checked_quality(quality: Sequence[float] | np.ndarray, pool: Pool) -> np.ndarray:
    """quality as float64 [N]; GvendiError unless every row has a finite number above 0."""
    values = np.asarray(quality, np.float64)
    if values.shape != (len(pool),):
        raise GvendiError(f"quality has shape {values.shape}; wanted ({len(pool)},), one number a row")
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise GvendiError(
            f"quality of row '{pool.ids[bad[0]]}' is {values[bad[0]]}; wanted a finite number above 0: "
            "a score that can be 0 or negative cannot be a factor of a product, so shift it first"
        )
    return values


def _places(labels: np.ndarray) -> np.ndarray:
    """How many earlier entries have the same label [n] -> [n]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    out = np.empty(len(labels), np.int64)
    out[order] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    return out
