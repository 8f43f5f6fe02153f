"""The numbers of a set: the same in coordinates of its own as in those of sketches, and what they say side by side."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.set_numbers import Sample, SetNumbers, growth_of, noise_sentence, numbers_of
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.vendi import VendiState, growth
from gvendi_fast.vendi.centered import RowMean
from gvendi_fast.vendi.unlimited_k import UnlimitedK

K = 96


def in_all_coordinates(rows: np.ndarray, reference: RowMean | None, distinct: int) -> Sample:
    """What `Sample.of_rows` makes where rows are not fewer than K."""
    own = RowMean(K).update(rows)
    return Sample(VendiState(K).update(rows), own, reference or own, MatrixPool(rows), K, distinct)


def plain(values: object) -> list[float | None]:
    """All numbers of nested JSON values, in order; sentences left out."""
    if isinstance(values, dict):
        return [number for value in values.values() for number in plain(value)]
    if isinstance(values, list):
        return [number for value in values for number in plain(value)]
    return [] if isinstance(values, str) else [values]


def all_of(numbers: SetNumbers) -> list[float | None]:
    """Every number of a set, but the standard error and its degrees of freedom."""
    interval, parts = numbers.interval, (numbers.unlimited_k, numbers.centered, numbers.diagnosis)
    own = [
        interval.value,
        interval.low,
        interval.high,
        numbers.entropy,
        numbers.n,
        numbers.dim,
        numbers.distinct,
    ]
    return [*own, *(number for part in parts for number in plain(part.to_dict()))]


def near(found: list[float | None], wanted: list[float | None]) -> None:
    assert [value is None for value in found] == [value is None for value in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    # Shares near 0 are rounding of both.
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 50, 95])
@pytest.mark.parametrize("outside", [False, True])
def test_fewer_rows_than_k_have_the_same_numbers_in_coordinates_of_their_own(n, outside):
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, K)) * np.arange(1, K + 1) ** -0.5 + 0.2
    # A copy, and lengths that differ.
    rows[n // 2] = rows[0]
    rows *= rng.uniform(0.5, 2, (n, 1))
    rows = rows.astype(np.float64)
    reference = RowMean(K).update(rng.standard_normal((40, K)) + 0.3) if outside else None
    distinct = max(1, n - 1)
    few, all_ = Sample.of_rows(rows, reference, distinct), in_all_coordinates(rows, reference, distinct)
    assert few.pool.dim == n + 1
    found, wanted = numbers_of(few), numbers_of(all_)
    near(all_of(found), all_of(wanted))
    assert (found.interval.se, found.interval.freedom) == pytest.approx(
        (wanted.interval.se, wanted.interval.freedom), rel=1e-5, abs=1e-9
    )
    grown, expected = growth_of(few, found.interval, 3), growth_of(all_, wanted.interval, 3)
    assert (grown is None) == (expected is None) == (n < 16)
    if grown is not None:
        near(plain(grown.to_dict()), plain(expected.to_dict()))


def test_copies_are_counted_where_their_number_is_not_given():
    rows = np.eye(8, dtype=np.float32)[[0, 0, 1, 2]]
    assert Sample.of_rows(rows).distinct == 3
    assert numbers_of(Sample.of_rows(rows)).unlimited_k.value <= 3
    assert Sample.of_rows(torch.from_numpy(rows)).distinct == 3


def unlimited(bias: float, unseen: float = 0.0) -> UnlimitedK:
    return UnlimitedK(100.0, 90.0, 110.0, 100 * (1 + bias), 1024, 5000, 2048, unseen, 0.01)


def test_what_is_said_of_the_noise_of_k():
    assert noise_sentence([]) is None
    assert noise_sentence([unlimited(-0.049), unlimited(0.02)]) is None
    assert noise_sentence([unlimited(-0.2), unlimited(-0.03)]) == (
        "the noise of sketches of K = 1,024 numbers takes about 3 to 20 % off these scores; values for unlimited K "
        "stand beside them"
    )
    # Sets of one bias, and none that is raised by less than what is shown.
    assert "takes about 20 % off" in noise_sentence([unlimited(-0.2), unlimited(-0.201)])
    assert "takes about 0 to 20 % off" in noise_sentence([unlimited(-0.2), unlimited(0.001)])
    assert "changes these scores by about -20 to +2 %" in noise_sentence([unlimited(-0.2), unlimited(0.02)])
    assert "unlimited K, known only roughly of so many rows, stand" in noise_sentence(
        [unlimited(-0.2, unseen=0.3)]
    )


def test_sketches_of_twice_the_numbers_halve_the_bias_where_that_is_said():
    """64 orthogonal gradients, whose G-Vendi is 64, by random matrices of the K named and of the one before."""
    rng = np.random.default_rng(0)
    exact = 64
    said = numbers_of(Sample.of_rows(rng.standard_normal((exact, 32)))).unlimited_k
    assert said.dim_to_halve == 64 or said.dim_to_halve == 128

    def bias(dim: int) -> float:
        scores = [VendiState(dim).update(rng.standard_normal((exact, dim))).gvendi() for _ in range(5)]
        return 1 - float(np.mean(scores)) / exact

    assert bias(said.dim_to_halve) <= bias(32) / 2 * 1.05
    assert said.bias == pytest.approx(-bias(32), abs=0.03)
    assert math.isclose(said.value, exact, rel_tol=0.05)


def test_a_state_that_is_there_already_changes_nothing_but_the_time():
    rows = np.random.default_rng(0).standard_normal((60, 24))
    state = VendiState(24).update(rows)
    near(plain(growth(rows, state=state).to_dict()), plain(growth(rows).to_dict()))
    with pytest.raises(GvendiError, match=r"state is of 60 rows of width 24; wanted that of these 59 rows"):
        growth(rows[:59], state=state)
