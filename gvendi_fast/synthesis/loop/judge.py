"""Which candidates join the pool: those in sparse regions, or those that raise the entropy.

    cluster:  argmax_c <z, m_c> is among the smaller half of the clusters by count (`clusters.sparse_clusters`)
    gain:     Delta H_1 of z joining the pool's n rows > quantile of the reference's gains
              reference "pool": what each of the n_0 rows at the round's start adds to the others, times
              ln(1 + 1/n) / ln(1 + 1/(n_0 - 1)); ln(1 + 1/n) is what a row adds to n others if all are orthogonal
Both are found for every candidate, whichever decides. Centroids m [C, K] are those of the round's start; counts grow
with every row that is accepted; gains refer to the pool before the block or to one that is smaller by less than the
share `refresh`. Both stay as they are at the start of a round if they are frozen.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.unit_length import cosine_blocks
from gvendi_fast.clusters.distinct import cluster_rows
from gvendi_fast.clusters.kmeans import SphericalKMeans, sparse_clusters
from gvendi_fast.synthesis.config.config import AcceptConfig
from gvendi_fast.synthesis.loop.grown_pool import GrownPool, Round
from gvendi_fast.vendi.state import VendiState

_BLOCK = 65536
# Fewer gains of candidates than this make no quantile.
_LEAST_RECENT = 100


@dataclass(frozen=True)
class Judgement:
    """What the rules say: the cluster and whether it is sparse, the gain and whether it is enough."""

    cluster: int
    sparse: bool
    gain: float
    above: bool

    def accepted(self, rule: str) -> bool:
        return {"cluster": self.sparse, "gain": self.above, "all": True}[rule]

    def to_dict(self) -> dict[str, Any]:
        return {"cluster": self.cluster, "sparse": self.sparse, "gain": self.gain, "above": self.above}


@dataclass(frozen=True)
class _Regions:
    round: int
    kmeans: SphericalKMeans
    labels: torch.Tensor


class Judge:
    """Decides on the candidates of one block after the other. seed: of the clustering; device: where it runs.

    What a round needs is made when it is first asked for, from the rows at its start, so that a resumed run makes it
    for the rounds that are still needed only.
    """

    def __init__(
        self, pool: GrownPool, config: AcceptConfig, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        self.pool, self.config, self.seed, self.device = pool, config, seed, device
        self.recent: deque[float] = deque(maxlen=config.recent)
        self._regions: dict[int, _Regions] = {}
        self._counted = -1
        self._counts = torch.zeros(0)
        self._pool_gain: tuple[int, float] | None = None

    def begin(self, sketches: torch.Tensor, near: bool = True) -> None:
        """Look at the unit sketches [m, K] of a block's candidates; near: `nearest` will be asked for."""
        regions = self._of(self.pool.round)
        self._count(regions)
        self._state = self.pool.round_state if self.config.frozen else self.pool.recent_state
        self._gains = self._state.gain(sketches).numpy()
        self._labels = regions.kmeans.assign(sketches).label.numpy() if len(sketches) else np.zeros(0, int)
        self._threshold = self._gain_wanted()
        self._sketches = sketches
        self._near = nearest(sketches, self.pool.sketches()) if near else []
        self._before = len(self.pool)

    def nearest(self, number: int) -> tuple[float, int]:
        """Cosine and number of the most similar row of the pool, rows accepted from this block included."""
        cosine, row = self._near[number]
        joined = self.pool.sketches()[self._before :]
        if len(joined):
            there, place = (joined @ self._sketches[number]).max(0)
            if float(there) > cosine:
                return float(there), self._before + int(place)
        return cosine, row

    def judge(self, number: int) -> Judgement:
        """What the rules say of candidate `number` of the block now."""
        # Nine digits are as many as the quadrature has.
        cluster, gain = int(self._labels[number]), float(f"{self._gains[number]:.9g}")
        sparse = bool(sparse_clusters(self._counts)[cluster])
        self.recent.append(gain)
        return Judgement(cluster, sparse, gain, gain > self._threshold)

    def joined(self, judgement: Judgement) -> None:
        """The candidate was accepted."""
        if not self.config.frozen:
            self._counts[judgement.cluster] += 1

    @property
    def gvendi(self) -> tuple[float, int]:
        """G-Vendi and number of the rows that the last block's gains refer to, from the eigenbasis made for them."""
        p = self._state.eigenbasis()[0].clamp(min=0).sort(descending=True).values
        # The rank is at most n: what stands behind is rounding.
        p[self._state.n :] = 0
        p /= p.sum()
        return float(torch.exp(-torch.special.xlogy(p, p).sum())), self._state.n

    @property
    def kmeans(self) -> SphericalKMeans:
        """The clusters of the present round."""
        return self._of(self.pool.round).kmeans

    def sparse_rows(self, round_: Round) -> np.ndarray:
        """Whether a row is in a sparse cluster at the start of the round: bool [size]."""
        regions = self._of(round_)
        return sparse_clusters(regions.kmeans.counts)[regions.labels].numpy()

    def forget(self, before: int) -> None:
        """Free what rounds below this number needed."""
        self._regions = {number: found for number, found in self._regions.items() if number >= before}

    def _of(self, round_: Round) -> _Regions:
        if round_.number not in self._regions:
            rows = self.pool.sketches(round_.size)
            kmeans = cluster_rows(rows, self.config.clusters, self.seed, self.device)
            self._regions[round_.number] = _Regions(round_.number, kmeans, kmeans.assign(rows).label)
        return self._regions[round_.number]

    def _count(self, regions: _Regions) -> None:
        """Counts at the start of the round, and of the rows since where they are not frozen."""
        if self._counted == regions.round:
            return
        self._counts, self._counted = regions.kmeans.counts, regions.round
        since = self.pool.sketches()[self.pool.round.size :]
        if len(since) and not self.config.frozen:
            labels = regions.kmeans.assign(since).label
            self._counts += torch.bincount(labels, minlength=len(self._counts))

    def _gain_wanted(self) -> float:
        """The quantile that a gain must exceed."""
        if self.config.reference == "candidates" and len(self.recent) >= _LEAST_RECENT:
            return float(np.quantile(np.array(self.recent), self.config.quantile))
        round_ = self.pool.round
        if self._pool_gain is None or self._pool_gain[0] != round_.number:
            found = own_gains(self.pool.round_state, self.pool.sketches(round_.size))
            self._pool_gain = round_.number, float(np.quantile(found, self.config.quantile))
        # A single row adds 0 whatever the size.
        scale = math.log1p(1 / self._state.n) / math.log1p(1 / (round_.size - 1)) if round_.size > 1 else 1.0
        return scale * self._pool_gain[1]


def own_gains(state: VendiState, rows: torch.Tensor) -> np.ndarray:
    """What each row of a state adds to the others, H_1 - H_1 without it: float64 [n]; a single row adds 0."""
    return state.contributions(rows, "loo").numpy() if state.n > 1 else np.zeros(1)


def nearest(rows: torch.Tensor, pool: torch.Tensor) -> list[tuple[float, int]]:
    """(cosine, number) of the row of pool [N, K] most similar to each of rows [m, K]; both of unit rows."""
    best = torch.full((len(rows),), -2.0)
    place = torch.zeros(len(rows), dtype=torch.int64)
    for first, block in cosine_blocks(rows, pool, _BLOCK):
        cosine, number = block.max(1)
        better = cosine > best
        best, place = torch.where(better, cosine, best), torch.where(better, number + first, place)
    return list(zip(best.tolist(), place.tolist(), strict=True))
