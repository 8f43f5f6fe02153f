"""One snapshot over the meters of several ranks, the same on each of them to the bit.

Of N window rows on R ranks, the longest n, and G series of sources, a rank receives
    rows      4 K n (R - 1) bytes, by one all-gather of rows, padded to the longest
    matrices  8 (G + 1) K (K + 1) / 2 * 2 (R - 1) / R bytes, by one all-reduce of packed upper triangles,
and what is less is taken; the last batch always goes as rows, and the average as a triangle in the same all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from gvendi_fast.integrations.meter_moments import Moment
from gvendi_fast.integrations.meter_snapshot import (
    Counts,
    RowSnapshot,
    Snapshot,
    SumSnapshot,
    places,
    series_of,
)
from gvendi_fast.integrations.meter_stream import UNLABELLED, Averaged, Held, together


class Ranks(Protocol):
    """What the exchange needs of a group of processes; every rank calls the same methods in the same order."""

    device: torch.device
    size: int

    def gathered(self, value: Any) -> list[Any]:
        """Everyone's small Python value, by rank."""

    def gathered_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's tensor of one shape, by rank."""

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of everyone's tensors, the same bits on every rank."""


class ProcessGroup:
    """A process group of torch.distributed; None is the default group."""

    def __init__(self, group: Any, device: torch.device | None) -> None:
        from torch import distributed

        self._distributed, self._group = distributed, group
        self.size = distributed.get_world_size(group)
        backend = str(distributed.get_backend(group))
        if "nccl" in backend and "gloo" not in backend:
            self.device = device if device is not None and device.type == "cuda" else torch.device("cuda")
        else:
            self.device = torch.device("cpu")

    def gathered(self, value: Any) -> list[Any]:
        """As in `Ranks`."""
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self._group)
        return values

    def gathered_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """As in `Ranks`."""
        rows = rows.to(self.device).contiguous()
        everyone = [torch.empty_like(rows) for _ in range(self.size)]
        self._distributed.all_gather(everyone, rows, group=self._group)
        return everyone

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """As in `Ranks`."""
        values = values.to(self.device).contiguous()
        self._distributed.all_reduce(values, group=self._group)
        return values


@dataclass(frozen=True)
class Exchange:
    """What a rank received in one `sync`, in bytes of tensors; labels and counts come on top.

    window: "rows" or "matrices", what was taken.
    rows, matrices: what the window would take as either.
    received: all of it, with the last batch and the average.
    """

    window: str
    rows: int
    matrices: int
    received: int


@dataclass(frozen=True)
class _Plan:
    """What every rank knows of all before rows travel: everyone's `Held` without rows, and what to send."""

    outlines: list[Held]
    lengths: list[tuple[int, int, int]]
    series: dict[str, str]
    has_unlabelled: bool
    has_average: bool
    exchange: Exchange
    reduces: bool


def exchanged(held: Held, ranks: Ranks, most_sources: int) -> tuple[Snapshot, Exchange]:
    """The snapshot over all ranks. Every rank of the group has to call it; dim is the same on all."""
    plan = _plan(held, ranks, most_sources)
    dim, device = held.older.shape[1], held.older.device
    window = [] if plan.reduces else [held.older, held.left]
    batches = _rows_of_all(torch.cat([*window, held.batch]), plan, ranks, device)
    triangle = torch.triu_indices(dim, dim, device=device)
    sums = [_average_of(held.average, dim, device)] if plan.has_average else []
    if plan.reduces:
        sums += [_sum_of(rows) for rows in _parts(held, plan)]
    matrices = []
    if sums:
        packed = ranks.summed(torch.cat([matrix[triangle[0], triangle[1]] for matrix in sums])).to(device)
        for part in packed.split(triangle.shape[1]):
            upper = torch.zeros(dim, dim, dtype=torch.float64, device=device)
            upper[triangle[0], triangle[1]] = part
            matrices.append(upper + upper.triu(1).T)
    averages = [outline.average for outline in plan.outlines]
    weight, squared = sum(a.weight for a in averages), sum(a.squared for a in averages)
    average = Averaged(matrices.pop(0) if plan.has_average else None, weight, squared)
    empty = held.older[:0]
    parts = []
    for outline, rows, (older, left, batch) in zip(plan.outlines, batches, plan.lengths, strict=True):
        split = rows.split([0, 0, batch] if plan.reduces else [older, left, batch])
        parts.append(replace(outline, older=split[0], left=split[1], batch=split[2]))
    if not plan.reduces:
        union = together([replace(part, average=Averaged(None, 0.0, 0.0)) for part in parts])
        return RowSnapshot.of(replace(union, average=average), most_sources), plan.exchange
    counts = Counts(*(sum(getattr(p, of) for p in parts) for of in ("seen", "zero", "non_finite")))
    n_before = sum(older + left for older, left, _ in plan.lengths)
    names = sorted(set(plan.series.values()))
    n_of = dict.fromkeys(names, 0)
    for part in parts:
        for name, rows in places(part, plan.series).items():
            n_of[name] += len(rows)
    sources = {
        name: Moment.of_sum(matrix, n_of[name]) for name, matrix in zip(names, matrices[1:], strict=False)
    }
    n = sum(len(part.window_codes) for part in parts)
    snapshot = SumSnapshot(
        batch=torch.cat([empty, *(part.batch for part in parts)]),
        norms=np.concatenate([part.norms for part in parts]),
        counts=counts,
        window=Moment.of_sum(torch.stack(matrices[1:]).sum(dim=0), n),
        before=Moment.of_sum(matrices[0], n_before),
        sources=sources,
        sources_seen=len(plan.series),
        average=average,
    )
    return snapshot, plan.exchange


def _plan(held: Held, ranks: Ranks, most_sources: int) -> _Plan:
    dim, none = held.older.shape[1], held.older[:0].cpu()
    outline = replace(held, older=none, left=none, batch=none, average=replace(held.average, matrix=None))
    everyone = ranks.gathered((outline, (len(held.older), len(held.left), len(held.batch))))
    outlines, lengths = [one for one, _ in everyone], [length for _, length in everyone]
    counts: dict[str, int] = {}
    has_unlabelled = False
    for one in outlines:
        codes = one.window_codes
        has_unlabelled |= bool((codes == UNLABELLED).any())
        for code, n in zip(*np.unique(codes[codes >= 0], return_counts=True), strict=True):
            counts[one.names[code]] = counts.get(one.names[code], 0) + int(n)
    series = series_of(counts, most_sources)
    batch = max(batch for _, _, batch in lengths)
    groups = len(set(series.values())) + has_unlabelled
    rows, matrices = window_bytes(dim, max(map(sum, lengths)) - batch, ranks.size, groups)
    has_average = any(one.average.weight > 0 for one in outlines)
    reduces = matrices < rows
    sums = has_average + reduces * (groups + 1)
    received = _by_all_gather(dim, batch, ranks.size) + _by_all_reduce(dim, sums, ranks.size)
    exchange = Exchange(
        "matrices" if reduces else "rows", rows, matrices, received + (0 if reduces else rows)
    )
    return _Plan(outlines, lengths, series, has_unlabelled, has_average, exchange, reduces)


def window_bytes(dim: int, longest: int, ranks: int, groups: int) -> tuple[int, int]:
    """What a rank receives of the windows as rows and as matrices: the longest one's rows, the series of sources."""
    return _by_all_gather(dim, longest, ranks), _by_all_reduce(dim, groups + 1, ranks)


def _by_all_gather(dim: int, rows: int, ranks: int) -> int:
    return 4 * dim * rows * (ranks - 1)


def _by_all_reduce(dim: int, matrices: int, ranks: int) -> int:
    return 2 * (ranks - 1) * 8 * (dim * (dim + 1) // 2) * matrices // ranks


def _parts(held: Held, plan: _Plan) -> Sequence[torch.Tensor]:
    """The rows of the window before the batch, and those of each series, the unlabelled ones last."""
    window = torch.cat([held.older, held.in_window])
    found = list(places(held, plan.series).values())
    if plan.has_unlabelled:
        found.append(np.flatnonzero(held.window_codes == UNLABELLED))
    return [
        torch.cat([held.older, held.left]),
        *(window[torch.from_numpy(rows).to(window.device)] for rows in found),
    ]


def _sum_of(rows: torch.Tensor) -> torch.Tensor:
    return Moment(rows).state.matrix


def _average_of(average: Averaged, dim: int, device: torch.device) -> torch.Tensor:
    if average.matrix is None:
        return torch.zeros(dim, dim, dtype=torch.float64, device=device)
    return average.matrix


def _rows_of_all(rows: torch.Tensor, plan: _Plan, ranks: Ranks, device: torch.device) -> list[torch.Tensor]:
    """Everyone's rows, each padded to the longest on the way."""
    sizes = [batch if plan.reduces else older + left + batch for older, left, batch in plan.lengths]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    everyone = ranks.gathered_rows(padded) if max(sizes) else [padded] * ranks.size
    return [one[:size].to(device) for one, size in zip(everyone, sizes, strict=True)]
