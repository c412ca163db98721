"""Makes benchmarks/, which is not installed, importable for the tests of the benchmarks."""

from clt.launch.bench.checkout import load_benchmarks

load_benchmarks()
