"""Benchmarks of the kernels and of the model. `python -m benchmarks --help`; how to read the numbers: README.md."""
