"""Benchmark of the kernels against PyTorch, other projects and the machine's limits (`clt bench kernels`)."""
