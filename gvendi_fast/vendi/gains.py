"""What rows add to the entropy of a state: gains of rows that join, losses of rows that leave, and rows' shares.

S(A) = tr(A ln A), n unit rows in A, m rows join (m > 0) or leave (m < 0):
    H = ln n - S / n,   Delta H = ln(1 + m / n) - (Delta S - m S / n) / (n + m)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_blocks, unit_rows
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.spectrum import quadrature
from gvendi_fast.vendi.second_moment import SecondMoment

# Rounding of float64 in the eigenvalues of a trace-one matrix; a direction without rows counts with this one.
SMALLEST = 2.0**-52


def gain(state: SecondMoment, candidates: Rows, remove: bool = False) -> torch.Tensor:
    """As `VendiState.gain`."""
    if state.n == 0 and not remove:
        return torch.zeros(
            sum(len(unit) for _, unit in unit_blocks(candidates, state.dim)), dtype=torch.float64
        )
    if remove:
        check_removable(state)
        changes = [change for change, _, _ in removals(state, candidates)]
    else:
        changes = [
            ops.gain(unit, *state.eigenbasis(), 1)[0]
            for _, unit in unit_blocks(candidates, state.dim, state.matrix.device)
        ]
    change = torch.cat([*changes, state.matrix.new_empty(0)])
    return entropy_change(state, change, -1 if remove else 1).cpu()


def check_removable(state: SecondMoment) -> None:
    if state.n < 2:
        raise GvendiError(f"the state has n = {state.n}; wanted at least 2 rows, as one of them leaves")


def removals(
    state: SecondMoment, rows: Rows | Iterable[Rows], first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Delta S and mu = x^T A x of each of rows [N, K] where it alone leaves the state, and the unit rows, by blocks.

    first: number of the first row. Raises GvendiError for a row that cannot be in the state.
    """
    for begin, unit in unit_blocks(rows, state.dim, state.matrix.device, first):
        change, mu, excess = ops.gain(unit, *state.eigenbasis(), -1)
        if len(unit) and float(excess.max()) > 0.5:
            row = begin + int(excess.argmax())
            raise GvendiError(
                f"row {row} of rows is not in the state; give only rows that the state was made from"
            )
        yield change, mu, unit


def entropy_change(state: SecondMoment, change: torch.Tensor, m: int | torch.Tensor) -> torch.Tensor:
    """Delta H of Delta S where m rows join (leave, if m < 0)."""
    part = torch.as_tensor(m / state.n, dtype=torch.float64, device=change.device)
    return torch.log1p(part) - (change - part * trace_log(state)) / (state.n + m)


def trace_log(state: SecondMoment) -> torch.Tensor:
    """S(A)."""
    eigenvalues = state.eigenbasis()[0]
    return torch.special.xlogy(eigenvalues, eigenvalues).sum()


def block_gain(state: SecondMoment, rows: Rows, boundaries: torch.Tensor) -> torch.Tensor:
    """As `VendiState.block_gain`."""
    check_matrix(rows, state.dim)
    if boundaries.dtype != torch.int64 or boundaries.dim() != 1 or len(boundaries) == 0:
        raise GvendiError(
            f"boundaries is {boundaries.dtype} {list(boundaries.shape)}; wanted int64 [G + 1] for G blocks"
        )
    spans = boundaries.tolist()
    if spans != sorted(spans) or spans[0] < 0 or spans[-1] > len(rows):
        raise GvendiError(
            f"boundaries runs from {spans[0]} to {spans[-1]}; wanted row numbers in 0..{len(rows)} that do not decrease"
        )
    changes = []
    for begin, end in itertools.pairwise(spans):
        unit = unit_rows(rows[begin:end], state.matrix.device, begin)
        if state.n == 0:
            smaller = unit @ unit.T if len(unit) < state.dim else unit.T @ unit
            p = torch.linalg.eigvalsh(smaller / max(1, len(unit))).clamp_min_(0)
            changes.append(-torch.special.xlogy(p, p).sum())
        else:
            changes.append(entropy_change(state, _block_change(state, unit), len(unit)))
    return torch.stack(changes).cpu() if changes else torch.empty(0, dtype=torch.float64)


def _block_change(state: SecondMoment, unit: torch.Tensor) -> torch.Tensor:
    """S(A + X^T X) - S(A), X = unit float64 [m, K].

    With C = X Q and G(t) = C (Lambda + t)^-1 C^T the sum over the rows, each against A and the rows before it, of
    what `marginal_change` integrates: the logarithms of 1 + g add up to ln det(I + G), and mu_i is x_i^T A x_i
    + sum_{j < i} (x_i x_j)^2. Its error is at most m times that of one row.
    """
    eigenvalues, vectors = state.eigenbasis()
    at = quadrature(eigenvalues, 1, joining=max(1, len(unit)))
    # For so many rows determinants cost more than eigenvalues.
    if len(at.t) * len(unit) ** 2 > state.dim**2:
        joined = torch.linalg.eigvalsh(state.matrix + unit.T @ unit).clamp_min_(0)
        return torch.special.xlogy(joined, joined).sum() - trace_log(state)
    c = unit @ vectors
    overlap = (unit @ unit.T).square()
    mu = c.square() @ eigenvalues + overlap.tril(-1).sum(dim=1)
    g = (c / (eigenvalues + at.t[:, None, None])) @ c.T
    g.diagonal(dim1=1, dim2=2).add_(1)
    integral = torch.log1p(1 / (mu + at.t[:, None])).sum(dim=1) - torch.linalg.slogdet(g)[1]
    closed = torch.special.xlogy(mu + 1, mu + 1) - torch.special.xlogy(mu, mu)
    return closed.sum() + integral @ at.weight


def contributions(state: SecondMoment, rows: Rows, kind: str = "surprisal") -> torch.Tensor:
    """As `VendiState.contributions`."""
    if kind == "loo":
        return -gain(state, rows, remove=True)
    if kind != "surprisal":
        raise GvendiError(f'kind is {kind!r}; wanted "surprisal" or "loo"')
    vectors, surprisal = state.eigenbasis()[1], surprisals(state)
    blocks = unit_blocks(rows, state.dim, state.matrix.device)
    shares = [(unit.double() @ vectors).square_() @ surprisal for _, unit in blocks]
    return torch.cat([*shares, surprisal.new_empty(0)]).cpu()


def surprisals(state: SecondMoment) -> torch.Tensor:
    """-ln of the eigenvalues of Sigma, each of 2^-52 at least: float64 [K] in the order of `eigenbasis`."""
    eigenvalues = state.eigenbasis()[0]
    return -(eigenvalues / eigenvalues.sum()).clamp(SMALLEST, 1).log()
