"""The study of quantised proxies: what it compares, and its table."""

import pytest
import torch

from benchmarks.report.__main__ import table
from benchmarks.report.quantised import quantised_line, quantised_table
from benchmarks.studies.quantised import compare, weight_bytes
from gvendi_fast import load_proxy


def test_equal_sketches_agree_wholly_and_others_less():
    z = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    same = compare(3 * z, z)
    assert all(
        same[name] == pytest.approx(1) for name in ("mean cosine", "least cosine", "pairs", "mixtures")
    )
    assert same["gvendi"] == pytest.approx(same["gvendi of reference"])
    other = compare(z + torch.randn(12, 64, generator=torch.Generator().manual_seed(1)), z)
    assert 0.5 < other["mean cosine"] < 0.9
    assert other["least cosine"] < other["mean cosine"]
    assert other["pairs"] < 0.9


def test_bytes_are_those_of_the_parameters():
    model = load_proxy("tiny", dtype="float32", device="cpu").model
    own = weight_bytes(model)
    assert own["whole"] >= 4 * sum(p.numel() for p in model.parameters())
    assert 0 < own["linear"] < own["whole"]


def test_the_table_has_a_row_for_every_way():
    way = {
        **dict.fromkeys(("mean cosine", "least cosine", "pairs", "mixtures"), 0.98765),
        "gvendi": 12.3456,
        "linear": 106168320,
        "whole": 219555328,
    }
    found = {
        "ways": {"8-bit": way},
        "rows": 64,
        "dim": 1024,
        "mixtures": 200,
        "proxy": {"parameters": 134515008},
    }
    assert "| 8-bit | 0.9877 | 0.988 | 0.9877 | 0.9877 | 12.35 | 106 MB | 220 MB |" in quantised_table(
        found, table
    )
    assert "134,515,008 parameters" in quantised_line(found)
    assert quantised_line({}) == "Not measured."
