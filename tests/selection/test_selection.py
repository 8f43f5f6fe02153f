"""Selection against plain greedy by eigenvalues; quotas, given rows, memory, order of rows, and what is refused."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import MatrixPool, as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.kernels import reference
from gvendi_fast.selection import equal_quotas, greedy, select
from gvendi_fast.vendi import VendiState, gvendi

EPS = 0.1


def rows_of(n: int, dim: int, decay: float = 0.6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) * torch.arange(1, dim + 1) ** -decay


def ids_of(n: int) -> list[str]:
    """Ids whose order is not that of the rows."""
    return [f"id{i * 37 % 1009:04d}" for i in range(n)]


def repeated(rows: torch.Tensor) -> torch.Tensor:
    """Some rows twice, some nearly so."""
    rows = rows.clone()
    rows[5], rows[8] = rows[3], -2 * rows[3]
    rows[9:12] = rows[3] + 1e-4 * rows[9:12]
    return rows


def log_determinant(z: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(z @ z.T).clamp_min(0).div(EPS).log1p().sum())


def facility(rows: torch.Tensor):
    z = reference.normalise(rows)
    return lambda chosen: float((z @ chosen.T).amax(1).clamp_min(0).mean())


def chosen_entropy(rows: torch.Tensor, chosen) -> float:
    return reference.entropy_of_set(reference.normalise(rows)[list(chosen)])


POOLS = {
    "n < K": (rows_of(30, 64), 12),
    "n > K": (rows_of(60, 8), 30),
    "repeats": (repeated(rows_of(40, 16)), 30),
    "all rows": (repeated(rows_of(24, 32)), 24),
    "one row": (rows_of(20, 16), 1),
    "orthogonal rows": (torch.eye(16), 10),
    "one direction": (rows_of(1, 16).repeat(12, 1), 5),
}
# The integral behind a gain errs by up to this: rows whose gains are closer may be picked in either order.
GAIN_ERROR = 2e-7


@pytest.mark.parametrize("name", POOLS)
def test_lazy_greedy_picks_what_plain_greedy_picks(name):
    rows, size = POOLS[name]
    ids = ids_of(len(rows))
    found = select(MatrixPool(rows, ids), size, draws=3)
    wanted = reference.plain_greedy(rows, size, reference.entropy_of_set, ids)
    assert found.rows.tolist() == wanted
    assert found.ids == [ids[i] for i in wanted]
    value = chosen_entropy(rows, wanted)
    assert chosen_entropy(rows, found.rows) == pytest.approx(value, abs=1e-6)
    # Rows of float32 have length 1 to 6e-8, and each pick adds its share of that.
    assert found.gain.sum() == pytest.approx(value, abs=1e-6 * size)
    assert found.value == found.gvendi == pytest.approx(math.exp(math.log(size) + value / size), rel=1e-5)
    assert found.n == size == len(found)


@pytest.mark.parametrize(("n", "dim", "decay"), [(90, 12, 0.2), (70, 40, 0.0), (80, 8, 1.5)])
def test_every_pick_is_a_best_one_after_the_picks_before_it(n, dim, decay):
    rows = rows_of(n, dim, decay, seed=4)
    chosen = select(rows, n - 10, draws=0).rows.tolist()
    for i in range(1, len(chosen)):
        left = [row for row in range(n) if row not in chosen[:i]]
        values = {row: chosen_entropy(rows, [*chosen[:i], row]) for row in left}
        assert values[chosen[i]] >= max(values.values()) - GAIN_ERROR


@pytest.mark.parametrize("name", ["n < K", "n > K", "repeats", "orthogonal rows"])
def test_logdet_and_facility_follow_their_definitions(name):
    rows, size = POOLS[name]
    ids = ids_of(len(rows))
    for objective, value in (("logdet", log_determinant), ("facility", facility(rows))):
        found = select(MatrixPool(rows, ids), size, objective, eps=EPS, draws=0)
        wanted = reference.plain_greedy(rows, size, value, ids)
        best = value(reference.normalise(rows)[wanted])
        assert value(reference.normalise(rows)[found.rows]) == pytest.approx(best, abs=1e-6)
        assert found.value == pytest.approx(best, rel=1e-5)
        assert found.gain.sum() == pytest.approx(best, rel=1e-5)
        assert found.random is None


@pytest.mark.parametrize("with_given", [False, True])
def test_quality_is_greedy_on_its_logarithm(with_given):
    rows, given = rows_of(40, 16), rows_of(9, 16, seed=3) if with_given else None
    quality = 0.2 + np.random.default_rng(0).random(40) ** 2
    z = reference.normalise(rows)
    start = z[:0] if given is None else reference.normalise(given)
    chosen, value = [], -math.inf
    for _ in range(15):
        values = {
            i: math.log(quality[[*chosen, i]].mean()) + math.log(gvendi(torch.cat([start, z[[*chosen, i]]])))
            for i in range(40)
            if i not in chosen
        }
        chosen.append(max(values, key=values.get))
        value = values[chosen[-1]]
    found = select(rows, 15, "quality", quality=quality, must_include=given, draws=4)
    assert found.rows.tolist() == chosen
    assert found.value == pytest.approx(math.exp(value), rel=1e-5)
    assert found.gain.sum() == pytest.approx(value, abs=1e-5)
    assert found.value > found.random.value_band[1]


@pytest.mark.parametrize("objective", ["vendi", "logdet", "facility"])
def test_quotas_and_given_rows(objective):
    rows, given, size = rows_of(50, 16), rows_of(7, 16, seed=1), 20
    groups = ["a" if i < 30 else "b" if i < 45 else "c" for i in range(50)]
    quotas = {"a": 4, "b": 12}
    value = {
        "vendi": reference.entropy_of_set,
        "logdet": log_determinant,
        "facility": facility(rows),
    }[objective]

    def allowed(chosen):
        return all(sum(groups[i] == label for i in chosen) <= most for label, most in quotas.items())

    wanted = reference.plain_greedy(rows, size, value, [str(i) for i in range(50)], given, allowed)
    found = select(
        rows,
        size,
        objective,
        groups=groups,
        quotas=quotas,
        must_include=given,
        eps=EPS,
        draws=5,
        represent=50,
    )
    assert allowed(found.rows)
    z = torch.cat([reference.normalise(given), reference.normalise(rows)[found.rows]])
    best = value(torch.cat([reference.normalise(given), reference.normalise(rows)[wanted]]))
    assert value(z) == pytest.approx(best, abs=1e-6)
    assert found.n == size + 7
    assert found.gvendi == pytest.approx(gvendi(z), rel=1e-6)
    assert found.random.value <= found.value * (1 + 1e-6)
    if objective == "vendi":
        state = select(
            rows, size, groups=groups, quotas=quotas, must_include=VendiState(16).update(given), draws=0
        )
        assert state.ids == found.ids


def test_it_beats_random_by_the_margin_that_plain_greedy_reaches():
    rows = rows_of(80, 16, 1.0)
    found = select(rows, 12, draws=20)
    wanted = reference.plain_greedy(rows, 12, reference.entropy_of_set, [str(i).zfill(2) for i in range(80)])
    # The first pick is a tie of all rows, so only the score can be compared, not the rows.
    best = math.exp(math.log(12) + chosen_entropy(rows, wanted) / 12)
    assert found.random.draws == 20
    low, high = found.random.gvendi_band
    assert low < found.random.gvendi < high < found.gvendi
    assert found.gvendi - found.random.gvendi > 0.95 * (best - found.random.gvendi)


@pytest.mark.parametrize("method", ["lazy", "stochastic", "two-round"])
@pytest.mark.parametrize("objective", ["vendi", "facility", "quality"])
def test_the_order_of_the_rows_changes_nothing(method, objective):
    rows = repeated(rows_of(300, 16))
    ids, groups = ids_of(300), [str(i % 3) for i in range(300)]
    quality = np.linspace(1, 2, 300)
    order = np.random.default_rng(1).permutation(300)

    def run(p):
        pool = MatrixPool(rows[p], [ids[i] for i in p], [groups[i] for i in p])
        return select(
            pool,
            24,
            objective,
            method=method,
            quotas={"0": 8, "1": 8, "2": 8},
            quality=quality[p] if objective == "quality" else None,
            represent=100,
            seed=5,
        )

    one, other = run(np.arange(300)), run(order)
    assert one.ids == other.ids
    assert one.random.value == pytest.approx(other.random.value, rel=1e-6)
    assert sorted(groups[ids.index(i)] for i in one.ids) == ["0"] * 8 + ["1"] * 8 + ["2"] * 8


@pytest.mark.parametrize("objective", ["vendi", "logdet", "facility", "quality"])
def test_a_pool_beyond_memory_gives_the_same_rows(objective, monkeypatch):
    rows, given = rows_of(5000, 32), rows_of(3, 32, seed=9)
    options = {"draws": 0, "represent": 200, "must_include": given}
    if objective == "quality":
        options["quality"] = 1 + np.random.default_rng(2).random(5000)
    whole = select(rows, 40, objective, **options)
    assert whole.details["passes"] == 1
    monkeypatch.setattr(greedy, "_capacity", lambda *_: 300)
    passes = select(rows, 40, objective, **options)
    assert passes.ids == whole.ids
    assert 1 < passes.details["passes"] < 40
    parts = select(rows, 40, objective, method="two-round", **options)
    assert parts.details["parts"] == math.ceil(5000 / 300)


def test_the_other_methods_come_near_lazy_greedy():
    rows = rows_of(2000, 32, 0.8)
    lazy = select(rows, 30, draws=10)
    margin = lazy.gvendi - lazy.random.gvendi
    for method in ("stochastic", "two-round"):
        found = select(rows, 30, method=method, seed=1, draws=0)
        assert len(set(found.ids)) == 30
        assert found.gvendi > lazy.random.gvendi + 0.8 * margin
        assert found.ids == select(rows, 30, method=method, seed=1, draws=0).ids
    assert select(rows, 30, method="stochastic", seed=2, draws=0).ids != found.ids


def test_surprisals_average_to_the_entropy_and_clusters_travel():
    rows = rows_of(100, 16)
    found = select(rows, 40, clusters=np.arange(100) // 10, draws=0)
    assert found.surprisal.mean() == pytest.approx(math.log(found.gvendi), abs=1e-5)
    assert (found.surprisal > 0).all()
    assert found.cluster.tolist() == (found.rows // 10).tolist()
    assert select(rows, 3, draws=0).cluster is None


def test_equal_quotas_add_up_to_the_size():
    groups = ["a"] * 50 + ["b"] * 3 + ["c"] * 20 + ["d"] * 20
    assert equal_quotas(groups, 40) == {"a": 13, "b": 3, "c": 12, "d": 12}
    assert equal_quotas(groups, 93) == {"a": 50, "b": 3, "c": 20, "d": 20}
    assert equal_quotas(groups, 2) == {"a": 1, "b": 0, "c": 1, "d": 0}
    for size in range(1, 94):
        assert sum(equal_quotas(groups, size).values()) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 21}, "size is 21; wanted 1 to 20"),
        ({"objective": "best"}, "objective is 'best'; wanted one of vendi"),
        ({"method": "slow"}, "method is 'slow'"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"represent": 0, "objective": "facility"}, "represent is 0"),
        ({"objective": "quality"}, "quality goes with objective"),
        ({"quality": np.ones(20)}, "quality goes with objective"),
        ({"objective": "quality", "quality": np.arange(20)}, "quality of row '0' is 0.0"),
        ({"objective": "quality", "quality": np.ones(3)}, r"quality has shape \(3,\)"),
        ({"quotas": {"a": 3}}, "quotas need groups"),
        ({"quotas": {"a": 3}, "groups": ["a"] * 5}, "groups has 5 labels for 20 rows"),
        ({"quotas": {"a": 3}, "groups": ["a"] * 20}, "quotas allow 3 rows of this pool, but size is 5"),
        ({"quotas": {"b": 3}, "groups": ["a"] * 20}, "quotas names 'b', which no row has"),
        ({"quotas": {"a": -1}, "groups": ["a"] * 20}, "quotas gives 'a' -1"),
        ({"clusters": [1]}, "clusters has 1 entries"),
        ({"memory": 1000}, "memory is 1,000 bytes; this selection needs at least"),
        ({"must_include": np.ones((2, 9))}, "dim 16 and 9"),
        ({"objective": "facility", "must_include": VendiState(16)}, "must_include is a VendiState"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(GvendiError, match=message):
        select(rows_of(20, 16), **{"size": 5, "draws": 0, **options})


def test_given_rows_of_another_spec_are_refused():
    pool = MatrixPool(rows_of(20, 16))
    pool.spec = {"proxy": "this"}
    with pytest.raises(GvendiError, match="different specs"):
        select(pool, 3, must_include=VendiState(16, {"proxy": "that"}))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("matrix", "lazy"), ("matrix", "two-round"), ("run", "stochastic"), ("centred", "relaxed")],
)
def test_threads_select_from_one_pool(kind, method, tmp_path):
    rows = np.random.default_rng(4).standard_normal((90, 16)).astype(np.float32)
    pool = as_pool(rows)
    if kind == "run":
        run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 16}}, {"units_total": 3})
        for unit in range(3):
            here = slice(30 * unit, 30 * unit + 30)
            numbers = {name: np.ones(30) for name in ("tokens", "length", "loss", "gradient_norm")}
            ids = [f"r{i}" for i in range(90)][here]
            part = Part(
                unit, ids=ids, groups=[""] * 30, rows=np.arange(90)[here], sketches=rows[here], **numbers
            )
            run.write_part(part)
        pool = as_pool(run)

    def choose(seed):
        found = select(pool, 6, method=method, seed=seed, center=kind == "centred", draws=2)
        return [*found.ids, *found.gain.tolist(), *found.surprisal.tolist(), found.random.gvendi, found.value]

    alone = [choose(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(choose, range(2))) == alone
