"""Whether the interval for another draw, that of a ratio and the forecast for twice the rows hold, on known spectra."""

import math

import numpy as np
import pytest
import torch

from benchmarks.corpora.spectra import sources
from gvendi_fast.analysis.compare import difference
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import VendiState, growth, gvendi, jackknife
from gvendi_fast.vendi.growth import entropy_of_more

DIM, TRIALS = 64, 80
# Too few rows to draw from; and of a rare kind that matters so much, too many draws show no row.
LEFT_OUT = ("listed, each row 4 times", "2% rare, the rest narrow")
NAMES = [name for name in sources(DIM) if name not in LEFT_OUT]
# Of many rows; a flat spectrum takes four times the draws.
EVERY_DAY = [name for name in NAMES[::4] if name != "flat"]


def intervals(name, n, seed, trials=TRIALS):
    draw, generator = sources(DIM)[name], torch.Generator().manual_seed(seed)
    rows = [draw(n, generator) for _ in range(trials)]
    return [jackknife(VendiState(DIM).update(x), x) for x in rows]


# Every spectrum with few rows; with more of them about every fourth, and all in soak.
@pytest.mark.parametrize(
    ("name", "times"),
    [
        *((name, 1) for name in NAMES),
        *((name, 6) for name in EVERY_DAY),
        *(pytest.param(name, 6, marks=pytest.mark.soak) for name in NAMES if name not in EVERY_DAY),
    ],
)
def test_another_draw_lies_in_the_interval(name, times):
    draw = sources(DIM)[name]
    n = max(12, int(times * gvendi(draw(4000, torch.Generator().manual_seed(0)))))
    # Near the upper limit, which a flat spectrum at n = G reaches, few draws would not tell.
    trials = 300 if name == "flat" else TRIALS
    found = intervals(name, n, 1, trials)
    value = np.array([x.value for x in found])
    inside = sum(int(((value >= x.low - 1e-9) & (value <= x.high + 1e-9)).sum()) - 1 for x in found)
    # 80 draws tell a share of 95 % to about 2.5 %; where n shows one row in fifty, some draws show none.
    assert (
        (0.87 if "rare" in name else 0.88)
        <= inside / (trials * (trials - 1))
        <= (0.998 if times == 1 else 0.995)
    )
    assert all(1 <= x.low <= x.value <= x.high <= min(n, DIM) for x in found)


def test_the_ratio_of_two_sources_lies_in_its_interval():
    inside = {"equal": 0, "unequal": 0}
    of = {name: intervals(name, 60, seed=2) for name in NAMES[::2][:6]}
    for i, name in enumerate(of):
        for kind, other in (("equal", name), ("unequal", list(of)[(i + 1) % len(of)])):
            log_mean = [np.mean([math.log(x.value) for x in of[which]]) for which in (name, other)]
            for k in range(TRIALS):
                d = difference("a", of[name][k], "b", of[other][(k + 1) % TRIALS])
                inside[kind] += d.ratio_low <= math.exp(log_mean[0] - log_mean[1]) <= d.ratio_high
    for held in inside.values():
        assert 0.91 <= held / (6 * TRIALS) <= 0.99


def test_the_forecast_holds_on_known_spectra():
    inside, half, unlimited = [], [], []
    for name in NAMES:
        draw, generator = sources(DIM)[name], torch.Generator().manual_seed(3)
        truth = gvendi(draw(8000, generator))
        for times in (2, 8):
            n = max(16, int(times * truth))
            for _ in range(4):
                rows = draw(2 * n, generator)
                made = growth(rows[:n])
                assert (made.unlimited is None) == (made.why_not is not None)
                f = made.forecast
                inside.append(f.low <= gvendi(rows) <= f.high)
                half.append((f.high - f.low) / 2 / f.value)
                if made.unlimited is not None:
                    unlimited.append(made.unlimited.low <= truth <= made.unlimited.high)
    assert np.mean(inside) >= 0.88
    assert np.median(half) < 0.15
    assert len(unlimited) >= 10
    assert np.mean(unlimited) >= 0.85


def test_growth_counts_subsets_and_says_why_unlimited_data_is_not_known():
    draw = sources(DIM)["k^-1"]
    rows = draw(400, torch.Generator().manual_seed(0))
    found = growth(rows)
    assert [(p.n, p.draws) for p in found.points] == [(100, 4), (200, 6), (400, 1)]
    assert found.points[-1].mean == pytest.approx(gvendi(rows), rel=1e-6)
    wanted = np.mean([gvendi(draw(100, torch.Generator().manual_seed(i))) for i in range(1, 30)])
    assert found.points[0].mean == pytest.approx(wanted, rel=0.05)
    assert found.points[0].low < found.points[0].mean < found.points[0].high
    assert found.forecast.n == 800
    assert found.points[-1].mean < found.forecast.value < DIM
    few = growth(rows[:40])
    assert few.unlimited is None
    assert "doubling" in few.why_not or "twice the rows" in few.why_not
    # The same interval from outside is the same result; another one is refused.
    interval = jackknife(VendiState(DIM).update(rows), rows)
    again = growth(rows, interval)
    assert (again.forecast.low, again.forecast.high) == pytest.approx(
        (found.forecast.low, found.forecast.high), rel=1e-5
    )
    with pytest.raises(GvendiError, match="interval is of 400 rows"):
        growth(rows[:40], interval)
    with pytest.raises(GvendiError, match="source has 15 rows; growth needs at least 16"):
        growth(rows[:15])


def test_rows_that_are_all_alike_grow_to_nothing_more():
    found = growth(torch.ones(64, 8))
    assert [p.mean for p in found.points] == pytest.approx([1, 1, 1])
    assert (found.forecast.value, found.forecast.high) == pytest.approx((1, 1), abs=1e-4)
    assert found.unlimited.value == pytest.approx(1, abs=1e-4)


def test_the_law_of_many_rows_meets_draws_of_a_flat_spectrum():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(400, 128, generator=generator, dtype=torch.float64))
    state = VendiState(128).update(rows[:200])
    assert entropy_of_more(state.spectrum(), 200, 200, 128) == pytest.approx(state.entropy(), abs=2e-3)
    wanted = VendiState(128).update(rows).entropy()
    assert entropy_of_more(state.spectrum(), 200, 400, 128) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("n", [2, 3])
def test_so_few_rows_bound_another_draw_by_nothing_but_their_number(n):
    rows = torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) + 0.3
    interval = jackknife(VendiState(32).update(rows), rows)
    assert (interval.low, interval.high, interval.se) == (1.0, n, math.inf)
    assert 1 < interval.value < n
