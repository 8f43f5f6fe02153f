"""From a model and a batch to sketches [B, K] of per-sample loss gradients."""
