"""Times on this machine, as ratios of runs that take turns: `python -m benchmarks.speed`."""
