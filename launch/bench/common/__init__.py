"""Shared by all benchmarks: timing, machine description, ceilings, claims and tables."""
