"""What sketching costs on a GPU, and whether its kernels are right there: `python -m benchmarks.gpu`.

`__main__.py` starts a process for every section, `section.py` runs one. "versions" and "build" are in `build.py`,
"smoke", "checks" and "other checks" in `checks.py`, "end to end" and "cpu and gpu" in `model.py`, "experts" in
`experts.py`, "yardsticks" in `yardsticks.py`, "kernel times" in `kernels.py`, "spectral" in `spectral.py`, "waiting" in
`waiting.py`.
"""
