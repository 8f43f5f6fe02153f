"""Groups at equal n: what is drawn, what the band is, and what neither depends on."""

from types import SimpleNamespace

import numpy as np
import pytest

from gvendi_fast.analysis import equal_n
from gvendi_fast.analysis.equal_n import DRAWS, LARGE_DRAWS, group_scores
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import gvendi

DIM = 64


class Parts:
    """A run directory in memory: rows of groups of these sizes, interleaved, in parts in this order."""

    def __init__(self, sizes: dict[str, int], part_rows: int = 50, backwards: bool = False):
        self.groups = np.repeat(list(sizes), list(sizes.values()))
        generator = np.random.default_rng(0)
        self.rows = generator.permutation(len(self.groups))
        self.sketches = generator.standard_normal((len(self.groups), DIM)).astype(np.float32)
        # Groups differ in how many directions they use.
        for i, group in enumerate(sizes):
            self.sketches[self.groups == group, 20 + 10 * i :] *= 0.05
        self.spec = {"sketch": {"dim": DIM}}
        starts = range(0, len(self.groups), part_rows)
        self.cuts = [np.arange(s, min(s + part_rows, len(self.groups))) for s in starts]
        if backwards:
            self.cuts = [cut[::-1] for cut in self.cuts[::-1]]
        self.passes = 0

    def iterate(self, columns):
        self.passes += "sketch" in columns
        for cut in self.cuts:
            yield SimpleNamespace(
                groups=self.groups[cut].tolist(), rows=self.rows[cut], sketches=self.sketches[cut]
            )

    def of(self, group: str) -> np.ndarray:
        return self.sketches[self.groups == group]


def test_mean_and_band_of_the_draws_and_none_for_a_group_taken_whole():
    run = Parts({"few": 7, "exact": 40, "more": 60, "many": 400})
    found = group_scores(run)
    assert list(found) == ["exact", "few", "many", "more"]
    assert {g: (s.n, s.draws, s.rows) for g, s in found.items()} == {
        "few": (0, 0, 7),
        "exact": (40, 1, 40),
        "more": (40, DRAWS, 60),
        "many": (40, DRAWS, 400),
    }
    assert (found["few"].gvendi, found["few"].low, found["few"].high) == (None, None, None)
    whole = found["exact"]
    assert whole.low == whole.gvendi == whole.high == pytest.approx(gvendi(run.of("exact")), rel=1e-6)
    for group in ("more", "many"):
        score = found[group]
        assert score.low < score.gvendi < score.high < gvendi(run.of(group))
        # Where 40 rows are drawn from 60, draws share most of them.
        assert score.high - score.low < 0.1 * score.gvendi
    assert found["more"].gvendi > found["exact"].gvendi


def test_the_mean_is_that_of_random_draws():
    run = Parts({"exact": 40, "many": 400})
    generator, rows = np.random.default_rng(1), run.of("many")
    wanted = [gvendi(rows[generator.choice(400, 40, replace=False)]) for _ in range(200)]
    # The standard error of a mean of 20 is 0.22 of the deviation, that of 200 another 0.07.
    assert group_scores(run)["many"].gvendi == pytest.approx(np.mean(wanted), abs=0.55 * np.std(wanted))


def test_neither_parts_nor_their_order_nor_other_groups_matter():
    sizes = {"exact": 40, "more": 60, "many": 400}
    plain = group_scores(Parts(sizes))
    assert group_scores(Parts(sizes, part_rows=7)) == plain
    assert group_scores(Parts(sizes, backwards=True)) == plain
    assert group_scores(Parts(sizes), seed=1)["many"].gvendi != plain["many"].gvendi
    assert group_scores(Parts(sizes), seed=1)["exact"] == plain["exact"]


def test_memory_bounds_the_sketches_held_and_changes_nothing(monkeypatch):
    run = Parts({"exact": 40, "more": 60, "many": 400})
    plain = group_scores(run)
    assert run.passes == 1
    # Room for one draw and a half: every draw of "many" takes a pass of its own.
    monkeypatch.setattr(equal_n, "GROUP_BYTES", 60 * 4 * DIM)
    monkeypatch.setattr(equal_n, "DRAW_BYTES", 3 * 40 * 4 * DIM)
    assert group_scores(run) == plain
    assert 1 + DRAWS < run.passes <= 3 + 2 * DRAWS


def test_draws_of_more_rows_than_the_kernel_takes_are_fewer():
    run = Parts({"exact": 300, "many": 500}, part_rows=512)
    found = group_scores(run)
    assert (found["many"].n, found["many"].draws, found["exact"].draws) == (300, LARGE_DRAWS, 1)
    assert found["exact"].gvendi == pytest.approx(gvendi(run.of("exact")), rel=1e-6)
    assert found["many"].low < found["many"].gvendi < found["many"].high


def test_small_groups_are_compared_where_most_are_small():
    found = group_scores(Parts({"a": 5, "b": 6, "c": 50}))
    assert {g: s.n for g, s in found.items()} == {"a": 0, "b": 6, "c": 6}


def test_too_many_groups_are_refused(monkeypatch):
    monkeypatch.setattr(equal_n, "MAX_GROUPS", 2)
    with pytest.raises(GvendiError, match="--by has more than 2 different values"):
        group_scores(Parts({"a": 5, "b": 6, "c": 50}))
