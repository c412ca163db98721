"""Transcoders in the formats of other projects, one module per format; what survives is in docs/formats.md."""

from typing import Literal

#: What `clt convert` reads and writes; native is `CrossLayerTranscoder.save_pretrained`.
Format = Literal["native", "circuit_tracer", "sparsify", "crosslayer_coding", "kokosdev"]

#: How sources that were trained independently are combined, as `clt.independent` names it.
Combination = Literal["sum", "mean", "nearest"]
