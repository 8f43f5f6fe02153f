"""Rows to measure with: made-up families, token ids of real text, and the proxy that is trained on both."""
