"""The K that a block of rows asks for, against what K does to all rows."""

import math

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import gvendi
from gvendi_fast.vendi.choose_dim import DIMS, ChosenDim, choose_dim
from gvendi_fast.vendi.degrees_of_freedom import DegreesOfFreedom

N, P = 1200, 2000
COORDINATES = torch.arange(1, P + 1, dtype=torch.float64)
SPECTRA = {
    "k^-0.5": COORDINATES**-0.5,
    "k^-1.3": COORDINATES**-1.3,
    "exponential": torch.exp(-COORDINATES / 100),
}


def rows_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    rows = torch.randn(N, P, generator=generator, dtype=torch.float64) * SPECTRA[name].sqrt()
    return torch.nn.functional.normalize(rows)


def sketched(rows: torch.Tensor, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return rows.float() @ torch.randn(rows.shape[1], dim, generator=generator)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_bias_of_all_rows_is_predicted_from_a_sixth_of_them(name):
    rows = rows_of(name)
    exact = gvendi(rows)
    chosen = choose_dim(sketched(rows[::6], DIMS[-1]), N)
    assert (chosen.rows, chosen.block) == (N, N // 6)
    assert chosen.low <= chosen.bias <= chosen.high <= 0
    found = gvendi(sketched(rows, chosen.dim)) / exact - 1
    assert chosen.bias == pytest.approx(found, abs=0.015)
    if chosen.smaller:
        dim, bias = chosen.smaller
        assert dim == chosen.dim // 2
        assert bias < -0.05
        assert bias == pytest.approx(gvendi(sketched(rows, dim)) / exact - 1, abs=0.02)
    assert abs(chosen.bias) < 0.05 or chosen.dim == DIMS[-1]


def test_more_rows_need_a_larger_k():
    block = sketched(rows_of("exponential")[:200], DIMS[-1])
    dims = [choose_dim(block, rows).dim for rows in (200, 1000, 10_000)]
    assert dims == sorted(dims)
    assert dims[0] < dims[-1]


def test_without_more_rows_than_the_block_nothing_is_unseen():
    rows = rows_of("k^-0.5")[:150]
    chosen = choose_dim(sketched(rows, DIMS[-1]), 150)
    assert chosen.low == chosen.high == chosen.bias
    assert chosen.bias == pytest.approx(gvendi(sketched(rows, chosen.dim)) / gvendi(rows) - 1, abs=0.01)


def test_rows_that_repeat_count_once():
    rows = rows_of("k^-0.5")[:60]
    once = choose_dim(sketched(rows, DIMS[-1]), 60)
    thrice = choose_dim(sketched(rows.repeat(3, 1), DIMS[-1]), 180)
    assert thrice.bias == pytest.approx(once.bias, rel=1e-3)
    assert thrice.dim == once.dim


def test_one_row_needs_no_more_than_the_smallest():
    chosen = choose_dim(torch.ones(1, DIMS[-1]), 1)
    assert (chosen.dim, chosen.smaller) == (512, None)
    assert chosen.bias == pytest.approx(0, abs=1e-9)


def test_the_sentence_says_what_was_chosen_and_why():
    found = ChosenDim(2048, -0.031, -0.036, -0.029, (1024, -0.0584), 7473, 512)
    assert found.sentence == (
        "K = 2048, the smallest of 512 and above with a bias below 5 %: G-Vendi of 7,473 rows has a predicted bias of "
        "-3.1 % (between -3.6 % and -2.9 %), at K = 1024 of -5.8 %; from 512 rows at K = 8192"
    )
    most = ChosenDim(8192, -0.2, -0.2, -0.2, (4096, -0.3), 90_000, 512)
    assert most.sentence.startswith(
        "K = 8192, the largest there is: G-Vendi of 90,000 rows has a predicted bias of -20.0 %, at"
    )
    least = ChosenDim(512, -0.0001, -0.0001, -0.0001, None, 3, 3)
    assert "3 rows has a predicted bias of 0.0 %; from 3 rows" in least.sentence


@pytest.mark.parametrize(("block", "rows"), [(0, 5), (6, 5)])
def test_blocks_that_are_none_or_too_many_are_refused(block, rows):
    with pytest.raises(GvendiError, match=f"sketches has {block} rows; wanted from 1 to 5"):
        choose_dim(torch.ones(block, DIMS[-1]), rows)


def test_a_block_is_smaller_than_k():
    with pytest.raises(GvendiError, match=r"block is 64; .* below dim = 64"):
        DegreesOfFreedom(torch.full((64,), 1 / 64), 64, 100, block=64)
    assert math.isfinite(DegreesOfFreedom(torch.full((63,), 1 / 63), 64, 100, block=63).lost(64))
