"""G-Vendi of many groups of rows at once: the clusters, sources or prompts of one matrix of sketches."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_rows
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.checks import MAX_GROUP, check_norms
from gvendi_fast.vendi.of_rows import gvendi

# Rows of small groups that are copied together at once.
GATHER_BYTES = 64 << 20
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class GroupVendi:
    """G-Vendi of G groups, all in one order. A score grows with n, so compare groups of equal n only.

    names: [G].
    n: int64 [G], rows of each group.
    gvendi: float64 [G].
    q: the order.
    """

    names: list[Hashable]
    n: np.ndarray
    gvendi: np.ndarray
    q: float

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[Hashable, float]:
        """{name: G-Vendi}."""
        return dict(zip(self.names, self.gvendi.tolist(), strict=True))


def group_gvendi(
    rows: Rows,
    labels: Sequence[Hashable] | np.ndarray | torch.Tensor | None = None,
    *,
    boundaries: Sequence[int] | np.ndarray | torch.Tensor | None = None,
    q: float = 1.0,
) -> GroupVendi:
    """G-Vendi of each group of a matrix of sketches, each scaled to length 1.

    rows: [N, K], numpy or torch, any float dtype.
    labels: one hashable a row; rows of equal labels make a group, and groups are in the order of their first rows.
    boundaries: in place of labels, [G + 1], not decreasing: group g is rows boundaries[g] .. boundaries[g + 1] and its
        name is g.
    q: the order.
    Groups of up to 256 rows go to the kernel together (`ops.entropy`), larger ones through `gvendi` one by one.
    Raises GvendiError that gives the number of a row that is zero or not finite, or of a group without rows.
    """
    check_matrix(rows)
    if (labels is None) == (boundaries is None):
        raise GvendiError("give labels or boundaries, exactly one of them: they say which rows make a group")
    if not q > 0:
        raise GvendiError(f"q must be an order above 0, or inf, got {q}; 1 is von Neumann's entropy")
    if labels is None:
        names, order, starts = by_boundaries(boundaries, len(rows))
    else:
        names, order, starts = by_labels(labels, len(rows))
    counts = np.diff(starts)
    values = np.empty(len(names))
    spans = [order[begin:end] for begin, end in itertools.pairwise(starts)]
    for g in np.flatnonzero(counts > MAX_GROUP):
        values[g] = gvendi(_taken(rows, spans[g]), q)
    small = np.flatnonzero(counts <= MAX_GROUP)
    strip = counts[small].cumsum() * 4 * rows.shape[1] // GATHER_BYTES
    for part in np.split(small, np.flatnonzero(np.diff(strip)) + 1) if len(small) else ():
        taken = _taken(rows, np.concatenate([spans[g] for g in part]))
        inner = torch.from_numpy(np.concatenate([[0], counts[part].cumsum()]))
        values[part] = ops.entropy(taken, inner, q).exp().cpu().numpy()
    return GroupVendi(names, counts, values, float(q))


def by_labels(
    labels: Sequence[Hashable] | np.ndarray | torch.Tensor, rows: int
) -> tuple[list[Hashable], np.ndarray, np.ndarray]:
    """Names, the numbers of the rows group by group, and where each group starts there."""
    labels = labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else list(labels)
    if len(labels) != rows:
        raise GvendiError(f"labels has {len(labels)} entries for {rows} rows; give one for each row")
    places: dict[Hashable, int] = {}
    codes = np.fromiter((places.setdefault(label, len(places)) for label in labels), np.int64, rows)
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(places)))])
    return list(places), np.argsort(codes, kind="stable"), starts.astype(np.int64)


def by_boundaries(
    boundaries: Sequence[int] | np.ndarray | torch.Tensor, rows: int
) -> tuple[list[Hashable], np.ndarray, np.ndarray]:
    plain = boundaries.tolist() if isinstance(boundaries, torch.Tensor) else boundaries
    starts = np.array(plain, dtype=np.int64)
    if starts.ndim != 1 or len(starts) == 0 or starts[0] < 0 or starts[-1] > rows:
        raise GvendiError(f"boundaries must be row numbers [G + 1] within 0..{rows}, got {boundaries}")
    wrong = np.flatnonzero(np.diff(starts) < 1)
    if len(wrong):
        raise GvendiError(
            f"boundaries gives group {wrong[0]} {np.diff(starts)[wrong[0]]} rows; leave out empty groups"
        )
    return list(range(len(starts) - 1)), np.arange(rows), starts


def _taken(rows: Rows, numbers: np.ndarray) -> torch.Tensor:
    """These rows in a dtype that the kernels take; GvendiError with the number of one without a direction."""
    if isinstance(rows, np.ndarray):
        part = rows[numbers]
        # The copy in float64 also makes readable what torch refuses, such as big-endian numbers.
        x = torch.from_numpy(part if part.dtype == np.float32 else part.astype(np.float64))
    else:
        x = rows.detach()[torch.from_numpy(numbers).to(rows.device)]
    if x.dtype in _DTYPES:
        check_norms(x, numbers)
        return x
    x = x.double()
    check_norms(x, numbers)
    return unit_rows(x, x.device).float()
