"""A corpus to sketches: the proxy, per-sample gradients, and the work units that are written."""
