"""Selection by centred rows: against brute force on small pools, beside the plain value, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters import SphericalKMeans
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.kernels import reference
from gvendi_fast.selection import greedy, select
from gvendi_fast.vendi import VendiState, gvendi
from gvendi_fast.vendi.centered import RowMean
from gvendi_fast.vendi.centered_pool import CenteredPool, pool_mean

EPS = 0.1
OBJECTIVES = ["vendi", "logdet", "facility", "quality"]
METHODS = ["lazy", "stochastic", "two-round", "relaxed"]
PAIRS = [(o, m) for o in OBJECTIVES for m in METHODS if m != "relaxed" or o in ("vendi", "quality")]


def rows_of(n: int, dim: int, shared: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Rows with a direction that all share."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -0.6
    common = torch.randn(dim, generator=torch.Generator().manual_seed(99)) * scale
    return torch.randn(n, dim, generator=generator) * scale + shared * common


def ids_of(n: int) -> list[str]:
    return [f"id{i * 37 % 1009:04d}" for i in range(n)]


def centred_by(rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return reference.centred(rows, mean)


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    return reference.normalise(rows).mean(0)


def value_of(objective: str, pool: torch.Tensor, quality: np.ndarray):
    """{chosen numbers, given centred rows} -> the objective's value, from the definitions, in float64."""

    def value(chosen, given=None) -> float:
        own = pool[list(chosen)]
        z = own if given is None else torch.cat([given, own])
        spectrum = torch.linalg.eigvalsh(z @ z.T).clamp_min(0)
        if objective == "logdet":
            return float((spectrum / EPS).log1p().sum())
        if objective == "facility":
            return float((pool @ z.T).amax(1).clamp_min(0).mean())
        score = math.exp(reference.entropy(spectrum / spectrum.sum()))
        return score * quality[list(chosen)].mean() if objective == "quality" else score

    return value


@pytest.mark.parametrize("given", [False, True], ids=["alone", "with given rows"])
@pytest.mark.parametrize(("objective", "method"), PAIRS)
def test_every_choice_of_a_small_pool(objective, method, given):
    """All 210 choices of 4 of 10 centred rows: the value is the definition's, and near the best of them."""
    rows, more, size = rows_of(10, 12), rows_of(3, 12, seed=4) if given else None, 4
    quality, m = 1 + np.random.default_rng(1).random(10), mean_of(rows)
    value = value_of(objective, centred_by(rows, m), quality)
    start = None if more is None else centred_by(more, m)
    every = {chosen: value(chosen, start) for chosen in itertools.combinations(range(10), size)}
    found = select(
        rows,
        size,
        objective,
        method=method,
        must_include=more,
        quality=quality if objective == "quality" else None,
        eps=EPS,
        draws=5,
        center=True,
    )
    chosen = tuple(sorted(found.rows.tolist()))
    assert found.value == pytest.approx(every[chosen], rel=1e-5)
    best, mean = max(every.values()), np.mean(list(every.values()))
    assert found.value <= best * (1 + 1e-5)
    if method != "stochastic":
        assert found.value > mean + 0.8 * (best - mean)
    for name in ("centered_bound", "value_bound"):
        if name in found.details:
            assert found.details[name] >= best * (1 - 1e-6)
    assert ("centered_bound" in found.details) == (method == "relaxed" and objective == "vendi")
    assert "gvendi_bound" not in found.details
    # Both scores of the chosen rows, with the given ones, and of random ones in both spaces.
    z = rows[found.rows] if more is None else torch.cat([more, rows[found.rows]])
    assert found.gvendi == pytest.approx(gvendi(z), rel=1e-5)
    assert found.centered == pytest.approx(gvendi(centred_by(z, m)), rel=1e-5)
    assert found.n == len(z)
    assert found.random.value_band[0] >= min(every.values()) * (1 - 1e-5)
    assert found.random.value_band[1] <= best * (1 + 1e-5)
    assert found.random.gvendi < found.random.centered
    assert found.surprisal.shape == found.gain.shape == (size,)


@pytest.mark.parametrize("objective", ["vendi", "logdet", "facility"])
@pytest.mark.parametrize("own", [True, False], ids=["own mean", "another reference"])
def test_lazy_greedy_picks_what_plain_greedy_picks_among_centred_rows(objective, own):
    rows, ids = rows_of(40, 16), ids_of(40)
    other = rows_of(200, 16, seed=7)
    m = mean_of(rows) if own else mean_of(other)
    pool = centred_by(rows, m)
    value = {
        "vendi": reference.entropy_of_set,
        "logdet": lambda z: float(torch.linalg.eigvalsh(z @ z.T).clamp_min(0).div(EPS).log1p().sum()),
        "facility": lambda z: float((pool @ z.T).amax(1).clamp_min(0).mean()),
    }[objective]
    found = select(
        MatrixPool(rows, ids), 12, objective, eps=EPS, draws=0, center=True if own else pool_mean(other)
    )
    wanted = reference.plain_greedy(pool, 12, value, ids)
    assert found.ids == [ids[i] for i in found.rows]
    assert found.random is None
    if objective == "facility":
        # Two rows that are nearest to each other gain the same: either may come first.
        assert value(pool[found.rows]) == pytest.approx(value(pool[wanted]), abs=1e-6)
    else:
        assert found.rows.tolist() == wanted


@pytest.mark.parametrize(("objective", "method"), PAIRS)
def test_it_is_plain_selection_among_the_centred_rows(objective, method):
    """Quotas, given rows, quality, clusters and ids travel; rows that equal the mean are no candidates."""
    rows, given = rows_of(300, 16), rows_of(5, 16, seed=3)
    # Only a mean of length 1 can equal a row, so the reference is one row here.
    rows[150], given[2] = 3 * rows[0], 0.7 * rows[0]
    mean = RowMean(16).update(rows[:1])
    kept = np.setdiff1d(np.arange(300), [0, 150])
    ids, groups = ids_of(300), [str(i % 3) for i in range(300)]
    quality = np.linspace(1, 2, 300)
    options = {"method": method, "quotas": {"0": 8, "1": 8, "2": 8}, "seed": 5, "eps": EPS, "represent": 100}
    one = select(
        MatrixPool(rows, ids, groups),
        24,
        objective,
        must_include=given,
        quality=quality if objective == "quality" else None,
        clusters=np.arange(300),
        center=mean,
        **options,
    )
    m = mean.vector()
    centred = MatrixPool(centred_by(rows[kept], m).float(), [ids[i] for i in kept], [groups[i] for i in kept])
    other = select(
        centred,
        24,
        objective,
        must_include=centred_by(given[[0, 1, 3, 4]], m),
        quality=quality[kept] if objective == "quality" else None,
        **options,
    )
    assert one.ids == other.ids
    assert one.rows.tolist() == kept[other.rows].tolist() == one.cluster.tolist()
    assert one.value == pytest.approx(other.value, rel=1e-5)
    assert one.random.value == pytest.approx(other.random.value, rel=1e-5)
    assert one.random.centered == pytest.approx(other.random.gvendi, rel=1e-5)
    assert one.gvendi == pytest.approx(gvendi(torch.cat([rows[one.rows], given])), rel=1e-5)
    assert one.details["center"] == {"mean_rows": 1, "left_out": 2, "left_out_given": 1}
    assert one.n == 24 + 5
    assert one.to_dict()["centered"] == one.centered
    assert [sum(groups[i] == g for i in one.rows) for g in "012"] == [8, 8, 8]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_order_of_the_rows_and_memory_change_nothing(objective, monkeypatch):
    rows, ids = rows_of(3000, 16), ids_of(1009) + [f"x{i}" for i in range(1991)]
    order = np.random.default_rng(1).permutation(3000)
    quality = np.linspace(1, 2, 3000)

    def run(p):
        return select(
            MatrixPool(rows[p], [ids[i] for i in p]),
            15,
            objective,
            quality=quality[p] if objective == "quality" else None,
            represent=100,
            draws=3,
            center=True,
        )

    one, other = run(np.arange(3000)), run(order)
    assert one.ids == other.ids
    assert one.random == other.random or one.random.value == pytest.approx(other.random.value, rel=1e-6)
    monkeypatch.setattr(greedy, "_capacity", lambda *_: 200)
    passes = run(np.arange(3000))
    assert passes.ids == one.ids
    assert passes.details["passes"] > 1


def test_without_center_nothing_changes():
    rows = rows_of(60, 16)
    found = select(rows, 10, draws=3)
    assert found.centered is None is found.to_dict()["centered"]
    assert found.random.centered is None is found.random.centered_band
    assert "center" not in found.details


def test_a_centred_pool_reads_the_same_rows_in_blocks_and_by_number():
    rows = rows_of(9000, 8)
    rows[[3, 4096, 8999]] = rows[0].clone()
    pool = CenteredPool(rows, RowMean(8).update(rows[:1]))
    assert (len(pool), pool.left_out, pool.dim) == (8996, 4, 8)
    assert pool.ids == [str(i) for i in range(9000) if i not in (0, 3, 4096, 8999)]
    wanted = centred_by(rows[pool.kept], reference.normalise(rows[:1])[0])
    read = torch.cat([block for _, block in pool.blocks()])
    assert [first for first, _ in pool.blocks()] == [0, 4094, 8189]
    for got in (read, pool.take(np.arange(8996))):
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(pool.take([7, 2, 8995]), read[[7, 2, 8995]])
    assert pool.plain.take([0]).flatten() == pytest.approx(reference.normalise(rows[1:2]).flatten(), abs=1e-6)


def test_clusters_take_a_centred_pool():
    """Rows around two centres beside a long shared direction: plain cosines are near 1, centred ones are not."""
    side = torch.cat([torch.eye(8)[1:2].repeat(30, 1), -torch.eye(8)[1:2].repeat(30, 1)])
    rows = 20 * torch.eye(8)[:1] + side + 0.1 * rows_of(60, 8, 0.0)
    model = SphericalKMeans(2, seed=1).fit(CenteredPool(rows))
    label = model.assign(CenteredPool(rows)).label
    assert (label[:30] == label[0]).all()
    assert (label[30:] == 1 - label[0]).all()
    assert model.objective > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"must_include": VendiState(16)}, "must_include is a VendiState, whose rows cannot be centred"),
        ({"center": "yes"}, "center is a str; wanted True, False or a RowMean"),
        ({"center": RowMean(16)}, r"the mean holds no rows \(n = 0\)"),
        ({"center": RowMean(8).update(torch.ones(1, 8))}, "the mean has dim 8 and the pool dim 16"),
        ({"must_include": np.ones((2, 9))}, "dim 16 and 9|dim 16 and the pool dim 9"),
        ({"size": 21}, "size is 21; wanted 1 to 20"),
        ({"clusters": [1]}, "clusters has 1 entries for 20 rows"),
        ({"objective": "quality", "quality": np.ones(3)}, r"quality has shape \(3,\); wanted \(20,\)"),
        ({"quotas": {"a": 3}, "groups": ["a"] * 5}, "groups has 5 labels for 20 rows"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(GvendiError, match=message):
        select(rows_of(20, 16), **{"size": 5, "draws": 0, "center": True, **options})


def test_a_pool_of_one_direction_and_a_mean_of_another_spec_are_refused():
    rows = rows_of(1, 16).repeat(12, 1)
    with pytest.raises(
        GvendiError, match="wanted at most 0: with center, 12 of the pool's 12 rows equal the mean"
    ):
        select(rows, 3, center=True)
    pool = MatrixPool(rows_of(20, 16))
    pool.spec = {"proxy": "this"}
    with pytest.raises(GvendiError, match=r"(?s)another spec.*the mean has that, the rows have this"):
        select(pool, 3, center=RowMean(16, {"proxy": "that"}).update(rows))
    # A matrix does not say how it was made; a pool that does may be centred by its own mean.
    assert select(pool, 3, center=True, draws=0).n == 3
