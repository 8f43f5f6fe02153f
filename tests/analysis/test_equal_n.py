"""Groups at equal n: what is drawn, what the band is, and what neither depends on."""

from types import SimpleNamespace

import numpy as np
import pytest

from gvendi_fast.analysis import equal_n
from gvendi_fast.analysis.equal_n import (
    DRAWS,
    LARGE_DRAWS,
    group_scores,
    pooled_sentence,
    saturation_sentence,
)
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import VendiState, gvendi, jackknife

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
        self.spec, self.dim = {"sketch": {"dim": DIM}}, DIM
        starts = range(0, len(self.groups), part_rows)
        self.cuts = [np.arange(s, min(s + part_rows, len(self.groups))) for s in starts]
        if backwards:
            self.cuts = [cut[::-1] for cut in self.cuts[::-1]]
        self.passes, self.manifest = 0, None

    def done(self):
        return [*range(len(self.cuts))]

    def iterate(self, columns, units=None):
        self.passes += "sketch" in columns
        for cut in self.cuts if units is None else [self.cuts[unit] for unit in units]:
            yield SimpleNamespace(
                groups=self.groups[cut].tolist(), rows=self.rows[cut], sketches=self.sketches[cut]
            )

    def of(self, group: str) -> np.ndarray:
        return self.sketches[self.groups == group]


def test_mean_of_the_draws_and_the_interval_for_another():
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
    # A group taken whole has the interval that `score` gives the same rows.
    rows = run.of("exact")
    alone = jackknife(VendiState(DIM).update(rows), rows)
    assert (whole.gvendi, whole.low, whole.high) == pytest.approx(
        (alone.value, alone.low, alone.high), rel=1e-3
    )
    for group in ("more", "many"):
        score = found[group]
        assert score.low < score.gvendi < score.high < gvendi(run.of(group))
        assert score.high <= 40
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


def test_small_groups_are_compared_together_and_said_to_be():
    found = group_scores(Parts({"a": 15, "b": 16, "c": 20, "d": 90}))
    assert {g: (s.n, s.rows) for g, s in found.items()} == {
        "a": (0, 15),
        "b": (0, 16),
        "c": (0, 20),
        "d": (51, 90),
        "(others)": (51, 51),
    }
    said = pooled_sentence(found)
    assert said == (
        "3 groups with too few rows to compare (51 rows in all, fewer than 51 each): counted together as (others)"
    )
    # One small group is not others, and too few rows stay out.
    alone = group_scores(Parts({"a": 15, "d": 90}))
    assert (alone["a"].gvendi, alone["d"].n) == (None, 90)
    assert pooled_sentence(alone).endswith("(15 rows in all, fewer than 90 each): not compared")
    assert "(others)" not in group_scores(Parts({"a": 5, "b": 6, "d": 90}))
    assert pooled_sentence(group_scores(Parts({"a": 40, "b": 50}))) is None
    # Where no group is large, half of the largest is enough.
    assert {g: s.n for g, s in group_scores(Parts({"a": 8, "b": 12})).items()} == {"a": 8, "b": 8}
    # A group that has the name keeps it.
    named = group_scores(Parts({"(others)": 70, "b": 20, "c": 20}))
    assert {g: s.rows for g, s in named.items() if s.n} == {"(others)": 70, "((others))": 40}


def test_the_interval_of_a_group_holds_for_other_rows_of_its_source():
    inside, draws_of = [], np.random.default_rng(2)
    scale = np.arange(1, DIM + 1) ** -0.7
    for size in (40, 60, 400):
        for _ in range(25):
            run = Parts({"other": 40, "it": size})
            run.sketches[run.groups == "it"] = draws_of.standard_normal((size, DIM)) * scale
            score = group_scores(run)["it"]
            inside.append(score.low <= gvendi(draws_of.standard_normal((40, DIM)) * scale) <= score.high)
    assert 0.89 <= np.mean(inside) <= 0.995


def test_what_is_said_of_scores_near_their_most():
    assert saturation_sentence([9.0, 12.0], 16, 1024) is None
    said = saturation_sentence([15.8, 15.7], 16, 1024)
    assert said.startswith("16 rows cannot show more than 16: every score lies within 10 % of that")
    assert saturation_sentence([15.8, 3.0], 16, 1024).startswith(
        "16 rows cannot show more than 16: 1 of 2 scores lies within 10 %"
    )
    assert "larger --dim" in saturation_sentence([60.0], 500, 64)


def test_too_many_groups_are_refused(monkeypatch):
    monkeypatch.setattr(equal_n, "MAX_GROUPS", 2)
    with pytest.raises(GvendiError, match="--by has more than 2 different values"):
        group_scores(Parts({"a": 5, "b": 6, "c": 50}))


def test_copies_within_a_group_bound_its_value_for_unlimited_k():
    run = Parts({"copied": 40, "other": 40})
    copied = np.flatnonzero(run.groups == "copied")
    # Eight different rows, as orthogonal as rows can be.
    run.sketches[copied] = np.eye(DIM, dtype=np.float32)[np.arange(40) % 8]
    found = group_scores(run)
    assert found["copied"].gvendi == pytest.approx(8)
    assert found["copied"].unlimited_k == pytest.approx(8)


def test_no_group_scores_more_than_its_draw_has_rows_for_unlimited_k():
    run = Parts({"a": 33, "b": 32})
    run.sketches = np.random.default_rng(1).standard_normal((65, DIM)).astype(np.float32)
    assert all(score.unlimited_k <= score.n == 32 for score in group_scores(run).values())
