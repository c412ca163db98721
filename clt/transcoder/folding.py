"""The same function in another form: decoders of every pair, and without a scaling."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clt.errors import ConfigError
from clt.transcoder import decoding
from clt.transcoder.lazy_decoder import MappedDecoder, put_mapped
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling


@torch.no_grad()
def untied(clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """As `CrossLayerTranscoder.untied`; decoders that are in their file are read."""
    if clt.config.source is not None:
        raise ConfigError(
            f"clt.source={clt.config.source}: the transcoder has one source layer; join those of all layers first "
            "('clt join')"
        )
    config = replace(clt.config, tied_decoders=None, independent=None)
    free = CrossLayerTranscoder(config, clt.scaling, clt.share, provenance=clt.provenance)
    free.to(next(clt.parameters())).load_state_dict(_common_state(clt), strict=False)
    for layer in clt.share.targets:
        for row, source in enumerate(clt.sources_of(layer)):
            free.W_dec[str(layer)][row] = clt.decoder(source, layer)
        if clt.config.independent is not None:
            free.b_dec[str(layer)].copy_(decoding.combination(clt, layer) @ clt.b_dec[str(layer)])
    return free.requires_grad_(False).train(clt.training)


def _common_state(clt: CrossLayerTranscoder) -> dict[str, Tensor]:
    """Weights and buffers that all forms of decoders have alike."""
    own = ("W_dec.", "W_shared.", "target_scale.") + (("b_dec.",) if clt.config.independent else ())
    return {key: value for key, value in clt.state_dict().items() if not key.startswith(own)}


@torch.no_grad()
def folded(clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """As `CrossLayerTranscoder.folded`; decoders of every pair that are in their file stay there."""
    if clt.has_variants:
        return folded(untied(clt))
    scaling, identity = clt.scaling.to(next(clt.parameters())), Scaling.identity(*clt.scaling.mean_x.shape)
    with torch.device("meta"):
        # All weights are replaced.
        raw = CrossLayerTranscoder(clt.config, identity, clt.share, provenance=clt.provenance)
    for layer in clt.share.sources:
        name = str(layer)
        raw.W_enc[name] = clt.W_enc[name] / scaling.rms_x[layer]
        raw.b_enc[name] = clt.b_enc[name] - raw.W_enc[name] @ scaling.mean_x[layer]
        # Activations stay in standardised units, and so does what selects them.
        if name in clt.log_threshold:
            raw.log_threshold[name] = clt.log_threshold[name].clone()
        for own, old in ((raw.decoder_norm, clt.decoder_norm), (raw.threshold, clt.threshold)):
            if layer in old:
                own[layer] = old[layer].clone()
    for layer in clt.share.targets:
        name, W_SFD, rms_y = str(layer), clt.W_dec[str(layer)], scaling.rms_y[layer]
        if isinstance(W_SFD, MappedDecoder):
            put_mapped(raw.W_dec, name, W_SFD.scaled(rms_y))
        else:
            raw.W_dec[name] = W_SFD * rms_y
        b_D = clt.b_dec[name] * rms_y + scaling.mean_y[layer, clt.columns]
        if clt.config.skip:
            raw.W_skip[name] = clt.W_skip[name] * rms_y / scaling.rms_x[layer]
            b_D = b_D - raw.W_skip[name] @ scaling.mean_x[layer]
        raw.b_dec[name] = b_D
        if clt.config.feature_offset:
            # Of activations, which stay as they are.
            raw.offset[name] = clt.offset[name].clone()
    return raw.requires_grad_(False)
