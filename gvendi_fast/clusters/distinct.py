"""The clusters of a round: k-means over its rows, without clusters that no row can ever be nearest to."""

from __future__ import annotations

import torch

from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.clusters.seeds import SAME_DIRECTION

# Empty clusters that are compared with all others at a time.
_EMPTY = 1024


def cluster_rows(
    rows: torch.Tensor, clusters: float, seed: int, device: str | torch.device = "cpu"
) -> SphericalKMeans:
    """The clusters of a round that begins with these unit rows [N, K]. clusters: a share of N below 1, or a number.

    There are fewer where the rows have fewer different directions. A second cluster of one direction would stay empty
    for ever, since no candidate is nearest to it; such clusters would fill the smaller half and make all others dense.
    """
    number = cluster_number(clusters, len(rows))
    kmeans = SphericalKMeans(number, seed=seed, device=device).fit(rows)
    while twins := _twins(kmeans):
        number -= twins
        kmeans = SphericalKMeans(number, seed=seed, device=device).fit(rows)
    return kmeans


def cluster_number(clusters: float, rows: int) -> int:
    """How many clusters `accept.clusters`, a share below 1 or a number, means for so many rows; at least one."""
    return max(1, int(clusters * rows) if clusters < 1 else min(int(clusters), rows))


def _twins(kmeans: SphericalKMeans) -> int:
    """How many empty clusters have the direction of a cluster with rows or of an earlier empty one."""
    centroids, taken, twins = kmeans.centroids.cpu(), kmeans.counts != 0, 0
    for part in torch.nonzero(~taken)[:, 0].split(_EMPTY):
        same = centroids[part] @ centroids.T > 1 - SAME_DIRECTION
        for cluster, others in zip(part.tolist(), same, strict=True):
            taken[cluster] = not bool((others & taken).any())
            twins += not taken[cluster]
    return twins
