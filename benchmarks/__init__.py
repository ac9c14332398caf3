"""Measurements of the package, each started as `python -m benchmarks.NAME` from the root of the repository."""
