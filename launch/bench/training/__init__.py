"""Benchmark of training steps: time, memory and traffic (`clt bench train`)."""
