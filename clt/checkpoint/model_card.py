"""Model card (README.md) of a saved transcoder: architecture, training, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator

from clt.transcoder.model import CrossLayerTranscoder
from clt.version import code_version

MODEL_CARD_FILE = "README.md"

_FRONT_MATTER = """---
library_name: vlm-clt
tags:
- cross-layer-transcoder
- transcoder
- interpretability
---
"""

_USE = """
## Use

```python
from clt.transcoder.model import CrossLayerTranscoder

transcoder = CrossLayerTranscoder.from_pretrained("OWNER/NAME")           # or a folder, or OWNER/NAME@REVISION
part = CrossLayerTranscoder.from_pretrained("OWNER/NAME", layers=[0, 1])  # downloads and loads these layers only
lazy = CrossLayerTranscoder.from_pretrained("OWNER/NAME", lazy=True)      # decoders stay in their files
```
"""


def model_card(transcoder: CrossLayerTranscoder) -> str:
    """Markdown with the hub's front matter; deterministic for a transcoder and code version.

    Args:
        transcoder: its provenance names the model, the store and the training.
    """
    model = transcoder.provenance.model
    of = "" if model is None else f" of {model.name}"
    facts = "".join(f"| {name} | {value} |\n" for name, value in _facts(transcoder))
    return (
        f"{_FRONT_MATTER}\n# Cross-layer transcoder{of}\n\n"
        "Sparse features read every source layer and write to the MLP outputs of that and later layers\n"
        '(Ameisen et al. 2025, "Circuit Tracing").\n\n| | |\n|---|---|\n'
        f"{facts}{_USE}"
    )


def _facts(transcoder: CrossLayerTranscoder) -> Iterator[tuple[str, object]]:
    config, provenance = transcoder.config, transcoder.provenance
    if (model := provenance.model) is not None:
        yield "Model", f"{model.name}, revision {model.revision}, {model.architecture}"
        yield "Model fingerprint", model.fingerprint
    yield "Encoders read", config.read_site
    yield "Decoders write", "mlp_out"
    yield "Layers x width", f"{config.n_layers} x {config.d_model}"
    yield "Features per layer", config.n_features
    yield "Targets of a source", f"{config.n_targets or 'all'} layers, from l + {config.first_offset} on"
    yield "Skip connection", "yes" if config.skip else "no"
    if config.feature_offset:
        yield "Feature offsets", "yes"
    if transcoder.has_variants:
        yield "Decoders", f"tied: {config.tied_decoders}, independent: {config.independent}"
    yield "Sparsity", f"{config.sparsity.kind}, k = {config.k}"
    if provenance.store_id is not None:
        yield "Activation store", provenance.store_id
    if (training := provenance.training) is not None:
        yield "Steps", f"{training.steps:,}"
        yield "Tokens", f"{training.tokens:,}"
        measured = "held-out tokens" if training.held_out else "training tokens"
        for name, value in (("FVU", training.fvu), ("L0", training.l0), ("Dead features", training.dead_fraction)):
            if value is not None:
                yield f"{name}, {measured}", f"{value:.4g}"
    yield "Written by", f"vlm-clt {code_version()}"
