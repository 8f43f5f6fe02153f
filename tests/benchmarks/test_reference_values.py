"""Reference values: the draws, what a smaller K is, and the table that shows them."""

import numpy as np
import pytest
import torch

from benchmarks.report.__main__ import table
from benchmarks.report.reference import reference_values
from benchmarks.studies.reference_values import values
from gvendi_fast.vendi import gvendi


def test_all_rows_and_all_coordinates_are_the_score_itself():
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert values(rows, 40, 64, 2, "key") == pytest.approx([gvendi(rows)] * 2)


def test_a_draw_of_coordinates_is_a_sketch_of_fewer_numbers():
    """Its noise is that of K numbers: axes that have nothing in common keep G-Vendi only while K is large enough."""
    generator = torch.Generator().manual_seed(0)
    # Random rows of many coordinates: nearly orthogonal, as sketches of unrelated gradients are.
    rows = torch.randn(60, 4096, generator=generator)
    means = [np.mean(values(rows, 60, dim, 5, "key")) for dim in (64, 1024, 4096)]
    assert means == sorted(means)
    own = [gvendi(torch.randn(60, dim, generator=generator)) for dim in (64, 1024, 4096)]
    assert means == pytest.approx(own, rel=0.03)


def test_draws_depend_on_their_key_alone():
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    assert values(rows, 20, 16, 3, "a") == values(rows, 20, 16, 3, "a")
    assert values(rows, 20, 16, 3, "a") != values(rows, 20, 16, 3, "b")


def test_the_table_has_a_row_for_each_set_and_k_and_says_where_rows_are_too_few():
    scores = [
        {"n": n, "dim": dim, "mean": mean, "low": mean - 1, "high": mean + 1}
        for n, dim, mean in ((100, 8, 5.0), (100, 16, 6.0), (250, 8, 7.0), (250, 16, 8.0))
    ]
    found = {
        "machine": {"commit": "abc", "torch": "2", "numpy": "3"},
        "proxy": "a model",
        "dtype": "bfloat16",
        "seed": 0,
        "draws": 20,
        "sets": {
            "small": {"rows": 100, "mean cosine": 0.25, "scores": [s for s in scores if s["n"] == 100]},
            "large": {
                "rows": 600,
                "mean cosine": 0.5,
                "scores": [{**s, "mean": s["mean"] + 1} for s in scores],
            },
        },
    }
    text = reference_values(found, table)
    assert "Under a model in bfloat16: mean over 20 draws" in text
    assert "| small (100 rows) | 8 | 5.0 (4.0 to 6.0) | fewer rows | 0.250 |" in text
    # The larger value first, K by K.
    assert text.index("large (600 rows) | 8 |") < text.index("small (100 rows) | 8 |") < text.index("| 16 |")
    assert "not measured" in reference_values({}, table)
