"""Mixture weights of sources: known optima, the certificate, limits, and what is refused."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import torch

from gvendi_fast.analysis.mixture import mixture_entropy, mixture_weights
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.vendi.state import VendiState


def state(rows, **kwargs):
    return VendiState(rows.shape[1], **kwargs).update(rows)


def sources(count, dim=16, rows=30, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for k in range(count):
        mix = rng.standard_normal((rng.integers(1, dim), dim))
        made[f"s{k}"] = state(rng.standard_normal((rows, len(mix))) @ mix)
    return made


def test_orthogonal_sources_weigh_as_their_own_diversity():
    # H = sum w_k (H_k - ln w_k) is largest at w_k ~ exp(H_k).
    one, four = torch.eye(8)[:1].repeat(5, 1), torch.eye(8)[4:]
    found = mixture_weights({"one": state(one), "four": state(four)}, tolerance=1e-9)
    assert found.weights["four"] == pytest.approx(0.8, abs=1e-4)
    assert found.entropy == pytest.approx(math.log(5), abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_optimum_is_that_of_a_general_solver_and_within_the_gap(count):
    made = sources(count)
    found = mixture_weights(made, tolerance=1e-6, max_steps=2000)

    def loss(x):
        w = np.exp(x - x.max())
        return -mixture_entropy(made, dict(zip(sorted(made), w / w.sum(), strict=True)))

    peer = -min(
        scipy.optimize.minimize(loss, start, method="BFGS").fun
        for start in (np.zeros(count), np.random.default_rng(1).standard_normal(count))
    )
    assert found.entropy == pytest.approx(mixture_entropy(made, found.weights), abs=1e-9)
    assert sum(found.weights.values()) == pytest.approx(1)
    assert found.gap <= 1e-6
    assert peer - 1e-6 <= found.entropy + found.gap
    assert found.entropy >= peer - 1e-6


def test_a_stopped_run_still_bounds_the_optimum():
    made = sources(5, seed=3)
    optimum = mixture_weights(made, tolerance=1e-8, max_steps=5000).entropy
    for steps in (0, 1, 3, 10):
        early = mixture_weights(made, tolerance=1e-12, max_steps=steps)
        assert early.entropy <= optimum + 1e-9 <= early.entropy + early.gap + 2e-8


def test_floor_and_cap_hold():
    made = sources(6, seed=1)
    free = mixture_weights(made, tolerance=1e-7)
    held = mixture_weights(made, floor=0.1, cap=0.3, tolerance=1e-7)
    assert min(free.weights.values()) < 0.1
    assert all(0.1 - 1e-9 <= w <= 0.3 + 1e-9 for w in held.weights.values())
    assert held.entropy < free.entropy


def test_the_same_source_twice_adds_nothing():
    made = sources(2, seed=2)
    found = mixture_weights({**made, "again": made["s0"]}, tolerance=1e-8)
    assert found.entropy == pytest.approx(mixture_weights(made, tolerance=1e-8).entropy, abs=1e-7)
    assert mixture_weights({"only": made["s0"]}).weights == {"only": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": {}}, "states is empty"),
        ({"states": {"a": VendiState(4)}}, "'a' holds no rows"),
        ({"states": {"a": state(torch.eye(4)), "b": state(torch.eye(5))}}, "sketched differently"),
        (
            {"states": {"a": state(torch.eye(4)), "b": state(torch.eye(4), spec={"x": 1})}},
            "sketched differently",
        ),
        ({"floor": 0.6}, "floor is 0.6"),
        ({"cap": 0.3}, "cap 0.3"),
        ({"tolerance": 0}, "tolerance is 0"),
    ],
)
def test_what_is_refused(change, message):
    given = {"states": sources(2), **change}
    with pytest.raises(GvendiError, match=message):
        mixture_weights(given.pop("states"), **given)


def run_directory(path, rows, names):
    run = RunDirectory.open(
        path, {"sketch": {"dim": rows.shape[1]}}, {"units_total": 1, "fields": {"by": "source"}}
    )
    n = len(rows)
    numbers = {name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")}
    run.write_part(
        Part(0, ids=[str(i) for i in range(n)], groups=names, rows=np.arange(n), sketches=rows, **numbers)
    )
    return path


def test_the_command_weighs_the_sources_of_a_run(gvendi, tmp_path):
    rows = np.eye(8, dtype=np.float32)[[0, 0, 0, 0, 4, 5, 6, 7]]
    path = run_directory(tmp_path / "run", rows, ["one"] * 4 + ["four"] * 4)
    code, out, err = gvendi("weights", path, "--by", "source", "--tolerance", "1e-7", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["sources"]["four"]["weight"] == pytest.approx(0.8, abs=1e-3)
    assert result["sources"]["four"]["repeats"] == pytest.approx(1.6, abs=2e-3)
    assert result["gvendi"]["best"] == pytest.approx(5, abs=1e-3)
    # Half and half: H = (ln 1 + ln 4) / 2 + ln 2.
    assert result["gvendi"]["as it is"] == pytest.approx(4)
    code, out, err = gvendi("weights", path, "--by", "source")
    assert code == 0, err
    assert out.index("four") < out.index("one ")
    path_of_brackets = run_directory(tmp_path / "brackets", rows, ["[red]one"] * 4 + ["[/four]"] * 4)
    code, out, err = gvendi("weights", path_of_brackets, "--by", "source")
    assert code == 0, err
    assert "[red]one" in out
    assert "[/four]" in out
    assert gvendi("weights", path, "--by", "colour")[2].startswith("error: ")
    code, _, err = gvendi("weights", path, "--by", "source", "--cap", "0.3")
    assert code == 1
    assert "cap 0.3" in err


@pytest.mark.parametrize("steps", [0, 3, 500])
@pytest.mark.parametrize("dim", [3, 16])
def test_the_bound_lies_between_the_best_weights_and_the_trivial_limits(dim, steps):
    """All weights of a grid; no bound exceeds K, the rows of all sources, or the sum of their scores."""
    for limits in ({}, {"floor": 0.1}, {"cap": 0.5}):
        made = sources(3, dim=dim, rows=4, seed=dim)
        made["s2"] = state(torch.eye(dim)[:1].repeat(4, 1))
        found = mixture_weights(made, max_steps=steps, **limits)
        floor, cap = limits.get("floor", 0.0), limits.get("cap", 1.0)
        grid = [
            (i / 20, j / 20, (20 - i - j) / 20)
            for i in range(21)
            for j in range(21 - i)
            if all(floor - 1e-9 <= w / 20 <= cap + 1e-9 for w in (i, j, 20 - i - j))
        ]
        best = max(mixture_entropy(made, dict(zip(sorted(made), weights, strict=True))) for weights in grid)
        bound = math.exp(found.entropy + found.gap)
        assert math.exp(best) <= bound * (1 + 1e-9)
        summed = sum(state.gvendi() for state in made.values())
        # The result itself meets the limits up to rounding.
        assert bound <= min(dim, 4 + 4 + 1, summed) * (1 + 1e-9)
