"""Prismatic synthesis: a pool of training data grown where it is sparse, with candidates that a generator writes."""
