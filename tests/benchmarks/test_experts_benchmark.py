"""The benchmark of mixtures of experts, in small: its figures are there, and what is wrong is not timed."""

import pytest
import torch

from benchmarks.report.__main__ import machine_line, ratio, table
from benchmarks.report.experts import expert_sections
from benchmarks.speed import experts

SMALL = {
    **experts.SETTINGS,
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("name", experts.DTYPES)
def test_figures_of_a_small_model(name, monkeypatch):
    monkeypatch.setattr(experts, "WARM_UP", 0)
    found = experts.measure(name, SMALL, 2, 8, rounds=2)
    assert found["cosine to the definition"] >= experts.LEAST_COSINE[name]
    assert set(found["seconds"]) == {"sketch", "training step", "forward + input gradients"}
    for call in ("training step", "forward + input gradients"):
        ratios = found[f"ratio to {call}"]
        assert 0 < ratios["p20"] <= ratios["p50"] <= ratios["p80"]


def test_a_wrong_sketch_is_not_timed(monkeypatch):
    own = experts.GradientSketcher.sketch

    def other(self, *args):
        sketches = own(self, *args)
        return type(sketches)(torch.flip(sketches.z, [1]), sketches.loss, sketches.tokens)

    monkeypatch.setattr(experts.GradientSketcher, "sketch", other)
    with pytest.raises(SystemExit, match="not timed"):
        experts.measure("fp32", SMALL, 2, 8, rounds=1)


def test_the_table_has_a_line_for_each_format():
    quantiles = {"p20": 0.6, "p50": 0.7, "p80": 0.8}
    each = {"ratio to training step": quantiles, "ratio to forward + input gradients": quantiles}
    names = ("cpu", "threads", "torch", "transformers", "commit", "date")
    found = {
        "machine": dict.fromkeys(names, "here"),
        "settings": {**experts.SETTINGS, "batch": 2, "length": 8},
        "fp32": each,
        "bf16": each,
    }
    line, rows = expert_sections(found, ratio, table, machine_line)
    assert "8 experts of width 1024 of which a token sees 2, 2 x 8 tokens" in line
    assert [row.split(" | ")[1] for row in rows.splitlines()[2:]] == ["0.70 (0.60 to 0.80)"] * 2
    assert expert_sections({}, ratio, table, machine_line) == []
