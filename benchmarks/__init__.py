"""Benchmarks of the ops, and the check on a GPU."""
