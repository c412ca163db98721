"""`clt convert`: the tokens of a store on which a conversion is calibrated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clt.capture.models.sites import decoder_sites
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.errors import StoreError
from clt.records import ActivationBatch
from clt.transcoder.architecture import CLTConfig

#: Tokens that are encoded at a time.
BATCH_TOKENS = 4096


def calibration_tokens(path: str, tokens: int, config: CLTConfig) -> Sequence[ActivationBatch]:
    """The first tokens of a store, in memory.

    Args:
        path: of the store.
        tokens: number of tokens, without beginning-of-sequence tokens.
        config: of the transcoder that reads them.

    Returns:
        Raw activations, x and y [n_layers,B,D].

    Raises:
        StoreError: the store cannot be read, or the model has another size.
    """
    store = open_store(path)
    if (store.n_layers, store.d_model) != (config.n_layers, config.d_model):
        raise StoreError(
            f"{path}: the store has {store.n_layers} layers of width {store.d_model}, the transcoder has "
            f"{config.n_layers} of width {config.d_model}; choose a store of the transcoder's model"
        )
    layers = range(config.n_layers)
    x_sites, y_sites = decoder_sites(layers, config.read_site), decoder_sites(layers, "mlp_out")
    where = TokenFilter(drop_bos=True)
    return [
        # The reader reuses its buffers.
        ActivationBatch(
            x=batch.x.clone(), y=batch.y.clone(), tokens=batch.tokens.select(torch.arange(batch.x.shape[1]))
        )
        for batch in iterate_store(store, x_sites, y_sites, BATCH_TOKENS, where, tokens)
    ]
