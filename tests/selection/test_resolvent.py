"""The growing resolvent against inverses made anew, and entropy gains against eigenvalues."""

import pytest
import torch

from gvendi_fast.kernels import reference
from gvendi_fast.selection.resolvent import Resolvent, entropy_gain, entropy_nodes, unit


def rows_of(n: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -0.5
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator) * scale, dim=1)


@pytest.mark.parametrize("given", [0, 5, 100])
def test_values_and_gains_after_every_number_of_picks(given):
    dim, picks = 24, rows_of(30, 24, 1)
    start = unit(rows_of(given, dim, 2))
    matrix = start.T @ start
    t, weight = entropy_nodes(matrix, len(picks))
    resolvent = Resolvent(matrix, t, period=4)
    # A pick itself, its opposite, and rows from elsewhere.
    rows = torch.cat([picks[:1], -picks[2:3], rows_of(10, dim, 3)])
    kept = resolvent.at_base(rows)
    stamps = torch.zeros(len(rows), dtype=torch.int64)
    assert resolvent.empty == (given == 0)
    for count, pick in enumerate(picks, 1):
        resolvent.add(pick)
        matrix = matrix + torch.outer(unit(pick), unit(pick))
        x = unit(rows)
        inverse = torch.linalg.inv(matrix + t[:, None, None] * torch.eye(dim))
        wanted = torch.cat([((x @ inverse) * x).sum(2).T, -((x @ matrix) * x).sum(1, keepdim=True)], dim=1)
        # The inverse itself loses as many digits as A + t has range.
        loose = (1e-16 / t).clamp_min(1e-13) * matrix.norm() / t
        assert ((resolvent.exact(rows) - wanted)[:, :-1].abs() <= loose).all()
        torch.testing.assert_close(resolvent.exact(rows)[:, -1], wanted[:, -1])
        exact = entropy_gain(resolvent.exact(rows), t, weight)
        oracle = [_entropic(matrix + torch.outer(row, row)) - _entropic(matrix) for row in x]
        assert exact.tolist() == pytest.approx(oracle, abs=2e-7)
        if count % 3 == 0:
            # Half of the rows follow the picks in float32, the others lag behind.
            late = torch.arange(len(rows)) % 2 == (count % 2)
            order = torch.argsort(stamps[late], stable=True)
            where = torch.nonzero(late)[:, 0][order]
            old = stamps[where] < resolvent.oldest
            kept[where[old]], stamps[where[old]] = resolvent.at_base(rows[where[old]]), resolvent.base
            where = where[torch.argsort(stamps[where], stable=True)]
            values = kept[where]
            resolvent.advance(rows[where], values, stamps[where])
            kept[where], stamps[where] = values, count
            fast = entropy_gain(values.float(), t.float(), weight.float())
            assert fast.tolist() == pytest.approx(exact[where].tolist(), abs=5e-6)
    resolvent.rebase()
    assert resolvent.base == resolvent.picks == 30
    assert entropy_gain(resolvent.at_base(rows), t, weight).tolist() == pytest.approx(
        exact.tolist(), abs=5e-6
    )


def _entropic(matrix: torch.Tensor) -> float:
    lam = torch.linalg.eigvalsh(matrix)
    lam = lam[lam > 1e-12]
    return reference.entropy(lam)
