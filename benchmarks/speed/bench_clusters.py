"""Time of `assign` and of spherical k-means at K = 1024, and what another order of the rows changes.

    pytest benchmarks/speed/bench_clusters.py --benchmark-columns=min,median,max,rounds --benchmark-group-by=group
    python -m benchmarks.speed.bench_clusters [--rows 8000] [--clusters 80]

Nothing is timed whose result fails its check. The floor of `assign` is the matrix product of the rows with the
centroids, in blocks, with torch's topk; `fit` is compared with as many updates of scikit-learn's KMeans. Run as a
script it prints, for this package and scikit-learn, objective and time of both orders of the rows and the adjusted
Rand index between their labels.
"""

import argparse
import json
import os
import time

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from benchmarks.environment import describe_machine
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.kernels import ops, reference

K = 1024
SIZES = {10: 8192, 100: 8192, 1000: 4096, 10_000: 1024}
BLOCK_SCORES = 1 << 22


def mixture(rows: int, kinds: int) -> torch.Tensor:
    """Unit rows float32 [rows, K] around `kinds` directions, spread like sketches: cosines to them of about 0.6."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(kinds, K, generator=generator)
    x = centres[torch.randint(kinds, (rows,), generator=generator)]
    return torch.nn.functional.normalize(x + 1.3 * torch.randn(rows, K, generator=generator), dim=1)


def note(benchmark, error: float, rows: int) -> None:
    """A number travels with its error, its threads and the rows it covers."""
    benchmark.extra_info.update(error=error, rows=rows, threads=torch.get_num_threads(), cpus=os.cpu_count())


def topk(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The two best labels of float32 products, in blocks: [N, 2]."""
    step = max(64, min(4096, BLOCK_SCORES // len(centroids)))
    return torch.cat([(part @ centroids.T).topk(2).indices for part in rows.split(step)])


@pytest.mark.parametrize("how", ["product", "assign"])
@pytest.mark.parametrize("clusters", SIZES)
def test_assign(benchmark, clusters, how):
    rows, centroids = mixture(SIZES[clusters], 50), mixture(clusters, clusters)
    want = reference.assign(rows[:64], centroids)
    if how == "assign":
        got = ops.assign(rows[:64], centroids)
        assert torch.equal(got[0], want[0])
        error = float((got[1] - want[1]).abs().max())
        assert error < 1e-6
        run = lambda: ops.assign(rows, centroids)  # noqa: E731
    else:
        error = float((topk(rows[:64], centroids)[:, 0] != want[0]).double().mean())
        assert error < 0.05
        run = lambda: topk(rows, centroids)  # noqa: E731
    benchmark.group = f"assign, C = {clusters}"
    note(benchmark, error, len(rows))
    benchmark(run)


@pytest.mark.parametrize("how", ["scikit-learn", "gvendi_fast"])
@pytest.mark.parametrize("clusters", [10, 80])
def test_fit(benchmark, clusters, how):
    """Five updates each, from k-means++."""
    rows = mixture(8000, clusters)
    if how == "gvendi_fast":
        run = lambda: SphericalKMeans(clusters, max_iterations=5, tolerance=0).fit(rows)  # noqa: E731
    else:
        x = rows.numpy()
        run = lambda: KMeans(clusters, n_init=1, max_iter=5, tol=0, random_state=0).fit(x)  # noqa: E731
    benchmark.group = f"fit, C = {clusters}"
    value = run().objective if how == "gvendi_fast" else objective(rows.numpy(), run().labels_)
    assert value > 0.4
    note(benchmark, 1 - value, len(rows))
    benchmark.pedantic(run, rounds=3)


def objective(rows: np.ndarray, label: np.ndarray) -> float:
    """Mean cosine of unit rows to the best centroids of their labels."""
    return sum(float(np.linalg.norm(rows[label == c].sum(axis=0))) for c in np.unique(label)) / len(rows)


def orders(rows: np.ndarray, clusters: int) -> dict[str, dict[str, float]]:
    """{who: objective and seconds of both orders, adjusted Rand index between them}."""
    order = np.random.default_rng(1).permutation(len(rows))

    def ours(x: np.ndarray) -> np.ndarray:
        return SphericalKMeans(clusters).fit(x).assign(x).label.numpy()

    def theirs(x: np.ndarray) -> np.ndarray:
        return KMeans(clusters, n_init=1, random_state=0).fit(x).labels_

    found = {}
    for who, run in (("gvendi_fast", ours), ("scikit-learn", theirs)):
        start = time.perf_counter()
        label = run(rows)
        middle = time.perf_counter()
        permuted = run(rows[order])
        found[who] = {
            "objective": objective(rows, label),
            "objective_permuted": objective(rows[order], permuted),
            "seconds": middle - start,
            "seconds_permuted": time.perf_counter() - middle,
            "adjusted_rand_index": float(adjusted_rand_score(label[order], permuted)),
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--clusters", type=int, default=80)
    given = parser.parse_args()
    # More kinds than clusters, so that there are many ways to part them.
    x = mixture(given.rows, 3 * given.clusters).numpy()
    print(json.dumps({"machine": describe_machine(), **vars(given), **orders(x, given.clusters)}, indent=1))
