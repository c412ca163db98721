"""`clt convert`: converts transcoders from and to the formats of other projects, calibrated on tokens of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clt.capture.models.sites import decoder_sites
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.convert import Combination, Format
from clt.convert.formats import convert
from clt.errors import StoreError
from clt.records import ActivationBatch
from clt.transcoder.architecture import CLTConfig, ReadSite

#: Tokens that are encoded at a time.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """Arguments of `clt convert`.

    Attributes:
        source: folder of the transcoder.
        target: new or empty folder.
        read_as: format of `source`.
        write_as: format of `target`.
        store: path or URL of the activations to calibrate on, if any.
        tokens: tokens of the store to calibrate on, all held in memory, without beginning-of-sequence tokens.
        read_site: site that the encoders read, if the files do not record it or are wrong.
        k: active features per token, where the files do not record it.
        combine: combination of independently trained sources, if the files do not record it.
    """

    source: Path
    target: Path
    read_as: Format
    write_as: Format
    store: str | None = None
    tokens: int = 100_000
    read_site: ReadSite | None = None
    k: int | None = None
    combine: Combination | None = None


def run(request: ConvertRequest) -> Path:
    """Converts a transcoder; see `clt.convert.formats.convert`."""
    return convert(
        request.source,
        request.target,
        request.read_as,
        request.write_as,
        None
        if request.store is None
        else lambda config: calibration_tokens(request.store or "", config, request.tokens),
        read_site=request.read_site,
        k=request.k,
        combine=request.combine,
    )


def calibration_tokens(path: str, config: CLTConfig, tokens: int) -> Sequence[ActivationBatch]:
    """The first tokens of a store, in memory.

    Args:
        path: of the store.
        config: of the transcoder that reads them.
        tokens: number of tokens, without beginning-of-sequence tokens.

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
