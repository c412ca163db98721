"""Conversion of transcoders between the formats of several projects, one module per format; see docs/formats.md."""

from typing import Literal

#: Formats that `clt convert` reads and writes; native is that of `save_pretrained`, kokosdev the former name of
#: vlm_clt_training.
Format = Literal["native", "circuit_tracer", "sparsify", "crosslayer_coding", "vlm_clt_training", "kokosdev"]

#: Combination of sources that were trained independently, as in `clt.independent`.
Combination = Literal["sum", "mean", "nearest"]
