"""Timing, machine description and tables that all benchmarks share."""
