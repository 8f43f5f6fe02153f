"""The study of the sketch dimension shows what docs/results.md claims of it."""

import json

from places import BENCHMARKS

from benchmarks.report.sketch_dimension import JUDGED, METHODS, dimension_line, dimension_table

FOUND = json.loads((BENCHMARKS / "results" / "sketch_dimension.json").read_text())


def test_at_least_six_populations_are_told_within_two_percent_where_the_plain_value_is_far_off():
    far, close = set(), set()
    for p in FOUND["populations"]:
        plain, estimate = (p["errors"][name]["mean"] for name in ("plain, order 1", "unlimited K, order 1"))
        if JUDGED[0] <= -plain <= JUDGED[1]:
            far.add(p["population"])
            if abs(estimate) <= 0.02:
                close.add(p["population"])
    assert len(far) >= 6
    assert far == close


def test_the_intervals_cover_what_they_say():
    for q, most in (("order 1", 0.99), ("order 2", 1.0)):
        covered, of = (sum(p["covered"][q][i] for p in FOUND["populations"]) for i in (0, 1))
        assert of > 500
        assert 0.90 <= covered / of <= most


def test_the_line_counts_what_the_results_hold():
    error = {"mean": 0.0, "sd": 0.01, "rms": 0.01}

    def population(plain, estimate, covered):
        errors = {name: error for name in METHODS}
        errors |= {
            "plain, order 1": {**error, "mean": plain},
            "unlimited K, order 1": {**error, "mean": estimate},
        }
        cover = {"order 1": covered, "order 2": [1, 2]}
        values = {"n": 5, "dim": 256, "gvendi": {"1": 3.0, "2": 2.0}, "not seen": 0.0}
        return {"population": f"p {plain}", "errors": errors, "covered": cover, **values}

    found = {
        "populations": [
            population(-0.1, 0.01, [9, 10]),
            population(-0.3, 0.05, [10, 10]),
            population(-0.5, 0, [8, 10]),
        ]
    }
    line = dimension_line(found, "missing")
    assert "Of 3 pairs of population and K, 2 (of 2 populations)" in line
    assert "off by at most 2 % in 1 of them" in line
    assert "at K 30.0 %" in line
    assert "27 of 30 cases (90.0 %) at order 1" in line
    rows = dimension_table(found, lambda head, rows: rows)
    assert [row[4] for row in rows] == ["-10.0 % ± 1.0", "-30.0 % ± 1.0", "-50.0 % ± 1.0"]
    assert dimension_line({}, "not measured") == "Not measured."
