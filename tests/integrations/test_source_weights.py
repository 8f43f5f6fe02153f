"""Weights of sources that follow their diversity, and the sampler that draws by them."""

import math
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.mixture import mixture_weights
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.source_weights import SourceSampler, SourceWeights
from gvendi_fast.vendi.state import VendiState

K = 24
NAMES = ["a", "b", "again"]


def drawn(n: int, seed: int, width: int = 12, first: int = 0) -> torch.Tensor:
    """Rows of their own coordinates, first to first + width."""
    z = torch.zeros(n, K)
    z[:, first : first + width] = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return z


def fed(**arguments) -> SourceWeights:
    """Two sources of twelve directions each, and one that repeats a row of the first."""
    weights = SourceWeights(NAMES, **arguments)
    weights.update(drawn(200, 1), ["a"] * 200)
    weights.update(drawn(90, 2, first=12), torch.ones(90, dtype=torch.int64))
    weights.update(drawn(1, 1).repeat(60, 1), np.full(60, 2))
    return weights


def test_a_source_that_repeats_itself_falls_to_its_floor():
    weights = fed(every=2, smoothing=0.0, floor=0.05)
    assert not weights.step()
    assert weights.weights == dict.fromkeys(NAMES, 1 / 3)
    assert weights.step()
    found = weights.weights
    assert found["again"] == pytest.approx(0.05, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    # One number of rows for all: the last 60 of each.
    states = {"a": drawn(200, 1)[-60:], "b": drawn(90, 2, first=12)[-60:], "again": drawn(1, 1).repeat(60, 1)}
    wanted = mixture_weights(
        {k: VendiState(K).update(z) for k, z in states.items()}, floor=0.05, tolerance=1e-3
    )
    assert found == pytest.approx(wanted.weights, abs=1e-9)
    assert math.exp(weights.mixture.entropy) > 15


def test_smoothing_and_cap():
    start = {"a": 4, "b": 3, "again": 3}
    best = np.array(list(fed(smoothing=0.0, cap=0.4).recompute().values()))
    slow = np.array(list(fed(smoothing=0.75, cap=0.4, start=start).recompute().values()))
    assert best.max() <= 0.4 + 1e-9
    np.testing.assert_allclose(slow, 0.75 * np.array([0.4, 0.3, 0.3]) + 0.25 * best, atol=1e-9)


def test_a_source_of_which_little_is_known_keeps_its_weight():
    weights = SourceWeights([*NAMES, "new"], smoothing=0.0, start={"a": 1, "b": 1, "again": 1, "new": 2})
    weights.update(drawn(40, 1), ["a"] * 40)
    weights.update(drawn(1, 1).repeat(40, 1), ["again"] * 40)
    weights.update(drawn(5, 3), ["new"] * 5)
    found = weights.recompute()
    assert found["new"] == pytest.approx(0.4)
    assert found["b"] == pytest.approx(0.2)
    assert found["a"] + found["again"] == pytest.approx(0.4)
    assert found["again"] == pytest.approx(0.025, abs=1e-4)
    # One source alone cannot be compared.
    alone = SourceWeights(NAMES)
    alone.update(drawn(40, 1), ["a"] * 40)
    assert alone.recompute() == dict.fromkeys(NAMES, 1 / 3)


def test_second_moments_of_a_meter_in_place_of_the_own_ones():
    states = {
        "a": VendiState(K).update(drawn(50, 1)),
        "again": VendiState(K).update(drawn(1, 1).repeat(50, 1)),
    }
    states["b"] = VendiState(K)
    found = SourceWeights(NAMES, smoothing=0.0).recompute(states)
    assert found["b"] == pytest.approx(1 / 3)
    assert found["a"] > 0.6
    with pytest.raises(GvendiError, match="source holds 'c'; wanted one of"):
        SourceWeights(NAMES).recompute({"c": states["a"]})


def test_tags_travel_with_the_sketches_and_bad_samples_are_counted():
    weights = SourceWeights(NAMES)
    z = drawn(4, 1)
    z[1], z[2] = 0, math.nan
    weights.step(SimpleNamespace(z=z, tags=torch.tensor([0, 1, 2, 2])))
    assert weights.left_out == 2
    assert weights.steps == 1
    assert {name: len(rows) for name, rows in weights._last.items()} == {"a": 1, "b": 0, "again": 1}


def test_weights_resume():
    weights = fed(every=3)
    weights.step()
    weights.recompute()
    other = SourceWeights(NAMES, every=3)
    other.load_state_dict(pickle.loads(pickle.dumps(weights.state_dict())))
    assert other.weights == weights.weights
    assert other.recompute() == weights.recompute()
    assert [other.step(), other.step()] == [weights.step(), weights.step()] == [False, True]
    with pytest.raises(GvendiError, match=r"state is of the sources \['a', 'b', 'again'\]"):
        SourceWeights(["b", "a", "again"]).load_state_dict(weights.state_dict())


def test_ranks_agree_on_their_mean(tmp_path):
    import torch.distributed as dist

    weights = fed(start={"a": 2, "b": 1, "again": 1})
    with pytest.raises(GvendiError, match="not initialised; call share"):
        weights.share()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weights.share()
    finally:
        dist.destroy_process_group()
    assert weights.weights == {"a": 0.5, "b": 0.25, "again": 0.25}


def source_of_row() -> list[str]:
    return ["a"] * 50 + ["b"] * 30 + ["again"] * 4


def test_batches_hold_the_sources_by_their_weights():
    weights = {"a": 0.5, "b": 0.37, "again": 0.13}
    sampler = SourceSampler(source_of_row(), 8, weights, steps=400)
    counts = [Counter(source_of_row()[i] for i in batch) for batch in sampler]
    for name, weight in weights.items():
        own = np.array([count[name] for count in counts])
        assert set(own) <= {math.floor(8 * weight), math.ceil(8 * weight)}
        # A share of a row is drawn: its standard error over 400 batches is below 0.025.
        assert own.mean() == pytest.approx(8 * weight, abs=0.1)


def test_a_source_is_gone_through_before_a_row_comes_again():
    sampler = SourceSampler(source_of_row(), 8, {"a": 0, "b": 1, "again": 1}, steps=30)
    rows = [i for batch in sampler for i in batch]
    assert min(rows) >= 50
    for name, first, size in (("b", 50, 30), ("again", 80, 4)):
        own = [i for i in rows if source_of_row()[i] == name]
        for turn in range(0, len(own) - size + 1, size):
            # A batch is in random order, so turns are whole up to a batch.
            assert max(Counter(own[: turn + size]).values()) - min(Counter(own[: turn + size]).values()) <= 2
        assert set(own) == set(range(first, first + size))
    assert rows != sorted(rows)


def test_weights_that_change_count_from_the_next_batch_on():
    weights = SourceWeights(NAMES, start={"a": 1, "b": 0, "again": 0}, floor=0.0)
    batches = iter(SourceSampler(source_of_row(), 8, weights))
    assert {source_of_row()[i] for i in next(batches)} == {"a"}
    weights._weights = np.array([0.0, 1.0, 0.0])
    assert {source_of_row()[i] for i in next(batches)} == {"b"}


def test_ranks_and_resuming():
    weights = {"a": 0.5, "b": 0.3, "again": 0.2}
    whole = list(SourceSampler(source_of_row(), 8, weights, seed=3))
    assert len(whole) == 84 // 8
    assert whole != list(SourceSampler(source_of_row(), 8, weights, seed=4))
    ranks = [list(SourceSampler(source_of_row(), 4, weights, seed=3, rank=r, world=2)) for r in range(2)]
    pairs = zip(*ranks, strict=True)
    assert [[(first, second)[i % 2][i // 2] for i in range(8)] for first, second in pairs] == whole
    sampler = SourceSampler(source_of_row(), 8, weights, seed=3)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    other = SourceSampler(source_of_row(), 8, weights, seed=3)
    other.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict())))
    assert list(other) == list(batches) == whole[4:]
    assert list(other) == list(sampler) != whole


def test_numbers_are_names_or_places_and_never_mixed():
    weights = SourceWeights([1, 2])
    assert weights.sources == ("1", "2")
    weights.update(drawn(4, 1), ["1", "1", "2", "2"])
    weights.update(drawn(3, 2), 0)
    weights.update(drawn(2, 3), "2")
    weights.update(drawn(1, 4), [np.int64(0)])
    assert {name: len(rows) for name, rows in weights._last.items()} == {"1": 6, "2": 4}
    for source in ([1, 1, 2, 2], torch.tensor([1, 1, 2, 2]), 1, 2):
        with pytest.raises(GvendiError, match=r"source holds the number .*give names as strings"):
            weights.update(drawn(4, 1), source)
    # Where both readings agree there is nothing to ask.
    same = SourceWeights(range(3), start={0: 1, 1: 1, "2": 2})
    same.update(drawn(2, 1), [1, 2])
    assert same.weights == {"0": 0.25, "1": 0.25, "2": 0.5}
    assert set(same._last) == {"1", "2"}
    assert len(next(iter(SourceSampler([0, 1, 2, 2], 2, same)))) == 2
    assert len(next(iter(SourceSampler(["0", 1, 2, 2], 2, {0: 1, 1: 1, 2: 1})))) == 2


def test_epochs_of_fixed_weights_are_a_function_of_their_number():
    def sampler() -> SourceSampler:
        return SourceSampler(source_of_row(), 8, {"a": 0.5, "b": 0.37, "again": 0.13}, steps=7, seed=5)

    first = sampler()
    epochs = [list(first) for _ in range(3)]
    # All rows of a source before one comes again, over the epochs too.
    rows = [i for epoch in epochs for batch in epoch for i in batch if i < 50]
    assert len(rows) > 50
    assert len(set(rows[:44])) == 44
    # As a trainer resumes: a new sampler, the epoch's number, batches skipped.
    resumed = sampler()
    resumed.set_epoch(1)
    assert list(resumed)[3:] == epochs[1][3:]
    assert list(resumed) == epochs[2]
    resumed.set_epoch(0)
    assert list(resumed) == epochs[0]
    # A state asked for amid an epoch leaves it as it is.
    resumed.set_epoch(1)
    batches = iter(resumed)
    begun = [next(batches) for _ in range(2)]
    state = pickle.loads(pickle.dumps(resumed.state_dict()))
    assert begun + list(batches) == epochs[1]
    other = sampler()
    other.load_state_dict(state)
    assert list(other) == epochs[1][2:]
    assert list(other) == epochs[2]


def test_moving_weights_resume_by_both_states():
    def made() -> tuple[SourceWeights, SourceSampler]:
        weights = SourceWeights(NAMES, every=2, least=2, smoothing=0.0)
        return weights, SourceSampler(source_of_row(), 8, weights, steps=5)

    def trained(weights: SourceWeights, sampler: SourceSampler, steps: int) -> list[list[int]]:
        batches, done = iter(sampler), []
        while len(done) < steps:
            for batch in batches:
                done.append(batch)
                weights.step(drawn(8, 10 + batch[0]), [source_of_row()[i] for i in batch])
                if len(done) == steps:
                    break
            else:
                batches = iter(sampler)
        return done

    wanted = trained(*made(), 12)
    weights, sampler = made()
    begun = trained(weights, sampler, 7)
    states = pickle.loads(pickle.dumps((weights.state_dict(), sampler.state_dict())))
    weights, sampler = made()
    weights.load_state_dict(states[0])
    sampler.load_state_dict(states[1])
    assert begun + trained(weights, sampler, 5) == wanted


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: SourceWeights([]), r"sources is \[\]"),
        (lambda: SourceWeights([1, "1"]), "each once"),
        (lambda: SourceSampler(["1"], 1, {1: 1, "1": 1}), "weights is .* wanted each source once"),
        (lambda: SourceWeights(["a"]).update(drawn(2, 1), 1.5), "source holds 1.5; wanted one of"),
        (lambda: SourceWeights([True]), "sources holds True, a bool"),
        (
            lambda: SourceWeights(["a", "b"], start={"a": 1, "b": 0}, floor=0.2),
            "start gives 'a' 1 of|start gives 'b' 0",
        ),
        (
            lambda: SourceWeights(["a", "b"], start={"a": 3, "b": 1}, cap=0.6),
            "start gives 'a' 0.75 of the sum",
        ),
        (lambda: SourceWeights(["a", "b"]).update(drawn(2, 1), "ab"), "source holds 'ab'; wanted one of"),
        (
            lambda: SourceWeights(["a"]).update(drawn(2, 1), torch.zeros(2, device="meta")),
            "source is on the meta device",
        ),
        (lambda: SourceWeights(["a", "a"]), "each once"),
        (lambda: SourceWeights(NAMES, every=0), "every is 0"),
        (lambda: SourceWeights(NAMES, floor=0.4), r"floor is 0.4 and cap 1.0; 3 sources need"),
        (lambda: SourceWeights(NAMES, smoothing=1.0), "smoothing is 1.0"),
        (lambda: SourceWeights(NAMES, least=300), "least is 300; wanted at most rows, which is 256"),
        (lambda: SourceWeights(NAMES, start={"a": 1}), r"start is \{'a': 1\}"),
        (lambda: SourceWeights(NAMES).update(drawn(3, 1)), "source is None and the sketches carry no tags"),
        (lambda: SourceWeights(NAMES).update(drawn(3, 1), ["a"]), "source has 1 entries for 3 samples"),
        (lambda: SourceWeights(NAMES).update(drawn(1, 1), [3]), "source holds 3; wanted one of"),
        (lambda: fed().update(drawn(1, 1)[:, :8], ["a"]), "sketches have K = 8, and those before 24"),
        (
            lambda: SourceSampler(["a", "b"], 1, {"a": 1}),
            r"weights are of \['a'\], and the rows of \['a', 'b'\]",
        ),
        (lambda: SourceSampler(["a"], 1, {"a": 0}), "not all 0"),
        (lambda: SourceSampler([], 1, {}), "not all 0|source_of_row is empty"),
    ],
    ids=lambda value: "" if callable(value) else "".join(c for c in value if c.isalnum())[:24],
)
def test_arguments_are_refused_by_name(call, said):
    with pytest.raises(GvendiError, match=said):
        call()
