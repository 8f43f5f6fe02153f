"""From a corpus to sketches: the proxy, per-sample gradients, and the parts that are written."""
