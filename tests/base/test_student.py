"""Student's t against scipy, and numbers as they are printed."""

import math

import pytest
from scipy.stats import norm, t

from gvendi_fast.base.shown import shown
from gvendi_fast.base.student import outside, quantile


@pytest.mark.parametrize("freedom", [1, 2, 2.5, 7, 30, 300.5, 5e4])
def test_it_is_the_t_distribution(freedom):
    for level in (0.5, 0.95, 0.999):
        assert quantile(level, freedom) == pytest.approx(t.ppf(0.5 + level / 2, freedom), rel=1e-8)
    for at in (0.0, 0.1, 2.0, -5.0):
        assert outside(at, freedom) == pytest.approx(2 * t.sf(abs(at), freedom), rel=1e-8)


def test_without_end_it_is_the_normal_distribution():
    assert quantile(0.95, math.inf) == pytest.approx(norm.ppf(0.975))
    assert outside(3.0, math.inf) == pytest.approx(2 * norm.sf(3.0))


def test_zero_has_no_sign():
    assert [shown(x, ".2f") for x in (-0.001, -0.0, 0.0, -0.01, 1.5)] == [
        "0.00",
        "0.00",
        "0.00",
        "-0.01",
        "1.50",
    ]
    assert [shown(x, "+.2f") for x in (-0.001, 0.001, -1.0)] == ["+0.00", "+0.00", "-1.00"]
    assert shown(-0.0000049, ".4f") == "0.0000"
