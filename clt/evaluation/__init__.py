"""Reconstruction, sparsity and dead features of a transcoder on held-out activations."""
