"""The diagnosis of one direction: by hand, against brute force, and its sentences where true and where false."""

import json
import math

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.vendi import VendiState, gvendi
from gvendi_fast.vendi.centered import RowMean, centered
from gvendi_fast.vendi.diagnosis import DOMINANT, Diagnosis, diagnose


def diagnosed(rows: torch.Tensor) -> Diagnosis:
    dim = rows.shape[1]
    return diagnose(VendiState(dim).update(rows), RowMean(dim).update(rows))


def around(share: float, n: int, dim: int, signs: bool = False) -> torch.Tensor:
    """n orthogonal directions, each row with this share of its squared length along one more."""
    rows = math.sqrt(1 - share) * torch.eye(dim, dtype=torch.float64)[1 : n + 1]
    rows[:, 0] = math.sqrt(share)
    if signs:
        rows[::2, 0] *= -1
    return rows


def test_rows_around_one_direction_by_hand():
    """z_i = sqrt(s) u + sqrt(1 - s) e_i: every number in closed form."""
    s, n = 0.36, 20
    found = diagnosed(around(s, n, 32))
    # Sigma has s + (1 - s) / n along the mean, and (1 - s) / n in n - 1 directions.
    first, other = s + (1 - s) / n, (1 - s) / n
    assert found.first_share == pytest.approx(first, rel=1e-5)
    assert found.along_mean == pytest.approx(first, rel=1e-9)
    assert found.mean_squared == pytest.approx(first, rel=1e-9)
    assert found.second_share == pytest.approx(other, rel=1e-5)
    assert found.mean_cosine == pytest.approx(s, rel=1e-9)
    assert found.without_first == pytest.approx(n - 1, rel=1e-5)
    assert found.without_mean == pytest.approx(n - 1, rel=1e-5)
    assert found.gvendi == pytest.approx(
        math.exp(-first * math.log(first) - (n - 1) * other * math.log(other))
    )
    assert found.n == n


@pytest.mark.parametrize(("n", "dim"), [(2, 8), (30, 64), (400, 16)])
@pytest.mark.parametrize("shared", [0.0, 0.3, 4.0])
def test_it_follows_the_definitions(n, dim, shared):
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64) + shared
    z = reference.normalise(rows)
    spectrum, m = torch.linalg.eigvalsh(z.T @ z / n).flip(0), z.mean(0)
    cosines = z @ z.T
    found = diagnosed(rows)
    assert found.gvendi == pytest.approx(gvendi(rows), rel=1e-5)
    assert found.first_share == pytest.approx(float(spectrum[0]), rel=1e-5)
    assert found.second_share == pytest.approx(float(spectrum[1]), rel=1e-5)
    assert found.mean_squared == pytest.approx(float(cosines.mean()), rel=1e-6)
    assert found.mean_cosine == pytest.approx(float((cosines.sum() - n) / (n * (n - 1))), rel=1e-6, abs=1e-9)
    assert found.along_mean == pytest.approx(float((z @ (m / m.norm())).square().mean()), rel=1e-5)
    assert found.mean_squared <= found.along_mean * (1 + 1e-6) <= found.first_share * (1 + 2e-6)
    rest = spectrum[1:].clamp_min(0)
    assert found.without_first == pytest.approx(math.exp(reference.entropy(rest / rest.sum())), rel=1e-4)
    left = torch.linalg.eigvalsh((z - m) @ (z - m).T).clamp_min(0)
    assert found.without_mean == pytest.approx(math.exp(reference.entropy(left / left.sum())), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "mean_cosine", "along_mean", "without_first"),
    [
        (torch.ones(1, 8), None, 1.0, None),
        (torch.ones(5, 8), 1.0, 1.0, None),
        (torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), -1.0, 0.0, None),
        (torch.eye(8), 0.0, 1 / 8, 7.0),
        (torch.ones(3, 1), 1.0, 1.0, None),
    ],
    ids=["one row", "rows all equal", "antipodal", "orthogonal", "width 1"],
)
def test_edges_have_numbers_or_none_and_never_nan(rows, mean_cosine, along_mean, without_first):
    found = diagnosed(rows)
    assert found.mean_cosine == (None if mean_cosine is None else pytest.approx(mean_cosine, abs=1e-6))
    assert found.along_mean == pytest.approx(along_mean, abs=1e-6)
    assert found.without_first == (None if without_first is None else pytest.approx(without_first, rel=1e-5))
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_a_shared_direction_is_said_where_it_is_there():
    said = diagnosed(around(0.36, 20, 32)).sentence
    assert said.startswith(
        "39 % of the squared gradients lies along the mean of the rows, and two rows have a cosine "
    )
    assert "cosine of 0.36 on average" in said
    assert said.endswith("rows less their own mean are without it")
    # It does: what is left are 19 equally used directions.
    rows = around(0.36, 20, 32)
    assert centered(rows, RowMean(32).update(rows)).value == pytest.approx(19, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.95 * DOMINANT, 1.05 * DOMINANT])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_limit_does_not_depend_on_the_number_of_rows(share, n):
    """The mean of few rows has |m|^2 >= 1 / n even where they are orthogonal; that alone says nothing."""
    said = diagnosed(around(share, n, 64)).sentence
    assert (said is not None) == (share > DOMINANT)


def test_a_direction_with_both_signs_or_of_a_group_is_no_mean():
    both = diagnosed(around(0.36, 20, 32, signs=True))
    assert both.sentence.startswith(
        "39 % of the squared gradients lies along one direction that is not the mean"
    )
    rows = around(0.36, 20, 32, signs=True)
    kept = centered(rows, RowMean(32).update(rows))
    # The centred value keeps that direction: its first share is still as large.
    assert float(kept.state.spectrum()[0]) >= both.first_share
    # A quarter of the rows is one row.
    rows = torch.cat([torch.eye(64)[:1].repeat(10, 1), torch.eye(64)[1:31]])
    group = diagnosed(rows)
    assert group.mean_cosine < DOMINANT
    assert group.sentence.startswith(
        "25 % of the squared gradients lies along one direction that is not the mean"
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_rows_few_or_many_have_nothing_to_say(seed):
    generator = torch.Generator().manual_seed(seed)
    for n in (2, 3, 8, 50, 500):
        assert diagnosed(torch.randn(n, 256, generator=generator)).sentence is None


def test_a_mean_of_other_rows_is_refused():
    state = VendiState(8).update(torch.eye(8))
    for mean, message in (
        (RowMean(8).update(torch.eye(8)[:7]), "the mean is of 7 rows of width 8, the state of 8"),
        (RowMean(4).update(torch.ones(8, 4)), "width 4, the state of 8 of width 8"),
        (RowMean(8).update(torch.ones(8, 8)), "not that of the state's rows"),
    ):
        with pytest.raises(GvendiError, match=message):
            diagnose(state, mean)
    with pytest.raises(GvendiError, match=r"holds no rows \(n = 0\)"):
        diagnose(VendiState(8), RowMean(8))
