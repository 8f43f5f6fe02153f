"""Benchmarks and studies, run from the repository's root: `python -m benchmarks.speed`, `.gpu`, `.report`."""
