"""Benchmarks: ``python -m ires_kernels.bench``. The suites of pytest-benchmark and the peers are in bench/."""
