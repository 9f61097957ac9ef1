"""Benchmarks against every pool that one could use instead: `python -m tests.benchmarks`."""
