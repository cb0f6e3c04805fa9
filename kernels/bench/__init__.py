"""Benchmark of the expert computation by back end: ``python -m kernels.bench``."""
