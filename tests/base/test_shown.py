"""Numbers that people read: signs of zeros, digits, and on which side a limit is rounded."""

import numpy as np
import pytest

from gvendi_fast.base.shown import at_most, number, shown, significant


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-0.00001, ".4f", "0.0000"),
        (-0.0, ".2f", "0.00"),
        (-0.004, "+.2f", "+0.00"),
        (-0.00001, "7.4f", " 0.0000"),
        (-0.006, ".2f", "-0.01"),
        (-0.4, ",.0f", "0"),
        (1e-9, ".3f", "0.000"),
        (-10.0, ".1f", "-10.0"),
    ],
)
def test_a_zero_has_no_minus(value, form, text):
    assert shown(value, form) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.00001234, "-0.00001234"),
        (12345.6, "12,346"),
        (99.999, "100"),
        (0.5, "0.5"),
        (100, "100"),
    ],
)
def test_significant_digits_have_no_exponent(value, text):
    assert significant(value) == text


def test_a_limit_is_rounded_up_and_rounding_errors_are_no_excess():
    assert at_most(100.00000000000004) == "100"
    assert at_most(99.8741) == "99.88"
    assert at_most(9.9996) == "10"
    assert at_most(12345.2) == "12,346"
    for value in np.random.default_rng(0).lognormal(0, 4, 1000):
        text = float(at_most(value).replace(",", ""))
        assert value * (1 - 2e-6) <= text <= value * 1.0011


def test_numbers_of_columns():
    assert [number(v) for v in (-0.001, 1.234, 12.34, 123.44, 1234.4)] == [
        "0.00",
        "1.23",
        "12.3",
        "123.4",
        "1,234",
    ]
