"""The study of stored sketches: what it compares, and its tables."""

import json

import numpy as np
import pytest
import torch

from benchmarks.report.__main__ import machine_line, table
from benchmarks.report.stored_sketches import stored_sections
from benchmarks.studies.stored_sketches import adjusted_rand, draw_rows, errors, reaches


def test_the_adjusted_rand_index():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert adjusted_rand(labels, (labels + 1) % 3) == 1
    # By hand: 2 pairs together in both, of 3 and 4 of 15; (2 - 12 / 15) / (3.5 - 12 / 15).
    assert adjusted_rand(labels, torch.tensor([0, 0, 1, 1, 1, 2])) == pytest.approx(1.2 / 2.7)


def test_errors_are_those_of_cosines_between_other_rows():
    z = torch.eye(3, dtype=torch.float64)
    cosines = torch.full((3, 3), 7.0, dtype=torch.float64)
    cosines[0, 1], cosines[0, 2], cosines[1, 2] = 0.3, -0.4, 0
    assert errors(z, cosines) == {"rms": pytest.approx(0.5 / 3**0.5), "max": 0.4}


def test_reaching_to_the_largest_element_is_best_for_normal_rows():
    z = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).standard_normal((40, 256))))
    found = reaches(z, z @ z.T)
    assert 1e-4 < found["1.0"] < 1e-3
    assert found["0.7"] > 2 * found["1.0"]
    assert found["best of each row"] < 1.1 * found["1.0"]


def test_rows_are_drawn_from_every_source_and_mixed(shared):
    rows = draw_rows(shared, 5)
    assert len(rows) == len({row["id"] for row in rows}) == 20
    assert len({row["source"] for row in rows[:10]}) > 2


def test_the_tables():
    assert stored_sections({}, table, machine_line) == []
    store = {
        "bytes": 1162.1,
        "cosine": {"rms": 3.54e-4, "max": 1.53e-3},
        "gvendi change": {"all": 1.3e-5, "BBH": -7.4e-5, "GSM8K": 2e-5},
        "lazy": {"same": 1.0, "gvendi change": 0.0},
        "relaxed": {"same": 0.985, "gvendi change": -2e-6},
        "same nearest centroid": 0.9987,
        "adjusted rand": 0.43,
    }
    machine = {name: "m" for name in ("cpu", "threads", "torch", "transformers", "commit", "date")}
    found = {
        "proxy": {"parameters": 134515008},
        "rows": 1000,
        "chosen": 100,
        "clusters": 32,
        "dim": 1024,
        "gvendi": {"all": 40.5, "BBH": 20.0, "GSM8K": 10.0},
        "interval": [39.0, 42.0],
        "stores": {"int8": store},
        "two seeds": 0.41,
        "reaches": {"1.0": 3.5e-4, "0.9": 3.6e-4, "best of each row": 3.3e-4},
        "machine": machine,
        "rates": {"stores": {"int8": {"read": 2345.6, "write": 100.0}}, "machine": machine},
    }
    text = "\n".join(stored_sections(json.loads(json.dumps(found)), table, machine_line))
    assert "| int8 | 1,162 | 3.5e-04 | 1.5e-03 | +0.001 % | -0.007 % | 100.0 % | 0 % | 98.5 % |" in text
    assert "98.5 % | -0.0002 % | 99.87 % | 0.43 |" in text
    assert "| int8 | 2,346 MB/s | 100 MB/s |" in text
