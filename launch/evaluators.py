"""What a training job measures on held-out data, put together from its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from clt.attribution.evaluation.during_training import HeldOutPrompts, ReplacementEvaluator
from clt.attribution.replacement.replacement_model import require_same_model
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.blocks import StoreBlocks
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.distributed.mesh import Mesh, input_layers
from clt.errors import CLTError, ConfigError, StoreError
from clt.evaluation.store_evaluation import Evaluator, StoreEvaluator
from clt.kernels import ops
from clt.launch.activations import Activations
from clt.records import ActivationBatch
from clt.training.settings import DataSettings, EvaluationSettings, ReplacementSettings, TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare


def open_heldout(config: TrainConfig, activations: Activations) -> ActivationStore | None:
    """Opens the held-out store of a job, if it has one.

    Args:
        config: the job.
        activations: what it trains on.

    Raises:
        StoreError: the store is missing or damaged.
        ConfigError: it is the store that trains.
        CheckpointError: it holds activations of another model.
    """
    settings = config.evaluation
    if settings is None or settings.store is None:
        return None
    store = open_store(settings.store)
    require_same_model(activations.model, store.model)
    if store.id == activations.id:
        raise ConfigError(
            f"evaluation.store={settings.store} holds what the job trains on; capture other prompts into another store"
        )
    return store


def make_evaluators(
    config: TrainConfig,
    activations: Activations,
    heldout: ActivationStore | None,
    architecture: CLTConfig,
    share: LayerShare,
    mesh: Mesh,
) -> tuple[Evaluator, ...]:
    """The evaluators of this rank; all ranks call this together.

    Args:
        config: the job.
        activations: what it trains on.
        heldout: from `open_heldout`.
        architecture: of the transcoder.
        share: of this rank.
        mesh: the processes.

    Raises:
        CLTError: the model or the prompts cannot be read, or do not belong to the activations; the same on all ranks.
    """
    settings, evaluators = config.evaluation, list[Evaluator]()
    if settings is None:
        return ()
    if heldout is not None:
        evaluators.append(_store_evaluator(heldout, settings, config.data, architecture, share, mesh))
    if settings.replacement is not None:
        prompts = None
        with mesh.together(CLTError):
            if mesh.is_first:
                _check_kernels(config, settings.replacement)
                prompts = HeldOutPrompts.load(settings.replacement, activations.model)
        evaluators.append(ReplacementEvaluator(settings.replacement, prompts))
    return tuple(evaluators)


def _store_evaluator(
    store: ActivationStore,
    settings: EvaluationSettings,
    data: DataSettings,
    architecture: CLTConfig,
    share: LayerShare,
    mesh: Mesh,
) -> StoreEvaluator:
    # The tokens that train, but for those at the beginning of sequences: they count in no measure of the project.
    where = TokenFilter(modalities=data.modalities, drop_bos=True, norm_cap=data.norm_cap)
    x_sites = _sites(input_layers(architecture, share), architecture.read_site)
    y_sites = _sites(share.targets, "mlp_out")
    with mesh.together(StoreError):
        if not StoreBlocks(store, x_sites, y_sites, where).rows.any():
            raise StoreError(f"evaluation.store={settings.store}: no token passes the filter ({where}); loosen it")

    def batches() -> Iterable[ActivationBatch]:
        rank, world = mesh.data_rank, mesh.data_size
        return iterate_store(
            store, x_sites, y_sites, settings.batch_tokens, where, settings.tokens, data_rank=rank, data_world=world
        )

    return StoreEvaluator(batches)


def _sites(layers: Sequence[int], site: str) -> list[str]:
    return [f"lm.{layer}.{site}" for layer in layers]


def _check_kernels(config: TrainConfig, settings: ReplacementSettings) -> None:
    """ConfigError unless the kernels that the job names can run where the replacement model does."""
    try:
        ops.use_backend(config.kernels)
        ops.backend_of(torch.empty(0, device=settings.device))
    except RuntimeError as error:
        raise ConfigError(f"evaluation.replacement.device={settings.device}: {error}") from None
