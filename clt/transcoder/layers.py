"""Sources and targets of a transcoder's layers, the share that a process owns, and loss weights of targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clt.transcoder.architecture import CLTConfig


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """Share of one rank: encoders of `sources` and all decoders into `targets`, or some columns of these.

    Attributes:
        sources: ascending; may be empty.
        targets: ascending.
        columns: channels of the targets whose decoders, biases and rows of W_skip are owned here; None for all.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    columns: range | None = None

    @classmethod
    def everything(cls, config: CLTConfig) -> LayerShare:
        """The share of a process that owns the whole transcoder."""
        return cls(sources=source_layers(config), targets=target_layers(config))


def sources_of(config: CLTConfig, target: int) -> range:
    """Source layers that write to a target layer."""
    horizon = config.n_targets or config.n_layers
    last = target - config.first_offset
    every = range(max(0, last - horizon + 1), last + 1)
    return every if config.source is None else range(config.source, config.source + (config.source in every))


def targets_of(config: CLTConfig, source: int) -> range:
    """Target layers that a source layer writes to."""
    horizon = config.n_targets or config.n_layers
    first = source + config.first_offset
    return range(first, min(config.n_layers, first + horizon) if config.source in (None, source) else first)


def source_layers(config: CLTConfig) -> tuple[int, ...]:
    """Layers that have an encoder: those with at least one target."""
    return tuple(layer for layer in range(config.n_layers) if targets_of(config, layer))


def target_layers(config: CLTConfig) -> tuple[int, ...]:
    """Layers whose MLP output is reconstructed: those with at least one source."""
    return tuple(layer for layer in range(config.n_layers) if sources_of(config, layer))


def error_weight(config: CLTConfig) -> float:
    """Weight of a reconstruction's squared error in the loss: 1/M for M targets; 1/P for P pairs of independent layers.

    P counts all pairs of the model, so that an independent source learns the same whichever others are trained with it.
    """
    if config.independent is None:
        return 1 / len(target_layers(config))
    every = replace(config, source=None)
    return 1 / sum(len(sources_of(every, target)) for target in target_layers(every))


def target_weight(config: CLTConfig, target: int) -> float:
    """Loss weight of the error of `CrossLayerTranscoder.decode_loss_layer`, a mean over independent sources."""
    return error_weight(config) * (1 if config.independent is None else len(sources_of(config, target)))
