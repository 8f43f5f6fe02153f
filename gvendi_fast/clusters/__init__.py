"""Spherical k-means over sketches: clusters of gradients that point the same way, and which of them are sparse."""

from gvendi_fast.clusters.kmeans import Assignment, SphericalKMeans, sparse_clusters

__all__ = ["Assignment", "SphericalKMeans", "sparse_clusters"]
