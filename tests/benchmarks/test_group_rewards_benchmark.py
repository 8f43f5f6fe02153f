"""The benchmark of group rewards, in small: its figures are there, and what is wrong is not timed."""

import numpy as np
import pytest
import torch

from benchmarks.report.__main__ import machine_line, table
from benchmarks.report.group_rewards import reward_sections
from benchmarks.speed import group_rewards
from gvendi_fast import group_diversity_rewards

QUANTILES = {"p20": 0.02, "p50": 0.03, "p80": 0.04}


def test_figures_of_a_few_groups():
    found = group_rewards.measure_groups(3, 4, 2, rounds=2, dim=32)
    assert (found["groups"], found["rows"]) == (3, 4)
    assert found["error"] <= group_rewards.MOST_ERROR
    assert set(found["seconds a group"]) == {"group_gains", "definition"}
    ratios = found["definition to group_gains"]
    assert 0 < ratios["p20"] <= ratios["p50"] <= ratios["p80"]


def test_a_wrong_gain_is_not_timed(monkeypatch):
    own = group_rewards.group_gains

    def other(rows, labels):
        return own(rows.flip(0), labels)

    monkeypatch.setattr(group_rewards, "group_gains", other)
    with pytest.raises(SystemExit, match="not timed"):
        group_rewards.measure_groups(3, 4, 2, rounds=1, dim=32)


def test_the_rewards_that_it_compares_with_are_the_definition_s():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 16)))
    wanted = group_rewards.TimedSteps.by_definition(z)
    given = group_diversity_rewards([1] * 5, [0] * 5, z, weight=group_rewards.WEIGHT)
    assert given == pytest.approx(wanted, abs=1e-6)


@pytest.mark.soak
def test_figures_of_two_steps():
    pytest.importorskip("trl", reason="needs trl, whose step is timed")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = group_rewards.measure_steps({**small, "num_key_value_heads": 2}, rounds=2, tokens=4)
    assert found["error"] <= 1e-5
    assert set(found["seconds"]) == {"reward", "rest of the step"}
    assert found["reward to the rest of the step"]["p50"] > 0


def test_the_tables_have_a_line_for_each_policy_and_each_shape():
    names = ("cpu", "threads", "torch", "transformers", "commit", "date")
    step = {
        "parameters": 1200000,
        "proxy parameters": 1200000,
        "proxy dtype": "bfloat16",
        "reward to the rest of the step": QUANTILES,
    }
    group = {
        "groups": 2000,
        "rows": 16,
        "seconds a group": {"group_gains": QUANTILES, "definition": QUANTILES},
        "definition to group_gains": {"p20": 20, "p50": 25, "p80": 31},
    }
    found = {
        "machine": dict.fromkeys(names, "here"),
        "settings": {"group": 16, "tokens": 64, "dim": 1024},
        "steps": {"one": step, "other": step},
        "groups": [group],
    }
    heading, line, steps, _, groups = reward_sections(found, table, machine_line)
    assert heading == "## Group rewards"
    assert "One group of 16 rollouts of 64 tokens" in line
    assert [row.split(" | ")[2] for row in steps.splitlines()[2:]] == ["3.0 % (2.0 to 4.0) |"] * 2
    assert groups.splitlines()[2].endswith("| 25 (20 to 31) |")
    assert reward_sections({}, table, machine_line) == []
