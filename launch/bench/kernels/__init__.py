"""Benchmark of the kernels against peers and the limits of the machine (`clt bench kernels`)."""
