"""Evaluation during training: the `Evaluator` protocol, its runner, and the evaluator of held-out activations.

Definitions used in the whole project: `fvu` of a layer is the sum of squared errors over the sum of squared deviations
from the mean, pooled over channels; the `fvu` of a modality is the same over its tokens and their own mean; a feature
is `dead` if it is active on none of the held-out tokens. Measures that need a running model are in
`clt.attribution.evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from clt.distributed.code_exchange import CodeExchange
from clt.distributed.job_control import JobControl
from clt.distributed.mesh import Mesh, deal_layers, input_layers
from clt.errors import StoreError
from clt.evaluation.heldout_sums import RATE_EDGES, HeldOutSums
from clt.records import ActivationBatch, Modality
from clt.transcoder.layers import source_layers, target_layers
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.sparsity import Peers


@dataclass(frozen=True, kw_only=True)
class LayerHistograms:
    """One histogram per layer, all over the same bins.

    Attributes:
        quantity: label of the bins' axis.
        edges: edges of the bins, ascending, one more than bins; values beyond them count in the outer bins.
        counts: layer -> entries of each bin.
        outside: layer -> entries without a value, which are in no bin, such as features that never fire.
    """

    quantity: str
    edges: tuple[float, ...]
    counts: Mapping[int, tuple[int, ...]]
    outside: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        scalars: by TensorBoard tag; a number that is not finite means that there was nothing to measure.
        histograms: by TensorBoard tag.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, LayerHistograms] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures a transcoder while it trains."""

    def __call__(self, transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        """Measures the weights as they are, without changing them and without drawing random numbers.

        Args:
            transcoder: this rank's share, in evaluation mode.
            mesh: the processes; all ranks call this together.
            between: called by all ranks together between pieces of work; it may raise to end the evaluation.

        Returns:
            The measures; those of the first rank are reported.

        Raises:
            CLTError: the held-out data cannot be read or do not fit; the same on all ranks.
        """


class _StopRequestedError(Exception):
    """A stop was requested on some rank; raised on all of them."""


def evaluate_all(
    evaluators: Sequence[Evaluator], transcoder: CrossLayerTranscoder, mesh: Mesh, control: JobControl
) -> Evaluation | None:
    """Runs evaluators one after the other in evaluation mode, and restores the transcoder's mode.

    Args:
        evaluators: evaluators to run.
        transcoder: this rank's share.
        mesh: the processes; all ranks call this together.
        control: counts progress; when any rank's requests a stop, the evaluation ends.

    Returns:
        The results of all of them, or None when a stop was requested.
    """

    def between() -> None:
        control.progress += 1
        if int(mesh.all_reduce(torch.tensor(int(control.stop_requested)), "world", dist.ReduceOp.MAX)):
            raise _StopRequestedError

    was_training = transcoder.training
    transcoder.eval()
    try:
        with torch.no_grad():
            found = [evaluator(transcoder, mesh, between) for evaluator in evaluators]
    except _StopRequestedError:
        return None
    finally:
        transcoder.train(was_training)
    return Evaluation(
        scalars={tag: value for part in found for tag, value in part.scalars.items()},
        histograms={tag: histograms for part in found for tag, histograms in part.histograms.items()},
    )


@dataclass(frozen=True, kw_only=True)
class ModalityReport:
    """Measures on the held-out tokens of one modality.

    Attributes:
        num_tokens: tokens of it.
        fvu: fraction of variance unexplained, by target layer; without layers whose outputs do not vary.
        l0: active features per token, by source layer.
    """

    num_tokens: int
    fvu: dict[int, float]
    l0: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """Measures on held-out tokens.

    Attributes:
        num_tokens: tokens evaluated.
        fvu: fraction of variance unexplained, by target layer.
        l0: active features per token, by source layer.
        dead_fraction: share of features never active, by source layer.
        modalities: the modalities that have tokens, by lower-case name.
        density: log10 of the share of tokens on which a feature is active, by source layer.
    """

    num_tokens: int
    fvu: dict[int, float]
    l0: dict[int, float]
    dead_fraction: dict[int, float]
    modalities: dict[str, ModalityReport]
    density: LayerHistograms

    @property
    def mean_fvu(self) -> float:
        """Mean over target layers."""
        return _mean(self.fvu)

    @property
    def mean_l0(self) -> float:
        """Mean over source layers."""
        return _mean(self.l0)

    @property
    def mean_dead_fraction(self) -> float:
        """Mean over source layers."""
        return _mean(self.dead_fraction)

    def evaluation(self) -> Evaluation:
        """The report under the tags `heldout/MEASURE/...` and `heldout/MODALITY/MEASURE/...`."""
        scalars: dict[str, float] = {"heldout/tokens": self.num_tokens}
        groups = [("", "fvu", self.fvu), ("", "l0", self.l0), ("", "dead_fraction", self.dead_fraction)]
        for name, part in self.modalities.items():
            scalars[f"heldout/{name}/tokens"] = part.num_tokens
            groups += [(f"{name}/", "fvu", part.fvu), (f"{name}/", "l0", part.l0)]
        for prefix, measure, layers in groups:
            tag = f"heldout/{prefix}{measure}"
            scalars[f"{tag}/mean"] = _mean(layers)
            scalars |= {f"{tag}/layer_{layer:02d}": value for layer, value in layers.items()}
        return Evaluation(scalars=scalars, histograms={"heldout/density": self.density})


@torch.no_grad()
def evaluate_store(transcoder: CrossLayerTranscoder, batches: Iterable[ActivationBatch]) -> StoreReport:
    """Measures a transcoder on activations.

    Args:
        transcoder: a whole transcoder.
        batches: raw activations of all layers; x [n_layers,B,D] and y [n_layers,B,D].

    Returns:
        The report, from float64 sums.

    Raises:
        StoreError: there are no tokens.
    """
    x_layers, y_layers = list(input_layers(transcoder.config, transcoder.share)), list(transcoder.share.targets)
    sums = HeldOutSums(transcoder.config, next(transcoder.parameters()).device)
    for batch in batches:
        own = ActivationBatch(x=batch.x[x_layers], y=batch.y[y_layers], tokens=batch.tokens)
        sums.add(transcoder, own)
    return _report(transcoder, sums)


class StoreEvaluator:
    """Measures the shares of a transcoder on held-out tokens; exactly `evaluate_store` of the whole.

    Args:
        batches: starts a pass over this rank's held-out tokens, with the layers of a
            `clt.training.trainer.BatchSource`: ranks of a model group get the same tokens, and each token goes to one
            rank of the data axis.
    """

    def __init__(self, batches: Callable[[], Iterable[ActivationBatch]]) -> None:
        self._batches = batches

    def __call__(self, transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None]) -> Evaluation:
        """See `Evaluator`; the results are the same on all ranks."""
        return self.report(transcoder, mesh, between).evaluation()

    @torch.no_grad()
    def report(
        self, transcoder: CrossLayerTranscoder, mesh: Mesh, between: Callable[[], None] = lambda: None
    ) -> StoreReport:
        """Measures all ranks' shares together.

        Args:
            transcoder: this rank's share.
            mesh: the processes; all ranks call this together.
            between: called by all ranks before each batch.

        Returns:
            The report, the same on all ranks.

        Raises:
            StoreError: there are no tokens, or they cannot be read.
        """
        config, device = transcoder.config, next(transcoder.parameters()).device
        exchange = CodeExchange(mesh, deal_layers(config, mesh.layer_size, mesh.column_size))
        sums = HeldOutSums(config, device, counts_tokens=mesh.model_rank == 0)
        for batch in _together(self._batches(), mesh, between):
            sums.add(transcoder, batch, exchange, Peers(mesh=mesh))
        for tensor in sums.tensors():
            mesh.all_reduce(tensor, "world")
        return _report(transcoder, sums)


def _report(transcoder: CrossLayerTranscoder, sums: HeldOutSums) -> StoreReport:
    """The report of the sums over all tokens and layers; StoreError when there are no tokens."""
    sources, targets, everything = source_layers(transcoder.config), target_layers(transcoder.config), list(Modality)
    num_tokens = sums.tokens(everything)
    if num_tokens == 0:
        raise StoreError("no tokens to evaluate; give a store with tokens")
    silent = sums.silent_features(sources)
    return StoreReport(
        num_tokens=num_tokens,
        fvu=dict(zip(targets, sums.fvu(targets, everything), strict=True)),
        l0=dict(zip(sources, sums.l0(sources, everything), strict=True)),
        dead_fraction=dict(zip(sources, [count / transcoder.config.n_features for count in silent], strict=True)),
        modalities={
            modality.name.lower(): ModalityReport(
                num_tokens=sums.tokens([modality]),
                fvu={t: fvu for t, fvu in zip(targets, sums.fvu(targets, [modality]), strict=True) if fvu == fvu},
                l0=dict(zip(sources, sums.l0(sources, [modality]), strict=True)),
            )
            for modality in Modality
            if sums.tokens([modality])
        },
        density=LayerHistograms(
            quantity="log10 of the share of tokens on which a feature fires",
            edges=RATE_EDGES,
            counts=dict(zip(sources, sums.rate_counts(sources), strict=True)),
            outside=dict(zip(sources, silent, strict=True)),
        ),
    )


def _together(batches: Iterable[ActivationBatch], mesh: Mesh, between: Callable[[], None]) -> Iterator[ActivationBatch]:
    """This rank's batches; all ranks fail together and end together, although some have fewer batches."""
    own = iter(batches)
    while True:
        between()
        with mesh.together(StoreError):
            batch = next(own, None)
        if not int(mesh.all_reduce(torch.tensor(int(batch is not None)), "world", dist.ReduceOp.MAX)):
            return
        if batch is not None:
            yield batch


def _mean(layers: Mapping[int, float]) -> float:
    return sum(layers.values()) / len(layers) if layers else math.nan
