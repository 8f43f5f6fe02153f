"""A row without a direction: one rule for numbers, arrays and tensors, one error, one pair of reasons."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import (
    cosine_blocks,
    has_direction,
    no_direction,
    refused_gradient,
    unit_rows,
)

NORMS = [0.0, 5e-324, 1.0, 1e308, math.inf, math.nan]
EXPECTED = [False, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_arrays_and_numbers_follow_one_rule(dtype):
    assert [has_direction(norm) for norm in NORMS] == EXPECTED
    assert has_direction(np.array(NORMS)).tolist() == EXPECTED
    # Those that every dtype holds.
    at = [0, 2, 4, 5]
    norms = torch.tensor([NORMS[i] for i in at], dtype=dtype)
    assert has_direction(norms).tolist() == [EXPECTED[i] for i in at]


def test_the_error_names_the_row_and_its_norm():
    rows = torch.ones(5, 3)
    rows[3] = 0
    with pytest.raises(GvendiError) as error:
        unit_rows(rows, first=10)
    assert str(error.value) == str(no_direction(13, 0.0))
    assert str(error.value) == (
        "row 13 of rows has norm 0.0; wanted finite and not zero: leave this sample out and report it"
    )


def test_a_refused_gradient_is_zero_or_not_finite():
    assert refused_gradient(0.0) == "zero gradient"
    assert refused_gradient(math.nan) == refused_gradient(np.float64(math.inf)) == "non-finite gradient"


def test_blocks_of_cosines_are_the_matrix_cut_into_columns():
    rows, pool = (unit_rows(torch.randn(n, 8)).float() for n in (3, 10))
    found = list(cosine_blocks(rows, pool, 4))
    assert [first for first, _ in found] == [0, 4, 8]
    assert [block.shape for _, block in found] == [(3, 4), (3, 4), (3, 2)]
    assert torch.allclose(torch.cat([block for _, block in found], dim=1), rows @ pool.T, rtol=0, atol=1e-6)
