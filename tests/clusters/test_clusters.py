"""Spherical k-means: its objective beside scikit-learn's, any order of the rows, and what a user can run into."""

import gzip
import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters import seeds, sums
from gvendi_fast.clusters.kmeans import SphericalKMeans, sparse_clusters
from gvendi_fast.data.pool import MatrixPool, as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy


def blobs(rows: int, width: int, kinds: int, seed: int = 0, noise: float = 0.5) -> torch.Tensor:
    """Rows around `kinds` random directions, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, width, generator=generator)
    x = centres[torch.randint(kinds, (rows,), generator=generator)]
    x = x + noise * torch.randn(rows, width, generator=generator)
    return x * torch.logspace(-3, 3, rows)[:, None]


def permutation(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def same(a: SphericalKMeans, b: SphericalKMeans) -> bool:
    pairs = ((a.centroids, b.centroids), (a.counts, b.counts), (a._tally.sums, b._tally.sums))
    return all(torch.equal(x, y) for x, y in pairs) and (a.objective, a.iterations) == (
        b.objective,
        b.iterations,
    )


@pytest.fixture(scope="module")
def real_run(shared, tmp_path_factory):
    """70 rows each of grade-school math, natural-language inference and twenty reasoning tasks, sketched."""
    folder = tmp_path_factory.mktemp("real")
    lines = []
    for name in ("gsm8k/test.jsonl", "esnli/dev.jsonl.gz", "bbh_cot/bbh_cot.jsonl.gz"):
        path = shared / name
        # The longest rows would take most of the time.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as stream:
            found = sorted(stream, key=len)[:1300]
        lines += found[:: len(found) // 70][:70]
    (folder / "rows.jsonl").write_text("".join(lines))
    return sketch_corpus(
        folder / "rows.jsonl",
        folder / "run",
        load_proxy("tiny", dtype="float32"),
        Settings(spec=SketchSpec(dim=256), unit_rows=128),
    )


@pytest.mark.parametrize("clusters", [6, 25, 60])
def test_objective_is_that_of_scikit_learn_on_real_sketches(real_run, clusters):
    """Mean over seeds of the mean cosine, one start each, within 1 % of scikit-learn's or better."""
    sklearn = pytest.importorskip("sklearn.cluster", reason="compares with scikit-learn")
    pool = as_pool(real_run)
    rows = torch.cat([block for _, block in pool.blocks()]).numpy().astype(np.float64)
    ours, theirs = [], []
    for seed in range(4):
        model = SphericalKMeans(clusters, seed=seed).fit(pool)
        label = model.assign(pool).label.numpy()
        assert np.bincount(label, minlength=clusters).tolist() == model.counts.tolist()
        ours.append(np.einsum("nk,nk->n", rows, model.centroids.numpy()[label]).mean())
        assert model.objective == pytest.approx(ours[-1], abs=1e-6)
        label = sklearn.KMeans(clusters, n_init=1, random_state=seed).fit(rows).labels_
        # The best centroid of a cluster is the direction of its sum.
        theirs.append(sum(np.linalg.norm(rows[label == c].sum(axis=0)) for c in range(clusters)) / len(rows))
    assert np.mean(ours) >= 0.99 * np.mean(theirs), (ours, theirs)


def test_clusters_of_real_sketches_do_not_depend_on_the_order(real_run):
    pool = as_pool(real_run)
    rows = torch.cat([block for _, block in pool.blocks()])
    order = permutation(len(rows))
    whole, mixed = (SphericalKMeans(20).fit(MatrixPool(x)) for x in (rows, rows[order]))
    assert same(whole, mixed)
    assert torch.equal(whole.assign(rows).label[order], mixed.assign(rows[order]).label)


def test_it_finds_what_was_put_in():
    x = blobs(600, 32, 6, noise=0.1)
    found = SphericalKMeans(6, seed=3).fit(x)
    assert found.converged
    assert found.objective > 0.99
    assert (found.centroids.norm(dim=1) - 1).abs().max() < 1e-6
    z = torch.nn.functional.normalize(x.double(), dim=1)
    label = found.assign(x).label
    for c in range(6):
        direction = torch.nn.functional.normalize(z[label == c].sum(dim=0), dim=0)
        assert float(direction @ found.centroids[c].double()) > 1 - 1e-6


@pytest.mark.parametrize("order", [permutation(5000), torch.arange(4999, -1, -1)], ids=["random", "reversed"])
def test_every_order_blocking_and_thread_count_gives_the_same_bits(order, monkeypatch):
    """More rows than the seeds are drawn from, and clusters that run empty on the way."""
    x = blobs(5000, 24, 9)
    x[:400] = x[0]
    monkeypatch.setattr("gvendi_fast.clusters.kmeans.SEED_LEAST", 300)
    whole = SphericalKMeans(40, seed=5).fit(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr("gvendi_fast.data.pool.POOL_BLOCK", 777)
        mixed = SphericalKMeans(40, seed=5).fit(x[order])
    finally:
        torch.set_num_threads(threads)
    assert same(whole, mixed)
    for a, b in zip(whole.assign(x), mixed.assign(x[order]), strict=True):
        assert torch.equal(a[order], b)


def test_another_seed_is_another_start():
    x = blobs(800, 24, 30, noise=1.0)
    assert not same(SphericalKMeans(20, seed=0).fit(x), SphericalKMeans(20, seed=1).fit(x))


def test_the_objective_never_falls_and_the_last_pass_is_the_result():
    passes = []
    model = SphericalKMeans(15, tolerance=0).fit(
        blobs(700, 24, 40, noise=1.0), progress=lambda *now: passes.append(now)
    )
    assert [number for number, _, _ in passes] == list(range(len(passes)))
    values = [value for _, value, _ in passes]
    assert all(b >= a - 1e-7 for a, b in itertools.pairwise(values))
    assert (model.iterations, model.objective) == passes[-1][:2]


def test_a_bound_on_the_iterations_is_kept():
    x = blobs(700, 24, 40, noise=1.0)
    model = SphericalKMeans(15, max_iterations=1).fit(x)
    assert (model.iterations, model.converged) == (1, False)
    # Counts are those of the final centroids all the same.
    assert torch.equal(model.assign(x).label.bincount(minlength=15), model.counts)


def test_empty_clusters_get_the_rows_that_are_served_worst(monkeypatch):
    """All seeds on one row: only re-seeding can find the other directions."""
    x = torch.eye(8).repeat_interleave(torch.arange(3, 11), dim=0)
    monkeypatch.setattr(
        "gvendi_fast.clusters.kmeans.plus_plus", lambda rows, keys, clusters: torch.zeros(clusters).long()
    )
    model = SphericalKMeans(8).fit(x)
    assert sorted(model.counts.tolist()) == list(range(3, 11))
    assert model.objective == pytest.approx(1, abs=1e-6)


def test_equal_rows_one_cluster_and_a_cluster_for_each_row():
    row = blobs(1, 16, 1)
    equal = SphericalKMeans(3).fit(row.repeat(10, 1))
    assert equal.counts.tolist() == [10, 0, 0]
    assert equal.converged
    assert equal.assign(row).label.tolist() == [0]

    x = blobs(50, 16, 5)
    one = SphericalKMeans(1).fit(x)
    mean = torch.nn.functional.normalize(x.double(), dim=1).sum(dim=0)
    assert torch.allclose(one.centroids[0].double(), mean / mean.norm(), atol=1e-6)
    found = one.assign(x)
    assert (found.second == -1).all()
    assert found.second_cosine.isnan().all()

    alone = SphericalKMeans(50).fit(x)
    assert alone.counts.tolist() == [1] * 50
    assert alone.objective == pytest.approx(1, abs=1e-6)


def test_rows_that_cancel_keep_a_centroid():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    model = SphericalKMeans(1).fit(x)
    assert model.centroids.norm().item() == pytest.approx(1)
    assert model.objective == pytest.approx(0, abs=1e-6)


def test_the_default_is_one_percent_of_the_pool():
    assert len(SphericalKMeans().fit(blobs(399, 8, 4)).counts) == 3
    assert len(SphericalKMeans().fit(blobs(50, 8, 4)).counts) == 1


def test_update_moves_the_centroids_of_new_rows_only():
    x, new = blobs(300, 16, 6), blobs(40, 16, 2, seed=9)
    model = SphericalKMeans(6).fit(x)
    before, counts, label = model.centroids.clone(), model.counts, model.assign(x).label
    expected = model.assign(new)
    assignment = model.update(new)
    assert all(torch.equal(a, b) for a, b in zip(assignment, expected, strict=True))
    assert torch.equal(model.counts, counts + assignment.label.bincount(minlength=6))
    untouched = model.counts == counts
    assert untouched.any()
    assert torch.equal(model.centroids[untouched], before[untouched])
    z = torch.nn.functional.normalize(torch.cat([x, new]).double(), dim=1)
    label = torch.cat([label, assignment.label])
    for c in assignment.label.unique().tolist():
        direction = torch.nn.functional.normalize(z[label == c].sum(dim=0), dim=0)
        assert torch.allclose(model.centroids[c].double(), direction, atol=1e-6)
    # No rows change nothing.
    after = model.centroids
    assert len(model.update(new[:0]).label) == 0
    assert torch.equal(model.centroids, after)


def test_updates_in_any_order_within_a_batch_are_one():
    x, new, order = blobs(300, 16, 6), blobs(60, 16, 5, seed=9), permutation(60)
    a, b = (SphericalKMeans(6).fit(x) for _ in range(2))
    a.update(new)
    b.update(new[order])
    assert same(a, b)


def test_mini_batches_come_near_the_whole():
    x = blobs(4000, 32, 8, noise=0.3)
    x = x[permutation(4000)]
    whole = SphericalKMeans(8).fit(x)
    batches = SphericalKMeans(8)
    for rows in x.split(250):
        assert batches.partial_fit(rows) is batches
    assert int(batches.counts.sum()) == 4000
    mean = float(batches.assign(x).cosine.double().mean())
    assert mean > 0.97 * whole.objective


def test_saved_and_loaded_it_goes_on_with_the_same_bits(tmp_path):
    model = SphericalKMeans(5, seed=2, tolerance=1e-4).fit(blobs(200, 16, 5))
    model.spec = {"sketch": {"dim": 16}}
    model.save(tmp_path / "clusters.safetensors")
    again = SphericalKMeans.load(tmp_path / "clusters.safetensors")
    assert same(model, again)
    assert (again.seed, again.tolerance, again.converged, again.spec) == (
        2,
        1e-4,
        model.converged,
        model.spec,
    )
    new = blobs(30, 16, 3, seed=4)
    model.update(new)
    again.update(new)
    assert same(model, again)
    assert [path.name for path in tmp_path.iterdir()] == ["clusters.safetensors"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(GvendiError, match="is not a safetensors file"):
        SphericalKMeans.load(tmp_path / "text")


def test_wrong_uses_are_refused_with_the_remedy():
    x = blobs(20, 16, 2)
    with pytest.raises(GvendiError, match="n_clusters is 21 and the pool has 20 rows"):
        SphericalKMeans(21).fit(x)
    with pytest.raises(GvendiError, match="n_clusters is 1 and the pool has 0 rows"):
        SphericalKMeans().fit(x[:0])
    for settings in (
        {"n_clusters": 0},
        {"max_iterations": 0},
        {"tolerance": -1.0},
        {"tolerance": float("nan")},
    ):
        with pytest.raises(GvendiError, match=next(iter(settings))):
            SphericalKMeans(**settings)
    with pytest.raises(GvendiError, match="call fit"):
        SphericalKMeans(3).assign(x)
    with pytest.raises(GvendiError, match="first batch has 20 rows"):
        SphericalKMeans(30).partial_fit(x)
    with pytest.raises(GvendiError, match="rows have 8 columns, the centroids 16"):
        SphericalKMeans(3).fit(x).update(x[:, :8])
    x[7] = 0
    with pytest.raises(GvendiError, match="row 7 of rows has norm 0"):
        SphericalKMeans(3).fit(x)


def test_sums_have_a_bound(monkeypatch):
    monkeypatch.setattr(sums, "MAX_ROWS", 30)
    with pytest.raises(GvendiError, match="more than 30 rows"):
        SphericalKMeans(2).fit(blobs(31, 8, 2))


def test_sparse_is_the_smallest_half_and_never_empty():
    assert sparse_clusters(torch.tensor([5, 1, 3, 2])).tolist() == [False, True, False, True]
    assert sparse_clusters(torch.tensor([4, 4, 4, 4, 4])).tolist() == [True, True, False, False, False]
    assert sparse_clusters(np.array([7])).tolist() == [True]
    assert sparse_clusters(torch.tensor([3, 0, 3])).tolist() == [False, True, False]
    with pytest.raises(GvendiError, match="counts"):
        sparse_clusters(torch.tensor([]).long())


def test_keys_are_those_of_the_numbers():
    x = torch.randn(100, 33, generator=torch.Generator().manual_seed(0))
    keys, order = seeds.row_keys(x, 4), permutation(100)
    assert np.array_equal(seeds.row_keys(x[order], 4), keys[order.numpy()])
    assert len(np.unique(keys)) == 100
    assert not np.array_equal(seeds.row_keys(x, 5), keys)
    assert seeds.row_keys(torch.tensor([[0.0, 1.0]]), 0) == seeds.row_keys(torch.tensor([[-0.0, 1.0]]), 0)


def test_draws_are_exponential():
    drawn = seeds.times(np.arange(200_000, dtype=np.uint64), 3)
    assert drawn.min() > 0
    # Mean and standard deviation of 200,000 draws are within 0.003 and 0.006 of 1, at three deviations.
    assert abs(drawn.mean() - 1) < 0.007
    assert abs(drawn.std() - 1) < 0.013


def run_directory(path, rows: torch.Tensor, spec: dict | None = None) -> RunDirectory:
    made = RunDirectory.open(
        path, spec or {"sketch": {"dim": rows.shape[1]}}, {"files": [], "units_total": 2}
    )
    for unit, part in enumerate(rows.split(len(rows) // 2)):
        n = len(part)
        numbers = np.arange(n)
        made.write_part(
            Part(
                unit,
                ids=[f"u{unit}-{i}" for i in numbers],
                groups=[""] * n,
                rows=numbers + unit * n,
                sketches=part.numpy(),
                **{name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")},
            )
        )
    return made


def test_a_run_directory_gives_what_its_matrix_gives(tmp_path):
    x = blobs(120, 16, 4)
    run = run_directory(tmp_path / "run", x)
    stored = SphericalKMeans(4).fit(run)
    assert same(stored, SphericalKMeans(4).fit(x))
    assert stored.spec == run.spec
    other = run_directory(tmp_path / "other", x, {"sketch": {"dim": 16}, "proxy": "another"})
    with pytest.raises(GvendiError, match="other settings"):
        stored.assign(other)


def test_the_command_writes_clusters_by_id(gvendi, tmp_path):
    x = blobs(120, 16, 4)
    run_directory(tmp_path / "run", x)
    out = tmp_path / "made" / "clusters.parquet"
    code, stdout, stderr = gvendi(
        "cluster", tmp_path / "run", "--clusters", 5, "--seed", 3, "--out", out, "--json"
    )
    assert code == 0, stderr
    assert "iteration 0: mean cosine" in stderr
    said = json.loads(stdout)
    model = SphericalKMeans(5, seed=3).fit(x)
    assert said["sizes"] == model.counts.tolist()
    assert (said["n"], said["sparse"], said["mean_cosine"]) == (120, 2, model.objective)
    table = pq.read_table(out).to_pydict()
    found = model.assign(x)
    assert table["id"] == [f"u{unit}-{i}" for unit in (0, 1) for i in range(60)]
    assert table["cluster"] == found.label.tolist()
    assert table["second_cluster"] == found.second.tolist()
    assert table["cosine"] == found.cosine.tolist()
    assert same(SphericalKMeans.load(out.with_suffix(".safetensors")), model)

    before = out.read_bytes()
    code, stdout, stderr = gvendi("cluster", tmp_path / "run", "--out", out)
    assert (code, stdout) == (1, "")
    assert "--force" in stderr
    assert out.read_bytes() == before
    code, stdout, stderr = gvendi("cluster", tmp_path / "run", "--out", out, "--force")
    assert code == 0, stderr
    assert "120 in 1 cluster," in stdout
    assert pq.read_table(out)["second_cluster"].null_count == 120


def test_the_command_refuses_what_it_cannot_do(gvendi, tmp_path):
    x = blobs(20, 16, 4)
    run_directory(tmp_path / "run", x)
    for args, message in (
        ((tmp_path / "none", "--out", tmp_path / "c.parquet"), "is not a run directory"),
        ((tmp_path / "run", "--out", tmp_path / "c.csv"), "ends in .parquet"),
        ((tmp_path / "run", "--out", tmp_path / "c.parquet", "--clusters", 21), "pool has 20 rows"),
    ):
        code, stdout, stderr = gvendi("cluster", *args)
        assert (code, stdout) == (1, "")
        assert message in stderr
    assert not (tmp_path / "c.parquet").exists()


def test_the_command_clusters_centred_rows_and_says_which_it_left_out(gvendi, tmp_path):
    """Two groups to both sides of a long direction that all rows share: plain cosines are near 1."""
    rows = 0.01 * blobs(40, 64, 1, noise=1.0) / blobs(40, 64, 1, noise=1.0).norm(dim=1, keepdim=True)
    rows[:, 0] += 20
    rows[:20, 1] += 1
    rows[20:, 1] -= 1
    run_directory(tmp_path / "run", rows)
    out = tmp_path / "c.parquet"
    options = ("--clusters", 2, "--out", out, "--center")
    code, stdout, stderr = gvendi("cluster", tmp_path / "run", *options, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["left_out"] == 0
    assert json.loads(stdout)["sizes"] == [20, 20]
    label = np.array(pq.read_table(out)["cluster"])
    assert len(set(label[:20])) == len(set(label[20:])) == 1
    assert label[0] != label[20]
    # Centroids of centred rows do not take plain ones.
    model = SphericalKMeans.load(out.with_suffix(".safetensors"))
    with pytest.raises(GvendiError, match="other settings than the centroids"):
        model.assign(RunDirectory.load(tmp_path / "run"))
    code, stdout, _ = gvendi("cluster", tmp_path / "run", *options, "--force")
    assert "less their mean; 0 equal to it left out" in stdout
