"""Benchmarks: the runner, and one file per op or model."""
