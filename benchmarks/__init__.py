"""Comparisons with other projects' algorithms and kernels, and the tuner of the kernels; in a checkout, not the wheel.

`clt bench baselines` and `clt bench kernels --eleuther/--openai` load them through `clt.launch.bench.checkout`. The
Markdown and JSON files beside them are committed runs of all benchmarks.
"""
