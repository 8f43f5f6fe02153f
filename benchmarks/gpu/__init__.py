"""What sketching costs on a GPU, and whether its kernels are right there: `python -m benchmarks.gpu`."""
