"""Spherical k-means: centroids on the unit sphere that the rows' cosines are largest to, out of core and exact.

    label_i = argmax_c <z_i, m_c>,   m_c = s_c / ||s_c||,   s_c = sum of the unit rows z_i [K] with label c
    objective = mean_i <z_i, m_label(i)>
Sums are kept as integers in units of 2^-36, so that they are exact, and draws depend on the rows' numbers: the
result is the same for every order of the rows, every block size and any number of threads, bit for bit.

scikit-learn's KMeans was considered: its centroids leave the sphere, all rows are in memory, and from the same start
its centroids differ in their bits with the order of the rows and with the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.differences import same_spec
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import OneThread, changes, reads
from gvendi_fast.base.tensor_files import LENGTH, load_tensors, save_tensors
from gvendi_fast.base.unit_length import Rows
from gvendi_fast.clusters.seeds import plus_plus
from gvendi_fast.clusters.sums import MAX_ROWS, UNIT, Counted, Keys, Nearest, Tally, Worst
from gvendi_fast.data.passes import over_pool, taken
from gvendi_fast.data.pool import Pool, PoolLike, as_pool

_KIND = "gvendi_fast.spherical_kmeans"
_SETTINGS = ("n_clusters", "seed", "max_iterations", "tolerance", "iterations", "converged")
_LAYOUT = {
    "centroids": (torch.float32, 2),
    "sums": (torch.int64, 2),
    "counts": (torch.int64, 1),
    "cosines": (torch.int64, 0),
}
# Rows that k-means++ draws from: this many for each cluster, and at least the second number.
SEED_ROWS, SEED_LEAST = 8, 4096

AfterPass = Callable[[int, float, int], None]


class Assignment(NamedTuple):
    """Each row's most similar centroid and the runner-up, on the CPU.

    label: int64 [N].
    cosine: float32 [N], to the centroid `label`.
    second: int64 [N], the runner-up; -1 with one cluster.
    second_cosine: float32 [N]; NaN with one cluster.
    """

    label: torch.Tensor
    cosine: torch.Tensor
    second: torch.Tensor
    second_cosine: torch.Tensor


def sparse_clusters(counts: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Which clusters are sparse: bool [C], true for the smallest half by count int64 [C], C / 2 of them rounded down.

    Of equal counts the one with the lower index counts as smaller. A single cluster is sparse, so there always is one
    (the sparse set of arXiv 2505.20161, by rank).
    """
    counts = torch.as_tensor(counts)
    if counts.dim() != 1 or len(counts) == 0 or counts.is_floating_point():
        raise GvendiError(
            f"counts has {counts.dtype} {tuple(counts.shape)}; wanted integers [C], one for each cluster"
        )
    sparse = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    sparse[counts.argsort(stable=True)[: max(1, len(counts) // 2)]] = True
    return sparse


class SphericalKMeans(OneThread):
    """Spherical k-means over a pool of any size.

    n_clusters: C; None takes 1 % of the rows that `fit` sees, at least 1 (arXiv 2505.20161).
    seed: of the draws.
    max_iterations: updates of the centroids at most.
    tolerance: `fit` stops when an update raises the objective by no more than this.
    device: where products run.

    After `fit` or `partial_fit`:
    centroids: float32 [C, K] of length 1.
    counts: int64 [C], rows of each cluster.
    objective: mean cosine of the counted rows to their centroids, each when it was counted; after `fit` all to the
        final ones.
    iterations, converged: how many updates `fit` made, and whether it stopped by the tolerance.
    spec: that of the pool, or None.
    Labels and counts are those of the final centroids.

    Any number of threads may read (`assign`, `counts`, ...) at once. `fit`, `partial_fit` and `update` want it alone: a
    call that meets one of another thread raises GvendiError and changes nothing.
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        seed: int = 0,
        max_iterations: int = 50,
        tolerance: float = 1e-5,
        device: str | torch.device = "cpu",
    ) -> None:
        if n_clusters is not None:
            wanted = "an integer of at least 1, or None for 1 % of the rows"
            n_clusters = whole(n_clusters, "n_clusters", wanted, 1)
        if not tolerance >= 0:
            raise GvendiError(f"tolerance is {tolerance}; wanted a gain in mean cosine of 0 or more")
        self.n_clusters, self.seed = n_clusters, whole(seed, "seed", "an integer")
        self.max_iterations = whole(max_iterations, "max_iterations", "an integer of at least 1", 1)
        self.tolerance = float(tolerance)
        self.device = torch.device(device)
        self.spec: dict | None = None
        self.iterations, self.converged = 0, False
        self._centroids: torch.Tensor | None = None

    @property
    @reads
    def centroids(self) -> torch.Tensor:
        """float32 [C, K], each of length 1."""
        self._check_fitted()
        return self._centroids

    @property
    @reads
    def counts(self) -> torch.Tensor:
        """Rows of each cluster: int64 [C] on the CPU."""
        self._check_fitted()
        return self._tally.counts.to("cpu", copy=True)

    @property
    @reads
    def objective(self) -> float:
        """Mean cosine of the counted rows to their centroids, from -1 to 1; NaN before any row is counted."""
        self._check_fitted()
        return self._tally.mean_cosine()

    @changes
    def fit(
        self, source: PoolLike, progress: AfterPass | None = None, engine: Engine | None = None
    ) -> SphericalKMeans:
        """Cluster a pool: a matrix [N, K], a run directory, its path, or a Pool. Returns self.

        Memory: the centroids and their sums, one part or 4096 rows at a time, 8 bytes a row, and the 8 C or at least
        4096 rows that the seeds are drawn from. `progress(iteration, objective, empty clusters)` is called after each
        pass over the rows. engine: which processes make the passes over a run directory (None: this one); centroids
        are the same to the bit. One pass is for the rows' keys, one for the seeds, and one for each iteration.
        Raises GvendiError for a pool with fewer rows than clusters.
        """
        pool = as_pool(source)
        clusters = max(1, len(pool) // 100) if self.n_clusters is None else self.n_clusters
        if len(pool) < clusters:
            raise GvendiError(
                f"n_clusters is {clusters} and the pool has {len(pool)} rows; wanted at most as many clusters as rows"
            )
        keys = self._keys(pool, engine)
        self._centroids = self._seeds(pool, keys, clusters, engine)
        self.spec, self.converged = pool.spec, False
        before = -np.inf
        for iteration in range(self.max_iterations + 1):
            self._tally, worst = self._pass(pool, keys, engine)
            self.iterations, now = iteration, self._tally.mean_cosine()
            empty = int((self._tally.counts == 0).sum())
            if progress is not None:
                progress(iteration, now, empty)
            reseeds = empty > 0 and worst.number > 0
            self.converged = not reseeds and now - before <= self.tolerance
            if self.converged or iteration == self.max_iterations:
                break
            before = now
            self._centroids = self._tally.directions(self._centroids)
            self._reseed(worst)
        return self

    @changes
    def partial_fit(self, rows: Rows) -> SphericalKMeans:
        """Add a batch of rows [n, K] (mini-batch k-means); the first batch seeds the centroids. Returns self.

        A centroid is the mean direction of all rows assigned to it so far, so that it moves less and less. The order of
        the batches matters, that of the rows in a batch does not. Raises GvendiError for a first batch of fewer than
        n_clusters rows.
        """
        pool = as_pool(rows)
        keys = self._keys(pool)
        if self._centroids is None:
            if self.n_clusters is None or len(pool) < self.n_clusters:
                raise GvendiError(
                    f"the first batch has {len(pool)} rows and n_clusters is {self.n_clusters}; partial_fit wants a "
                    "number of clusters and at least as many rows in its first batch"
                )
            self._centroids = self._seeds(pool, keys, self.n_clusters)
            self._tally, self.spec = Tally(self._centroids), pool.spec
        self._check_pool(pool)
        new, worst = self._pass(pool, keys)
        self._move(new)
        self._reseed(worst)
        return self

    @changes
    def update(self, rows: Rows) -> Assignment:
        """Count newly accepted rows [n, K] to their clusters and move those centroids; counts and sums go on.

        Returns the rows' assignment to the centroids as they were before. A centroid becomes the direction of the sum
        of all its rows: those of `fit` and those since.
        """
        self._check_fitted()
        pool = as_pool(rows)
        assignment, new = self.assign(pool), Tally(self._centroids)
        for first, block in pool.blocks():
            part = slice(first, first + len(block))
            new.add(*(x.to(self.device) for x in (block, assignment.label[part], assignment.cosine[part])))
        self._move(new)
        return assignment

    @reads
    def assign(self, source: PoolLike, engine: Engine | None = None) -> Assignment:
        """Each row's nearest centroid and the runner-up, with their cosines; `source` and `engine` as in `fit`.

        A row's labels do not depend on the other rows. A pool of another spec than the fitted one raises GvendiError.
        """
        self._check_fitted()
        pool = as_pool(source)
        self._check_pool(pool)
        kinds = (torch.int64, torch.float32) * 2
        whole = Assignment(*(torch.empty(len(pool), dtype=kind) for kind in kinds))
        begin, first = partial(Nearest, self._centroids), 0
        for columns in over_pool(engine, pool, begin):
            rows = len(columns[0])
            for column, values in zip(whole, columns, strict=True):
                column[first : first + rows] = torch.from_numpy(values)
            first += rows
        return whole

    @reads
    def save(self, path: str | os.PathLike) -> None:
        """Write centroids, sums and counts to one safetensors file, whole or not at all."""
        self._check_fitted()
        settings = {name: getattr(self, name) for name in _SETTINGS}
        words = {"spec": self.spec, "settings": settings}
        save_tensors(path, _KIND, {"centroids": self._centroids, **self._tally.tensors()}, words)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> SphericalKMeans:
        """Read what `save` wrote, ready to go on. Another kind of file, version or content raises GvendiError."""
        names = ("spec", "settings")
        tensors, words = load_tensors(path, _KIND, "SphericalKMeans.save", _LAYOUT, names, _fault)
        settings = words["settings"]
        state = cls(**{name: settings[name] for name in _SETTINGS[:4]}, device=device)
        state.spec, state.iterations = words["spec"], settings["iterations"]
        state.converged, state._centroids = settings["converged"], tensors["centroids"].to(device)
        state._tally = Tally(state._centroids)
        state._tally.sums, state._tally.counts, state._tally.cosines = (
            tensors[name].to(device) for name in ("sums", "counts", "cosines")
        )
        return state

    def _keys(self, pool: Pool, engine: Engine | None = None) -> np.ndarray:
        found = list(over_pool(engine, pool, partial(Keys, self.seed)))
        return np.concatenate([np.empty(0, np.uint64), *found])

    def _seeds(
        self, pool: Pool, keys: np.ndarray, clusters: int, engine: Engine | None = None
    ) -> torch.Tensor:
        # In the order of the keys, so that the sample and its sums do not depend on the order of the rows.
        sample = np.argsort(keys, kind="stable")[: max(SEED_LEAST, SEED_ROWS * clusters)]
        rows = taken(engine, pool, sample).to(self.device)
        return rows[plus_plus(rows, keys[sample], clusters).to(self.device)].clone()

    def _pass(self, pool: Pool, keys: np.ndarray, engine: Engine | None = None) -> tuple[Tally, Worst]:
        """Assign all rows to centroids: sums and counts, and the rows with the lowest cosines."""
        tally, worst = Tally(self._centroids), Worst()
        for more, lowest in over_pool(engine, pool, partial(Counted, self._centroids), [keys]):
            tally.merge(more)
            worst.merge(lowest)
        return tally, worst

    def _move(self, new: Tally) -> None:
        """Add the new rows' sums; only centroids that got rows move."""
        self._tally.merge(new)
        moved = self._tally.directions(self._centroids)
        self._centroids = torch.where((new.counts > 0)[:, None], moved, self._centroids)

    def _reseed(self, worst: Worst) -> None:
        """Move the centroids of empty clusters to the rows with the lowest cosines."""
        empty = torch.nonzero(self._tally.counts == 0)[: worst.number, 0]
        if len(empty):
            self._centroids[empty] = worst.rows[: len(empty)].to(self.device)

    def _check_fitted(self) -> None:
        if self._centroids is None:
            raise GvendiError("there are no centroids yet; call fit(rows) first")

    def _check_pool(self, pool: Pool) -> None:
        if pool.dim != self._centroids.shape[1]:
            raise GvendiError(
                f"rows have {pool.dim} columns, the centroids {self._centroids.shape[1]}; sketch both with one dim"
            )
        if self.spec is not None and pool.spec is not None and not same_spec(pool.spec, self.spec):
            raise GvendiError(
                f"the pool was sketched with other settings than the centroids; sketch both with one spec\n"
                f"  centroids: {self.spec}\n  pool:      {pool.spec}"
            )


def _fault(
    centroids: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    cosines: torch.Tensor,
    spec: Any,
    settings: Any,
) -> str | None:
    """What no fitted clusters have."""
    if not isinstance(spec, dict | None):
        return f"spec is {spec!r}"
    if not isinstance(settings, dict) or set(settings) != set(_SETTINGS):
        return f"settings is {settings!r}"
    kinds = {"tolerance": (float, int), "converged": (bool,), "n_clusters": (int, type(None))}
    for name, value in settings.items():
        if type(value) not in kinds.get(name, (int,)):
            return f"settings has {name} {value!r}"
    if not len(centroids) or sums.shape != centroids.shape or counts.shape != centroids[:, 0].shape:
        return (
            f"centroids is {tuple(centroids.shape)}, sums {tuple(sums.shape)}, counts {tuple(counts.shape)}"
        )
    # Not finite is not within it either.
    if not ((torch.linalg.vector_norm(centroids.double(), dim=1) - 1).abs() <= LENGTH).all():
        return "a centroid is not of length 1"
    rows = counts.double()
    if counts.min() < 0 or rows.sum() > MAX_ROWS:
        return f"counts are from {int(counts.min()):,} to {int(counts.max()):,}"
    most = rows * (1 + LENGTH)
    longest = torch.linalg.vector_norm(sums.double() * UNIT, dim=1)
    if (longest > most).any() or abs(int(cosines)) * UNIT > most.sum():
        return "no rows of length 1 have these sums"
    return None
