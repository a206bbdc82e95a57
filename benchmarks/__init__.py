"""Monokernel beside what a user would write or pick instead. ``python -m benchmarks --help``."""
