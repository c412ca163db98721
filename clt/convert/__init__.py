"""Conversion of transcoders between the formats of several projects, one module per format; see docs/formats.md."""

from typing import Literal

#: Formats that `clt convert` reads and writes; native is that of `save_pretrained`, kokosdev the former name of
#: vlm_clt_training.
Format = Literal["native", "circuit_tracer", "sparsify", "crosslayer_coding", "vlm_clt_training", "kokosdev"]

#: How sources that were trained independently are combined, as `clt.independent` names it.
Combination = Literal["sum", "mean", "nearest"]
