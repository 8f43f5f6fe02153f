"""What each row adds to the entropy of its own small group, for thousands of groups in one call.

Group of m unit rows, Gram matrix G = V diag(l) V^T [m, m]; H, H_{-i} in nats, with all of them and without row i:
    gain_i    = H - H_{-i}
    novelty_i = (H - (1 - 1/m) H_{-i}) / h(1/m),   h(p) = -p ln p - (1 - p) ln(1 - p)
Sigma is the mixture (1/m) z_i z_i^T + (1 - 1/m) Sigma_{-i}, and the entropy of a mixture lies between the mean of its
parts' and that plus h: so novelty is in [0, 1], 0 where the row is what all the others are and 1 where it is orthogonal
to each of them. In a group it is gain times a positive number plus another: they order the rows alike.

Without row i the Gram matrix loses a row and a column. Its entropy needs no eigenvalues of its own: in the basis V row
i has the energies l_k V_ik^2, from which `spectrum.change_of_sum` has the sum of l ln l that is left, as for a state.
One eigendecomposition a group and J = 21 + ln m numbers a pair of rows stand for m of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, has_direction
from gvendi_fast.kernels.spectrum import change_of_sum, nodes
from gvendi_fast.vendi.groups import by_boundaries, by_labels

# What groups that are computed together may take beside the rows: unit rows, Gram matrices and pairs times nodes.
AT_ONCE_BYTES = 64 << 20
# Nodes of the quadrature for groups of up to e^9 rows.
_MOST_NODES = 32


@dataclass(frozen=True, eq=False)
class GroupGains:
    """Entropies of G groups and what each of N rows adds to that of its own.

    A row without a direction (zero, or not finite) takes no part in its group.
    names: [G], in the order of their first rows.
    group: int64 [N], the place of a row's group in names; -1 where it is in none.
    n: int64 [G], rows that took part.
    entropy: float64 [G], H in nats; 0 of one row and of none.
    gain: float64 [N], H - H_{-i} in nats, below 0 where the others differ more without the row; 0 in a group of one
        row, NaN where the row took no part.
    novelty: float64 [N], in [0, 1] (see the module); 0 in a group of one row, NaN where the row took no part.
    """

    names: list[Hashable]
    group: np.ndarray
    n: np.ndarray
    entropy: np.ndarray
    gain: np.ndarray
    novelty: np.ndarray

    @property
    def gvendi(self) -> np.ndarray:
        """exp(H), float64 [G]: how many equally used directions a group has. Compare groups of equal n only."""
        return np.exp(self.entropy)

    @property
    def left_out(self) -> int:
        """Rows of groups that have no direction."""
        return int(np.count_nonzero(self.group >= 0) - self.n.sum())


def group_gains(
    rows: Rows,
    labels: Sequence[Hashable] | np.ndarray | torch.Tensor | None = None,
    *,
    boundaries: Sequence[int] | np.ndarray | torch.Tensor | None = None,
) -> GroupGains:
    """What each row adds to the entropy of its group: thousands of groups of a few rows each, in one call.

    rows: [N, K], numpy or torch, any float dtype, on any device; each is scaled to length 1.
    labels: one hashable a row; rows of equal labels make a group.
    boundaries: in place of labels, [G + 1], not decreasing: group g is rows boundaries[g] .. boundaries[g + 1] and its
        name is g.
    Everything is float64. Products of rows are of their device, eigenvalues of the CPU, to which m^2 numbers of a group
    go. m^2 K + 10 m^3 operations a group, and memory in which 64 MB of groups lie at a time: meant for groups of up to
    some hundred rows (`leave_one_out` has a large one's). Error of a gain: below 6e-7 / (m - 1).
    Raises GvendiError for rows that are no matrix of floats, both or neither of labels and boundaries, and a group
    without rows.
    """
    check_matrix(rows)
    if (labels is None) == (boundaries is None):
        raise GvendiError("give labels or boundaries, exactly one of them: they say which rows make a group")
    count = len(rows)
    names, order, starts = by_boundaries(boundaries, count) if labels is None else by_labels(labels, count)
    group = np.full(count, -1, np.int64)
    for g, (begin, end) in enumerate(itertools.pairwise(starts)):
        group[order[begin:end]] = g
    takes_part = (group >= 0) & _have_direction(rows)
    # Group by group still, as both functions give them.
    order = order[takes_part[order]]
    n = np.bincount(group[order], minlength=len(names))
    found = GroupGains(
        names,
        group,
        n,
        np.zeros(len(names)),
        np.full(count, math.nan),
        np.full(count, math.nan),
    )
    ends = n.cumsum()
    for size, together in _of_equal_size(n, rows.shape[1]):
        numbers = np.stack([order[ends[g] - size : ends[g]] for g in together])
        found.entropy[together], gain, novelty = (x.numpy() for x in _gains(_unit(rows, numbers)))
        found.gain[numbers], found.novelty[numbers] = gain, novelty
    return found


def _of_equal_size(n: np.ndarray, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """(m, groups of m rows that fit in memory together), for every m above 0."""
    for size in np.unique(n[n > 0]).tolist():
        groups = np.flatnonzero(n == size)
        bytes_each = 8 * size * (2 * dim + size * (4 + 4 * _MOST_NODES))
        step = max(1, AT_ONCE_BYTES // bytes_each)
        for first in range(0, len(groups), step):
            yield size, groups[first : first + step]


def _gains(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H [C], gain [C, m] and novelty [C, m] of groups of unit rows float64 [C, m, K]; on the CPU."""
    count, m, _ = unit.shape
    eigenvalues, vectors = torch.linalg.eigh((unit @ unit.mT).cpu())
    eigenvalues.clamp_min_(0)
    whole = math.log(m) - torch.special.xlogy(eigenvalues, eigenvalues).sum(dim=1) / m
    # Of one direction the rounding may fall below.
    whole.clamp_min_(0)
    if m == 1:
        zero = whole.new_zeros(count, 1)
        return whole, zero, zero
    # The nodes of any m unit rows, so that a group's result does not depend on those beside it.
    t, weight = nodes(eigenvalues.new_tensor([0, m]), -1)
    energy = vectors.square() * eigenvalues[:, None, :]
    energy /= energy.sum(dim=2, keepdim=True)
    # x^T (A + t)^-1 x <= 1 / (1 + t) for a row of A, and x^T A x >= 1: only rounding exceeds either.
    g = torch.minimum(energy @ (1 / (eigenvalues[:, :, None] + t)), 1 / (1 + t))
    mu = (energy @ eigenvalues[:, :, None]).clamp_min(1)
    change = change_of_sum(mu, g, t, weight, -1)
    left = torch.special.xlogy(eigenvalues, eigenvalues).sum(dim=1, keepdim=True) + change
    without = (math.log(m - 1) - left / (m - 1)).clamp(0, math.log(m - 1))
    most = math.log(m) / m - (1 - 1 / m) * math.log1p(-1 / m)
    novelty = ((whole[:, None] - (1 - 1 / m) * without) / most).clamp(0, 1)
    return whole, whole[:, None] - without, novelty


def _have_direction(rows: Rows) -> np.ndarray:
    """Which of rows [N, K] are neither zero nor infinite nor NaN: bool [N]."""
    if isinstance(rows, np.ndarray):
        norms = np.concatenate(
            [
                np.linalg.norm(rows[first : first + 4096].astype(np.float64), axis=1)
                for first in range(0, len(rows), 4096)
            ]
            or [np.empty(0)]
        )
    else:
        norms = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).cpu().numpy()
    return has_direction(norms)


def _unit(rows: Rows, numbers: np.ndarray) -> torch.Tensor:
    """Rows of these numbers [C, m], scaled to length 1: float64 [C, m, K] on their device."""
    if isinstance(rows, np.ndarray):
        taken = torch.from_numpy(rows[numbers].astype(np.float64))
    else:
        taken = rows.detach()[torch.from_numpy(numbers).to(rows.device)].double()
    return taken / torch.linalg.vector_norm(taken, dim=2, keepdim=True)
