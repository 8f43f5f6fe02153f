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
    """G-Vendi of order q of G groups: names [G], n int64 [G] rows and gvendi float64 [G], in one order.

    A score grows with n, so compare groups at equal n only.
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
    """G-Vendi of order q of each group of rows [N, K], of any float dtype, numpy or torch; rows count with length 1.

    labels: one hashable a row; equal ones make a group, groups are in order of their first rows. Or boundaries
    [G + 1], not decreasing: group g is rows boundaries[g] .. boundaries[g + 1] and is called g.
    Groups of up to 256 rows go to the kernel together (`ops.entropy`), larger ones through `gvendi` one by one.
    Raises GvendiError, by number, for a row that is zero or not finite, and for a group without rows.
    """
    check_matrix(rows)
    if (labels is None) == (boundaries is None):
        raise GvendiError("give labels or boundaries, one of them: what makes a group of the rows")
    if not q > 0:
        raise GvendiError(f"q must be an order above 0, or inf, got {q}; 1 is von Neumann's entropy")
    if labels is None:
        names, order, starts = _by_boundaries(boundaries, len(rows))
    else:
        names, order, starts = _by_labels(labels, len(rows))
    counts = np.diff(starts)
    found = np.empty(len(names))
    spans = [order[begin:end] for begin, end in itertools.pairwise(starts)]
    for g in np.flatnonzero(counts > MAX_GROUP):
        found[g] = gvendi(_taken(rows, spans[g]), q)
    small = np.flatnonzero(counts <= MAX_GROUP)
    strip = counts[small].cumsum() * 4 * rows.shape[1] // GATHER_BYTES
    for part in np.split(small, np.flatnonzero(np.diff(strip)) + 1) if len(small) else ():
        taken = _taken(rows, np.concatenate([spans[g] for g in part]))
        inner = torch.from_numpy(np.concatenate([[0], counts[part].cumsum()]))
        found[part] = ops.entropy(taken, inner, q).exp().cpu().numpy()
    return GroupVendi(names, counts, found, float(q))


def _by_labels(
    labels: Sequence[Hashable] | np.ndarray | torch.Tensor, rows: int
) -> tuple[list[Hashable], np.ndarray, np.ndarray]:
    """Names, the numbers of the rows group by group, and where each group starts there."""
    labels = labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else list(labels)
    if len(labels) != rows:
        raise GvendiError(f"labels has {len(labels)} entries for {rows} rows; give one a row")
    places: dict[Hashable, int] = {}
    codes = np.fromiter((places.setdefault(label, len(places)) for label in labels), np.int64, rows)
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(places)))])
    return list(places), np.argsort(codes, kind="stable"), starts.astype(np.int64)


def _by_boundaries(
    boundaries: Sequence[int] | np.ndarray | torch.Tensor, rows: int
) -> tuple[list[Hashable], np.ndarray, np.ndarray]:
    plain = boundaries.tolist() if isinstance(boundaries, torch.Tensor) else boundaries
    starts = np.array(plain, dtype=np.int64)
    if starts.ndim != 1 or len(starts) == 0 or starts[0] < 0 or starts[-1] > rows:
        raise GvendiError(f"boundaries must be numbers of rows [G + 1] within 0..{rows}, got {boundaries}")
    wrong = np.flatnonzero(np.diff(starts) < 1)
    if len(wrong):
        raise GvendiError(
            f"boundaries gives group {wrong[0]} {np.diff(starts)[wrong[0]]} rows; leave out empty groups"
        )
    return list(range(len(starts) - 1)), np.arange(rows), starts


def _taken(rows: Rows, numbers: np.ndarray) -> torch.Tensor:
    """These rows in a dtype that the kernels take; GvendiError by number for one without a direction."""
    if isinstance(rows, np.ndarray):
        part = rows[numbers]
        # The copy in float64 also serves what torch refuses, such as big-endian numbers.
        x = torch.from_numpy(part if part.dtype == np.float32 else part.astype(np.float64))
    else:
        x = rows.detach()[torch.from_numpy(numbers).to(rows.device)]
    if x.dtype in _DTYPES:
        check_norms(x, numbers)
        return x
    x = x.double()
    check_norms(x, numbers)
    return unit_rows(x, x.device).float()
