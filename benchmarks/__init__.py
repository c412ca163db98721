"""Comparisons with other projects' training algorithms and kernels; in a checkout only, not in the wheel.

`clt bench baselines` and `clt bench kernels --eleuther/--openai` load them through `clt.launch.bench.checkout`. The
Markdown and JSON files beside them are committed runs of all benchmarks.
"""
