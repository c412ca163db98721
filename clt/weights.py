"""Transcoder weights on disk: one safetensors file per layer, so that any mesh can read any share.

transcoder.json              format, architecture, model identity, store id, code version
scaling.safetensors          mean_x, rms_x, mean_y, rms_y
layer_00.safetensors ...     W_enc, b_enc (W_shared, target_scale) of source 0; W_dec, b_dec (W_skip) of target 0
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clt.columns import own_columns
from clt.config import CLTConfig, config_to_tree, parse_config
from clt.errors import CheckpointError
from clt.manifest import MANIFEST_FILE, latest_folder, read_manifest, verify_file
from clt.model import CrossLayerTranscoder, LayerShare, Provenance
from clt.records import ModelIdentity
from clt.scaling import Scaling
from clt.tensor_files import write_tensors
from clt.version import code_version

FORMAT = "vlm-clt/1"
CARD_FILE = "transcoder.json"
SCALING_FILE = "scaling.safetensors"


def layer_file(layer: int) -> str:
    """Name of the weight file of one layer."""
    return f"layer_{layer:02d}.safetensors"


def average_file(layer: int) -> str:
    """Name of the file with the running mean of one layer's weights, in checkpoints of jobs that keep one."""
    return f"average_{layer:02d}.safetensors"


def layer_tensors(clt: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """The parameters of one layer that this process owns, by their name in the file."""
    groups = {"W_enc": clt.W_enc, "b_enc": clt.b_enc, "W_dec": clt.W_dec, "b_dec": clt.b_dec, "W_skip": clt.W_skip}
    groups |= {"log_threshold": clt.log_threshold, "W_shared": clt.W_shared, "target_scale": clt.target_scale}
    return {key: group[str(layer)] for key, group in groups.items() if str(layer) in group}


def layer_buffers(clt: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """What is saved of a source layer besides its parameters, by its name in the file."""
    groups = {"decoder_norm": clt.decoder_norm, "threshold": clt.threshold}
    return {key: group[layer] for key, group in groups.items() if layer in group}


def save_transcoder(clt: CrossLayerTranscoder, folder: Path) -> None:
    """Writes the card, the scaling and the weights of all layers owned here into a folder."""
    assert clt.share.columns is None, "a column share has no whole layer to write"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SCALING_FILE, clt.scaling.tensors())
    for layer in range(clt.config.n_layers):
        write_tensors(folder / layer_file(layer), layer_tensors(clt, layer) | layer_buffers(clt, layer))
    (folder / CARD_FILE).write_text(json.dumps(card(clt), indent=1) + "\n", encoding="utf-8")


def card(clt: CrossLayerTranscoder) -> dict[str, Any]:
    """What `transcoder.json` says of a transcoder."""
    model = clt.provenance.model
    return {
        "format": FORMAT,
        "config": config_to_tree(clt.config),
        "model": None if model is None else asdict(model),
        "store": clt.provenance.store_id,
        "created_by": code_version(),
    }


def load_transcoder(folder: Path, share: LayerShare | None = None, averaged: bool = False) -> CrossLayerTranscoder:
    """Reads a transcoder, or the share of it that a rank owns.

    Args:
        folder: what `save_transcoder` wrote, or the output folder of a training job, which means its newest checkpoint.
        share: layers to read; all by default.
        averaged: read the running mean of the weights, of a job with optimizer.ema_decay.

    Returns:
        The transcoder, without gradients.

    Raises:
        CheckpointError: a file is missing, damaged or of the wrong shape; names the file and key.
    """
    if not (folder / CARD_FILE).exists():
        folder = latest_folder(folder) or folder
    # Training checkpoints carry checksums; `save_pretrained` leaves them out, so that a folder can be edited by hand.
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).exists() else None

    def checked(name: str) -> Path:
        if manifest is not None:
            verify_file(folder, name, manifest)
        return folder / name

    config, provenance = _read_card(checked(CARD_FILE))
    scaling = _read_scaling(checked(SCALING_FILE), config)
    clt = CrossLayerTranscoder(config, scaling, share, provenance=provenance).requires_grad_(False)
    for layer in sorted({*clt.share.sources, *clt.share.targets}):
        own = layer_tensors(clt, layer) | layer_buffers(clt, layer)
        name = average_file(layer) if averaged else layer_file(layer)
        if averaged and not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: no such file; train with optimizer.ema_decay, or take the weights")
        read_into(own, checked(name), clt.share.columns)
    return clt


def read_into(parameters: dict[str, Tensor], path: Path, columns: range | None = None) -> None:
    """Copies tensors of one file into parameters of the same names; CheckpointError on any mismatch.

    Args:
        parameters: what to fill.
        path: a safetensors file of whole tensors.
        columns: channels of the targets that the parameters hold; None for all.
    """
    tensors = read_tensors(path)
    for key, parameter in parameters.items():
        if key not in tensors:
            raise CheckpointError(f"{path}: key '{key}' is missing; the checkpoint is incomplete")
        own = own_columns(key, tensors[key], columns)
        if own.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: key '{key}' has shape {tuple(tensors[key].shape)}, the config wants {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(own)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; CheckpointError when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def _read_card(path: Path) -> tuple[CLTConfig, Provenance]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the folder of a trained transcoder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({' '.join(str(error).split())})") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, this version reads {FORMAT!r}")
    config = parse_config(CLTConfig, tree.get("config", {}), str(path))
    model = tree.get("model")
    try:
        identity = None if model is None else ModelIdentity(**model)
    except TypeError:
        raise CheckpointError(f"{path}: key 'model' does not describe a model") from None
    return config, Provenance(model=identity, store_id=tree.get("store"))


def _read_scaling(path: Path, config: CLTConfig) -> Scaling:
    scaling = Scaling.identity(config.n_layers, config.d_model)
    read_into(scaling.tensors(), path)
    return scaling
