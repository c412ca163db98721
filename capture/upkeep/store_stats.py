"""Statistics of each site and token class from a store's recorded moments, without reading activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.store.moments import Moments
from clt.capture.store.schema import TOKEN_CLASSES

#: All tokens except those at the beginning of a sequence, whose variance would dominate.
ALL_BUT_BOS = "all but bos"


@dataclass(frozen=True, kw_only=True)
class ClassStats:
    """Statistics of a site over the tokens of a class.

    Attributes:
        site: name of the site.
        token_class: one of `TOKEN_CLASSES`, or `ALL_BUT_BOS`.
        tokens: number of tokens.
        mean_norm: mean Euclidean norm.
        rms: root mean square of the centred values over tokens and channels.
        absmax: largest absolute value.
        fvu: squared rounding error of the stored type over squared deviation from the mean, pooled over channels; 0 if
            nothing was rounded, None if all channels are constant.
        fvu_p99: 99th percentile of the same per channel, over channels that are not constant.
    """

    site: str
    token_class: str
    tokens: int
    mean_norm: float
    rms: float
    absmax: float
    fvu: float | None
    fvu_p99: float | None


def store_stats(store: ActivationStore) -> tuple[ClassStats, ...]:
    """Statistics of every site, for each class with tokens and for all tokens except the beginning-of-sequence ones.

    Args:
        store: a complete store.

    Returns:
        Rows, sites in the order of the store.

    Raises:
        StoreError: the statistics are missing or damaged.
    """
    choices = {name: [number] for number, name in enumerate(TOKEN_CLASSES)}
    choices[ALL_BUT_BOS] = [number for number, name in enumerate(TOKEN_CLASSES) if name != "bos"]
    rows = []
    for group in store.spec.groups:
        moments = store.moments(group.name)
        parts = {name: moments.over(classes) for name, classes in choices.items()}
        for number, site in enumerate(group.sites):
            rows += [_row(site, number, name, part) for name, part in parts.items() if int(part.count[0])]
    return tuple(rows)


def _row(site: str, number: int, token_class: str, moments: Moments) -> ClassStats:
    tokens, m2, error = int(moments.count[0]), moments.m2[0, number], moments.error[0, number]
    varies = m2 > 0
    by_channel = (error[varies] / m2[varies]).numpy()
    return ClassStats(
        site=site,
        token_class=token_class,
        tokens=tokens,
        mean_norm=float(moments.norm[0, number]) / tokens,
        rms=float((m2.sum() / (tokens * len(m2))).sqrt()),
        absmax=float(moments.absmax[0, number].max()),
        fvu=float(error.sum() / m2.sum()) if len(by_channel) else None,
        fvu_p99=float(np.quantile(by_channel, 0.99)) if len(by_channel) else None,
    )
