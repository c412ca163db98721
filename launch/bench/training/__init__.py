"""Benchmark of training steps: time, memory and traffic between ranks (`clt bench train`)."""
