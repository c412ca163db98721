"""Benchmark of writing, reading and delivering activations (`clt bench store`)."""
