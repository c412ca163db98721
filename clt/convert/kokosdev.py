"""Checkpoints of vlm-clt-training (KokosDev/llava15-7b-clt), the form that the seed documents' scripts read and write.

    transcoder_L{l}.pt   layer, hidden_dim, feature_dim, training_metadata, mlp_to_clt_mapping [D,F], and state_dict:
                         enc.0.weight, enc.0.bias [D] (LayerNorm), enc.1.weight [F,D], enc.1.bias [F],
                         dec.weight [n D,F], dec.bias [n D]; all with the prefix _orig_mod. if it was compiled
    mapping_L{l}.pt      layer, mlp_to_clt_mapping [D,F], decoder_weights = dec.weight, hidden_dim, feature_dim
    metrics_L{l}.json    layer, metrics, summary

Source l computes a = ReLU(enc.1(LayerNorm(x))), or the TopK of that (which of the two no file says), and rows t D to
(t + 1) D of its decoder predict all of layer l + 1 + t by themselves: `independent`, `first_offset: 1`. Its LayerNorm
stays as `layer_norm` without weight and bias, which are folded into the encoder. Rows beyond the last layer were
trained on zeros and are left out. Files are read by torch.load(weights_only=True), which runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from clt.convert import Combination
from clt.convert.files import ForeignFile, empty_transcoder, numbered, read_pickled
from clt.errors import CheckpointError, ConfigError
from clt.transcoder.architecture import CLTConfig, ReadSite, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder

_COMPILED = "_orig_mod."


def load_kokosdev(
    folder: Path,
    *,
    read_site: ReadSite | None = None,
    k: int | None = None,
    combine: Combination | None = None,
) -> CrossLayerTranscoder:
    """Reads a folder of transcoder_L{l}.pt; files mapping_L{l}.pt hold nothing that is not in them.

    Args:
        folder: with a file for every layer but the model's last.
        read_site: what the encoders read; absent: the MLPs' inputs, as their capture script does.
        k: active features per token, for one trained with --use-topk; absent: what `save_seed_files` noted, else all
            positive ones.
        combine: how the sources of a target are combined; absent: what `save_seed_files` noted, else as a sum, as
            their README does.

    Returns:
        The transcoder, with `layer_norm`, for a model of one layer more than there are files.

    Raises:
        CheckpointError: a file is missing, damaged, of another shape or holds objects; names file and key.
        ConfigError: k is more than there are features.
    """
    paths = numbered(folder, r"transcoder_L(\d+)\.pt")
    transcoder, n_targets = None, 0
    for layer, path in enumerate(paths):
        file, notes = _read(path, layer)
        if transcoder is None:
            F, D, dtype = file.matrix("enc.1.weight")
            n_targets = file.matrix("dec.weight")[0] // D
            if not n_targets:
                raise CheckpointError(f"{path}: key 'dec.weight' has fewer rows than the width {D}")
            k, combine = _choices(notes, F, k, combine)
            config = CLTConfig(
                n_layers=len(paths) + 1,
                d_model=D,
                n_features=F,
                k=k or F,
                n_targets=n_targets,
                first_offset=1,
                read_site=read_site or "mlp_in",
                layer_norm=True,
                independent=combine,
                sparsity=SparsitySettings(kind="topk" if k else "relu"),
            )
            transcoder = empty_transcoder(config, dtype)
        _fill(transcoder, layer, file, n_targets)
    assert transcoder is not None
    return transcoder


def _choices(
    notes: dict[str, Any], n_features: int, k: int | None, combine: Combination | None
) -> tuple[int | None, Combination]:
    """What the caller says, else what `save_seed_files` noted, else what their code does by default."""
    noted: Any = notes.get("combine")
    k = k or notes.get("k")
    if k is not None and not (isinstance(k, int) and 0 < k <= n_features):
        raise ConfigError(f"k={k!r}: there are {n_features} features; give the number that was active in training")
    return k, combine or (noted if noted in get_args(Combination) else "sum")


def _read(path: Path, layer: int) -> tuple[ForeignFile, dict[str, Any]]:
    """The tensors of one layer's file and its training_metadata, after a look at what it says of itself."""
    tree = read_pickled(path)
    if tree.get("layer", layer) != layer:
        raise CheckpointError(f"{path}: key 'layer' is {tree['layer']!r}, the name says {layer}; the file was renamed")
    state, notes = tree.get("state_dict"), tree.get("training_metadata", {})
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: key 'state_dict' is missing; the checkpoint is incomplete")
    tensors: dict[str, Any] = {}
    for key, tensor in state.items():
        name = str(key).removeprefix(_COMPILED)
        if name in tensors:
            raise CheckpointError(f"{path}: key '{name}' comes twice, with and without '{_COMPILED}'")
        tensors[name] = tensor
    return ForeignFile(path, tensors), notes if isinstance(notes, dict) else {}


def _fill(transcoder: CrossLayerTranscoder, layer: int, file: ForeignFile, n_targets: int) -> None:
    F, D = transcoder.config.n_features, transcoder.config.d_model
    weight_D, bias_D = file.take("enc.0.weight", D), file.take("enc.0.bias", D)
    W_FD = file.take("enc.1.weight", F, D)
    transcoder.encoder_matrix(layer).copy_(W_FD * weight_D)
    transcoder.encoder_bias(layer).copy_(file.take("enc.1.bias", F) + W_FD @ bias_D)
    W_TDF = file.take("dec.weight", n_targets * D, F).view(n_targets, D, F)
    bias_TD = file.take("dec.bias", n_targets * D).view(n_targets, D)
    file.end()
    for place, target in enumerate(transcoder.targets_of(layer)):
        row = transcoder.sources_of(target).index(layer)
        transcoder.decoder_matrix(target)[row].copy_(W_TDF[place].T)
        transcoder.decoder_bias(target)[row].copy_(bias_TD[place])
