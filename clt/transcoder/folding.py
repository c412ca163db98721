"""Transcoders rewritten as the same function with untied decoders, and with the scaling folded into the weights."""

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
def untied(transcoder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """See `CrossLayerTranscoder.untied`; lazily loaded decoders are read into memory."""
    if transcoder.config.source is not None:
        raise ConfigError(
            f"clt.source={transcoder.config.source}: the transcoder has one source layer; join all layers first with "
            "'clt join'"
        )
    config = replace(transcoder.config, tied_decoders=None, independent=None)
    free = CrossLayerTranscoder(config, transcoder.scaling, transcoder.share, provenance=transcoder.provenance)
    free.to(next(transcoder.parameters())).load_state_dict(_common_state(transcoder), strict=False)
    for layer in transcoder.share.targets:
        for row, source in enumerate(transcoder.sources_of(layer)):
            free.decoder_matrix(layer)[row] = transcoder.decoder(source, layer)
        if transcoder.config.independent is not None:
            free.decoder_bias(layer).copy_(decoding.combination(transcoder, layer) @ transcoder.decoder_bias(layer))
    return free.requires_grad_(False).train(transcoder.training)


def _common_state(transcoder: CrossLayerTranscoder) -> dict[str, Tensor]:
    """Weights and buffers that do not depend on the form of the decoders."""
    own = ("W_dec.", "W_shared.", "target_scale.") + (("b_dec.",) if transcoder.config.independent else ())
    return {key: value for key, value in transcoder.state_dict().items() if not key.startswith(own)}


@torch.no_grad()
def folded(transcoder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """See `CrossLayerTranscoder.folded`; lazily loaded free decoders stay in their files."""
    if transcoder.has_variants:
        return folded(untied(transcoder))
    scaling, identity = (
        transcoder.scaling.to(next(transcoder.parameters())),
        Scaling.identity(*transcoder.scaling.mean_x.shape),
    )
    with torch.device("meta"):
        # All weights are replaced below.
        raw = CrossLayerTranscoder(transcoder.config, identity, transcoder.share, provenance=transcoder.provenance)
    for layer in transcoder.share.sources:
        name = str(layer)
        raw.W_enc[name] = transcoder.encoder_matrix(layer) / scaling.rms_x[layer]
        raw.b_enc[name] = transcoder.encoder_bias(layer) - raw.encoder_matrix(layer) @ scaling.mean_x[layer]
        # Activations stay in standardised units, and so do thresholds and norms.
        if transcoder.config.sparsity.kind == "jumprelu":
            raw.log_threshold[name] = transcoder.log_thresholds(layer).clone()
        for own, old in ((raw.decoder_norm, transcoder.decoder_norm), (raw.threshold, transcoder.threshold)):
            if layer in old:
                own[layer] = old[layer].clone()
    for layer in transcoder.share.targets:
        name, W_SFD, rms_y = str(layer), transcoder.decoder_matrix(layer), scaling.rms_y[layer]
        if isinstance(W_SFD, MappedDecoder):
            put_mapped(raw.W_dec, name, W_SFD.scaled(rms_y))
        else:
            raw.W_dec[name] = W_SFD * rms_y
        b_D = transcoder.decoder_bias(layer) * rms_y + scaling.mean_y[layer, transcoder.columns]
        if transcoder.config.skip:
            raw.W_skip[name] = transcoder.skip_matrix(layer) * rms_y / scaling.rms_x[layer]
            b_D = b_D - raw.skip_matrix(layer) @ scaling.mean_x[layer]
        raw.b_dec[name] = b_D
        if transcoder.config.feature_offset:
            # Offsets are added to activations, which do not change.
            raw.offset[name] = transcoder.feature_offsets(layer).clone()
    return raw.requires_grad_(False)
