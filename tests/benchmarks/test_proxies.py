"""The study of proxies: its figures against their definitions, and what the docs say of its results."""

import json

import numpy as np
import pytest
import torch
from places import BENCHMARKS
from scipy.stats import spearmanr

from benchmarks.studies.proxies import (
    SOURCES,
    VARIANTS,
    Sketched,
    agreement,
    draw_keys,
    norm_shares,
    over_plain,
    rows_of,
    scores,
    sets_of,
    spearman,
    study,
)
from gvendi_fast import load_proxy
from gvendi_fast.sketching.gradients.layers import Cell
from gvendi_fast.vendi import VendiState, gvendi, unlimited_k

EACH = 24
RESULTS = BENCHMARKS / "results" / "proxies.json"
CELLS = [
    [Cell("embedding and head")],
    *([Cell(kind, half)] for kind in ("attention", "mlp", "norm") for half in ("first half", "last half")),
]


def pool(seed: int, noise: float) -> Sketched:
    """Rows of four sources, of which the later ones span more directions."""
    shared = torch.Generator().manual_seed(0)
    count, dim = len(SOURCES) * EACH, 2048
    base = torch.randn(count, 4, dim, generator=shared)
    mixed = torch.stack([base[i, : 1 + i // EACH].mean(0) + base[i // EACH * EACH, 3] for i in range(count)])
    own = torch.randn(count, len(CELLS), dim, generator=torch.Generator().manual_seed(seed))
    names = [cells[0].name for cells in CELLS]
    return Sketched(mixed[:, None] + noise * own, CELLS, names, {})


def test_scores_and_ranks_are_those_of_their_definitions():
    one = pool(1, 0.5)
    every, dims = np.arange(len(one.by_group)), torch.arange(2048)
    unit = rows_of(one, "all", True, dims, every)
    plain = torch.nn.functional.normalize(one.by_group.double().sum(1))
    wanted = torch.nn.functional.normalize(plain - plain.mean(0))
    assert torch.allclose(unit, wanted)
    alone = rows_of(one, "mlp", False, dims[:1024], every[:50])
    assert torch.allclose(alone, torch.nn.functional.normalize(one.by_group[:50, 3:5, :1024].double().sum(1)))
    keys = draw_keys(6, EACH)
    got = scores(unit, keys, 20)
    for i, row in enumerate(keys):
        subset = np.argsort(-row)[:20]
        assert got[i] == pytest.approx(gvendi(unit[subset]), rel=1e-9)
    a, b = np.random.default_rng(0).random((2, 40)).round(1)
    assert float(spearman(a, b)) == pytest.approx(spearmanr(a, b).statistic)
    assert sum(norm_shares(one).values()) == pytest.approx(1)


def test_sets_are_scored_as_the_package_scores_them():
    one = pool(1, 0.5)
    tasks = ["sorting"] * 8 + ["few rows"] * 5 + [""] * (len(one.by_group) - 13)
    found = sets_of(one, tasks, EACH)
    assert list(found) == [*SOURCES, "BBH: sorting"]
    z = one.by_group.sum(1).double()
    for name, rows in (("GSM8K", z[EACH : 2 * EACH]), ("BBH: sorting", z[:8])):
        assert found[name]["n"] == len(rows)
        assert found[name]["plain"] == pytest.approx(gvendi(rows), rel=1e-6)
        wanted = unlimited_k(VendiState(z.shape[1]).update(rows))
        for field, value in (("unlimited_k", wanted.value), ("low", wanted.low), ("high", wanted.high)):
            assert found[name][field] == pytest.approx(value, rel=1e-6)
    unit = torch.nn.functional.normalize(z)
    assert found["AQuA"]["centred"] == pytest.approx(gvendi((unit - unit.mean(0))[3 * EACH :]), rel=1e-6)


def test_intervals_hold_the_value_and_are_narrower_with_more_mixtures():
    generator = np.random.default_rng(0)
    a = generator.random(400)
    b = a + 0.3 * generator.random(400)
    many, few = agreement(a, b), agreement(a[:40], b[:40])
    for found in (many, few):
        assert found["low"] < found["spearman"] < found["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    nothing = over_plain((a, b), (a, b))
    assert nothing == {"difference": 0.0, "low": 0.0, "high": 0.0}
    worse = over_plain((a, b + generator.random(400)), (a, b))
    assert worse["low"] < worse["difference"] < worse["high"] < 0
    without = [(a[i::2], b[i::2]) for i in range(2)]
    over_rows = agreement(a, b, without)
    assert over_rows["low over rows"] < over_rows["spearman"] < over_rows["high over rows"] < 1


def test_the_study_has_every_variant_and_sees_which_proxies_agree():
    found = study(
        {"a": pool(1, 2.5), "b": pool(2, 2.5), "c": pool(3, 20.0)},
        EACH,
        30,
        20,
        [name for name, _, _ in VARIANTS],
    )
    assert [entry["variant"] for entry in found] == [name for name, _, _ in VARIANTS]
    plain = found[0]["K = 2048"]
    assert plain["a / b"]["spearman"] > 0.9
    assert plain["a / b"]["low"] > plain["a / c"]["spearman"]


def test_what_the_docs_say_is_what_was_found():
    result = json.loads(RESULTS.read_text())
    large = f"K = {result['dims'][-1]}"
    real, toys = "smollm2 / gemma3", ("smollm2 / tiny", "smollm2 / stories260K")
    variants = {entry["variant"]: entry[large] for entry in result["variants"]}
    plain, centred = variants["plain"], variants["centred"]
    # The former tiny ranked data otherwise than real models do, which agree with each other far better.
    assert plain[real]["low"] > 0.9 > 0.7 > plain["smollm2 / tiny"]["high"]
    # None does better than all layers beyond the interval of the difference; the last half centred does worst.
    assert all(entry["over plain"][real]["low"] <= 0 for entry in result["variants"])
    worst = min(variants, key=lambda name: variants[name][real]["spearman"])
    assert worst == "last half of the blocks, centred"
    assert variants[worst][real]["spearman"] > 0.9
    # Centring brings toy models nearer to real ones, and real ones no nearer to each other.
    assert all(centred[pair]["low"] > plain[pair]["spearman"] for pair in toys)
    assert centred[real]["spearman"] <= plain[real]["high"]


def test_what_the_docs_say_of_tiny_is_what_was_found():
    result, choice = (
        json.loads((BENCHMARKS / "results" / name).read_text()) for name in ("tiny.json", "choose_tiny.json")
    )
    plain, centred = (entry[f"K = {result['dims'][-1]}"] for entry in result["variants"])
    for real in ("smollm2", "gemma3"):
        for found in (plain, centred):
            # It ranks data more as real models do than it did, and they agree with each other better still.
            assert found[f"{real} / former"]["high"] < found[f"{real} / tiny"]["low"]
            assert found[f"{real} / tiny"]["high"] < found["smollm2 / gemma3"]["low"]
    # GSM8K was called the most diverse of all by the model that had learnt it by heart.
    gsm8k = {name: sets["GSM8K"]["plain"] for name, sets in result["sets"].items()}
    assert gsm8k["former"] > 2 * max(gsm8k["smollm2"], gsm8k["gemma3"], gsm8k["tiny"])
    # The rule chose the one of the package, among others that it was not better than by construction.
    means = {name: found["mean"] for name, found in choice["candidates"].items()}
    assert choice["chosen"] == max(means, key=means.get)
    assert choice["candidates"][choice["chosen"]]["about"]["revision"] == load_proxy("tiny").revision
    assert result["proxies"]["tiny"]["revision"] == load_proxy("tiny").revision
