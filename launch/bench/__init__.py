"""Benchmarks: the tables of benchmarks/ are what these modules print."""
