"""Transcoder weights on disk, one safetensors file per layer, so that any mesh can read any share.

transcoder.json              format, architecture, model identity, store id, code version
scaling.safetensors          mean_x, rms_x, mean_y, rms_y
layer_00.safetensors ...     W_enc, b_enc (W_shared, target_scale) of source 0; W_dec, b_dec (W_skip, offset) of target
README.md                    model card (`clt.checkpoint.model_card`)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clt.checkpoint.columns import own_columns
from clt.checkpoint.manifest import MANIFEST_FILE, latest_folder, new_folder, read_manifest, verify_file
from clt.checkpoint.model_card import MODEL_CARD_FILE, model_card
from clt.config import config_to_tree, parse_config
from clt.errors import CheckpointError, ConfigError
from clt.records import ModelIdentity, TrainingFacts
from clt.tensor_files import write_tensors
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.initial_weights import LayerBuffers
from clt.transcoder.layers import LayerShare
from clt.transcoder.lazy_decoder import MappedDecoder, put_mapped
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling
from clt.version import code_version

FORMAT = "vlm-clt/1"
CARD_FILE = "transcoder.json"
SCALING_FILE = "scaling.safetensors"
#: Files that `save_transcoder` writes.
OWN_FILES = (CARD_FILE, SCALING_FILE, MODEL_CARD_FILE, "layer_*.safetensors")


def layer_file(layer: int) -> str:
    """Name of the weight file of one layer."""
    return f"layer_{layer:02d}.safetensors"


def average_file(layer: int) -> str:
    """Name of the file with one layer's EMA weights, in checkpoints of jobs with optimizer.ema_decay."""
    return f"average_{layer:02d}.safetensors"


def layer_tensors(transcoder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """Parameters of one layer owned by this process, by name in the file."""
    return {key: group[str(layer)] for key, group in _parameters(transcoder).items() if str(layer) in group}


def layer_buffers(transcoder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """Saved buffers of a source layer, by name in the file."""
    return {key: group[layer] for key, group in _buffers(transcoder).items() if layer in group}


def _parameters(transcoder: CrossLayerTranscoder) -> dict[str, nn.ParameterDict]:
    groups = {
        "W_enc": transcoder.W_enc,
        "b_enc": transcoder.b_enc,
        "W_dec": transcoder.W_dec,
        "b_dec": transcoder.b_dec,
        "W_skip": transcoder.W_skip,
    }
    groups |= {"log_threshold": transcoder.log_threshold, "offset": transcoder.offset}
    return groups | {"W_shared": transcoder.W_shared, "target_scale": transcoder.target_scale}


def _buffers(transcoder: CrossLayerTranscoder) -> dict[str, LayerBuffers]:
    return {"decoder_norm": transcoder.decoder_norm, "threshold": transcoder.threshold}


def save_transcoder(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Writes `transcoder.json`, the scaling and the weights of all layers owned here into a folder, atomically.

    Args:
        transcoder: a transcoder, or a share of whole layers.
        folder: new, empty, or with a transcoder that is replaced when the new one is complete.

    Raises:
        CheckpointError: the folder holds other files or cannot be written; it is left unchanged.
    """
    assert transcoder.share.columns is None, "a column share has no whole layers to write"
    with new_folder(folder, OWN_FILES) as temporary:
        write_tensors(temporary / SCALING_FILE, transcoder.scaling.tensors())
        for layer in range(transcoder.config.n_layers):
            own = layer_tensors(transcoder, layer) | layer_buffers(transcoder, layer)
            read = {key: tensor[:] if isinstance(tensor, MappedDecoder) else tensor for key, tensor in own.items()}
            write_tensors(temporary / layer_file(layer), read)
        (temporary / MODEL_CARD_FILE).write_text(model_card(transcoder), encoding="utf-8")
        (temporary / CARD_FILE).write_text(json.dumps(card(transcoder), indent=1) + "\n", encoding="utf-8")


def card(transcoder: CrossLayerTranscoder) -> dict[str, Any]:
    """Contents of `transcoder.json`."""
    model, training = transcoder.provenance.model, transcoder.provenance.training
    return {
        "format": FORMAT,
        "config": config_to_tree(transcoder.config),
        "model": None if model is None else asdict(model),
        "store": transcoder.provenance.store_id,
        "training": None if training is None else asdict(training),
        "created_by": code_version(),
    }


def transcoder_folder(folder: Path) -> Path:
    """The folder itself, or the newest checkpoint in the output folder of a training job."""
    return folder if (folder / CARD_FILE).exists() else latest_folder(folder) or folder


def share_of_layers(config: CLTConfig, layers: Sequence[int] | None) -> LayerShare:
    """Share with the encoders and decoders of some layers.

    Args:
        config: architecture.
        layers: numbers of source or target layers; None for all.

    Raises:
        ConfigError: a layer does not exist.
    """
    whole = LayerShare.everything(config)
    if layers is None:
        return whole
    known = {*whole.sources, *whole.targets}
    if not layers or not known.issuperset(layers):
        raise ConfigError(f"layers={list(layers)}: choose from the transcoder's layers {min(known)} to {max(known)}")
    return LayerShare(
        sources=tuple(layer for layer in whole.sources if layer in layers),
        targets=tuple(layer for layer in whole.targets if layer in layers),
    )


def load_transcoder(
    folder: Path,
    layers: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lazy: bool = False,
    averaged: bool = False,
) -> CrossLayerTranscoder:
    """Reads a transcoder, or some of its layers.

    Args:
        folder: written by `save_transcoder`, or the output folder of a training job (its newest checkpoint is read).
        layers: as for `share_of_layers`.
        device: device of the weights.
        dtype: dtype of the weights, whatever that of the files is.
        lazy: leave W_dec in its files (`clt.transcoder.lazy_decoder`); checksums of these files are not compared.
        averaged: load the EMA weights, of a job with optimizer.ema_decay.

    Returns:
        The transcoder, without gradients.

    Raises:
        CheckpointError: a file is missing, damaged or of the wrong shape; names the file and key.
        ConfigError: a layer does not exist.
    """
    folder = transcoder_folder(folder)
    # Training checkpoints have checksums; `save_pretrained` writes none, so that a folder can be edited.
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).exists() else None

    def checked(name: str) -> Path:
        if manifest is not None:
            verify_file(folder, name, manifest)
        return folder / name

    config, provenance = read_card(checked(CARD_FILE))
    scaling, share = _read_scaling(checked(SCALING_FILE), config), share_of_layers(config, layers)
    with torch.device("meta"):
        # Shapes only, without initial weights.
        transcoder = CrossLayerTranscoder(config, scaling, share, provenance=provenance)
    for layer in sorted({*share.sources, *share.targets}):
        name = average_file(layer) if averaged else layer_file(layer)
        if averaged and not (folder / name).exists():
            remedy = "pass averaged=False, or train with optimizer.ema_decay > 0"
            raise CheckpointError(f"{folder / name}: no such file, the checkpoint has no EMA weights; {remedy}")
        like = torch.ones((), dtype=dtype, device=device)
        _fill_layer(transcoder, layer, folder / name if lazy else checked(name), like, lazy)
    return transcoder.requires_grad_(False)


def _fill_layer(transcoder: CrossLayerTranscoder, layer: int, path: Path, like: Tensor, lazy: bool) -> None:
    """Loads a layer's weights and buffers from one file, in the dtype and on the device of `like`."""
    # Tensors of one read share a mapping of the file; a second one lets the pages of copied tensors be freed.
    tensors, mapped = read_tensors(path), read_tensors(path) if lazy else {}
    for key, wanted in layer_tensors(transcoder, layer).items():
        group = _parameters(transcoder)[key]
        if lazy and key == "W_dec":
            put_mapped(group, str(layer), MappedDecoder(_checked(mapped, key, wanted.shape, path), like))
        else:
            own = _checked(tensors, key, wanted.shape, path).to(like, copy=True)
            group[str(layer)] = nn.Parameter(own, requires_grad=False)
    for key, wanted in layer_buffers(transcoder, layer).items():
        _buffers(transcoder)[key][layer] = _checked(tensors, key, wanted.shape, path).to(like.device, copy=True)


def read_into(parameters: dict[str, Tensor], path: Path, columns: range | None = None) -> None:
    """Copies tensors of one file into parameters of the same names.

    Args:
        parameters: destinations, by name.
        path: a safetensors file of whole tensors.
        columns: channels of the targets that the parameters hold; None for all.

    Raises:
        CheckpointError: a tensor is missing or of another shape or kind.
    """
    tensors = read_tensors(path)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(_checked(tensors, key, parameter.shape, path, columns))


def _checked(
    tensors: dict[str, Tensor], key: str, shape: torch.Size, path: Path, columns: range | None = None
) -> Tensor:
    """Columns of a file's tensor; CheckpointError if it is missing or of another shape or kind."""
    if key not in tensors:
        raise CheckpointError(f"{path}: key '{key}' is missing; the checkpoint is incomplete")
    own = own_columns(key, tensors[key], columns)
    if own.shape != shape:
        raise CheckpointError(
            f"{path}: key '{key}' has shape {tuple(tensors[key].shape)}, expected {tuple(shape)} from the config"
        )
    if not own.is_floating_point():
        raise CheckpointError(f"{path}: key '{key}' is {own.dtype}, not a tensor of floating-point numbers")
    return own


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def read_card(path: Path) -> tuple[CLTConfig, Provenance]:
    """Contents of `transcoder.json`; CheckpointError if it is missing, damaged or of another format."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the folder of a transcoder or of a training job") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, this version reads {FORMAT!r}")
    config = parse_config(CLTConfig, tree.get("config", {}), str(path))
    model, training = tree.get("model"), tree.get("training")
    try:
        identity = None if model is None else ModelIdentity(**model)
    except TypeError:
        raise CheckpointError(f"{path}: key 'model' is not valid; use another checkpoint") from None
    try:
        facts = None if training is None else TrainingFacts(**training)
    except TypeError:
        raise CheckpointError(f"{path}: key 'training' is not valid; use another checkpoint") from None
    return config, Provenance(model=identity, store_id=tree.get("store"), training=facts)


def _read_scaling(path: Path, config: CLTConfig) -> Scaling:
    scaling = Scaling.identity(config.n_layers, config.d_model)
    read_into(scaling.tensors(), path)
    return scaling
