"""Prismatic synthesis: growing a pool of training data where its gradients are sparse."""
