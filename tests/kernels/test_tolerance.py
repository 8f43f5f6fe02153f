"""The rule of tolerance.py itself: unit roundoffs as measured, and what it lets through and does not."""

import math

import pytest
import torch
from tolerance import FLOOR, UNIT, allowed, check, relative_error

DTYPES = pytest.mark.parametrize("dtype", list(UNIT), ids=str)


@DTYPES
def test_unit_roundoff_is_the_most_that_rounding_errs(dtype):
    assert UNIT[dtype] == torch.finfo(dtype).eps / 2
    # Ties, the largest errors there are, lie half a step beyond each number of p bits; 1 + u errs most of its size.
    step = torch.finfo(dtype).eps
    exact = 1 + step * (torch.arange(256, dtype=torch.float64) + 0.5)
    errors = (exact.to(dtype).double() - exact).abs() / exact
    assert errors.max() <= UNIT[dtype]
    assert errors[0] == UNIT[dtype] / (1 + UNIT[dtype])


@DTYPES
def test_beside_an_exact_twin_one_rounding_of_16_bits_passes_or_four_of_float32(dtype):
    roundings = 4 if dtype == torch.float32 else 1
    twin, one = torch.ones(1, dtype=dtype), torch.ones(1, dtype=torch.float64)
    assert allowed(twin, one) == FLOOR[dtype]
    check(one + roundings * UNIT[dtype], twin, one)
    with pytest.raises(AssertionError, match="is allowed"):
        check(one + (roundings + 1) * UNIT[dtype], twin, one)


def test_what_is_not_finite_or_of_another_shape_does_not_pass():
    ones = torch.ones(3)
    for value in (math.nan, math.inf):
        with pytest.raises(AssertionError):
            check(torch.tensor([1.0, value, 1.0]), ones, ones.double())
        assert not relative_error(torch.tensor([1.0, value, 1.0]), ones.double()) <= 1
    with pytest.raises(ValueError, match=r"shape \(1,\), wanted \(3,\)"):
        relative_error(ones[:1], ones.double())
    assert relative_error(ones[:0], ones[:0].double()) == 0
    # Where nothing is wanted, only nothing is right.
    check(torch.zeros(3), torch.zeros(3), torch.zeros(3).double())
    with pytest.raises(AssertionError):
        check(torch.full((3,), 1e-30), torch.zeros(3), torch.zeros(3).double())


def test_errors_are_of_the_largest_entry_and_count_twice_for_the_twin():
    wanted = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([0.5, 4.0]), wanted) == 0.125
    twin = torch.tensor([0.5, 4.0])
    assert allowed(twin, wanted) == 0.25 + FLOOR[torch.float32]
    assert allowed(twin, wanted, truncations=8) == 0.25 + FLOOR[torch.float32] + 8 * UNIT[torch.float32]
