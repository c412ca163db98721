"""The sparsify format of EleutherAI: sparsify (single-layer transcoders) and clt-training (cross-layer ones).

    {hookpoint}/cfg.json           activation, k, n_targets, ... of one layer
    {hookpoint}/sae.safetensors    encoder.weight [F,D], encoder.bias [F], decoders W_decs.{j} [F,D] into layer l + j
                                   (W_dec if one), b_decs.{j}, W_skips.{j}, post_encs.{j}, post_enc_scales.{j}
    config.json                    settings of the run; hookpoints_in names the inputs of the encoders

a = TopK(ReLU(W_enc x + b_enc), k), x times sqrt(D) / in_norm. A source's part of layer l + j is
(a + post_enc_j where a > 0) * post_enc_scale_j through W_decs.j, + b_decs.j + x W_skips.j^T. A target is the sum of the
parts (divide_cross_layer: other layers' parts over their number), times out_norm / sqrt(D). Tied decoders: W_dec [F,D]
of a source (per_source_tied) or a target (coalesce_topk: concat), [S*F,D] in blocks of its sources (per-layer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.checkpoint.manifest import new_folder
from clt.convert.files import (
    ForeignFile,
    empty_transcoder,
    in_order,
    read_json,
    refuse,
    whole_number,
    write_json,
)
from clt.errors import CheckpointError, ConfigError
from clt.tensor_files import write_tensors
from clt.transcoder.architecture import CLTConfig, ReadSite
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

CODER_FILE, SETTINGS_FILE, RUN_FILE = "sae.safetensors", "cfg.json", "config.json"

_NORMS = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm")


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One hookpoint: settings and tensors."""

    number: int
    folder: Path
    settings: dict[str, Any]
    file: ForeignFile

    @property
    def n_targets(self) -> int:
        """Number of target layers; 0 for a single-layer transcoder."""
        if "n_targets" not in self.settings:
            return 0
        return whole_number(self.folder / SETTINGS_FILE, self.settings, "n_targets", least=0)

    @property
    def coalesced(self) -> str | None:
        """Layout of the decoders of a target's sources in the target's file, or None."""
        form = self.settings.get("coalesce_topk", "none")
        return None if form == "none" else str(form)

    @property
    def has_offsets(self) -> bool:
        """True if features have offsets (post_enc)."""
        return self.file.is_not_zero(r"post_enc(s\.\d+)?")

    def take(self, name: str, place: int, *shape: int | None) -> Tensor:
        """Tensor of the place-th target: W_decs.1, or W_dec if there is one target; W_dec repeats W_decs.0.

        Args:
            name: name without place, such as W_dec.
            place: number of the target.
            shape: as for `ForeignFile.take`.
        """
        several = f"{name}s.{place}"
        if place or self.file.has(several) or (self.n_targets and not self.file.has(name)):
            tensor = self.file.take(several, *shape)
            if not place and self.file.has(name) and not torch.equal(tensor, self.file.take(name, *shape)):
                raise CheckpointError(f"{self.file.path}: key '{name}' differs from '{several}'; they must be the same")
            return tensor
        return self.file.take(name, *shape)


def load_sparsify(folder: Path, *, read_site: ReadSite | None = None) -> CrossLayerTranscoder:
    """Reads the output of sparsify or clt-training.

    Args:
        folder: output of a run, with a folder for each layer, starting at 0.
        read_site: input of the encoders; default: from the run's config.json, else the MLPs' inputs.

    Returns:
        The transcoder, of kind topk, with in_norm and out_norm as its scaling.

    Raises:
        CheckpointError: a file is missing, damaged, of another shape or not supported.
    """
    layers = _layers(folder)
    for layer in layers:
        _refuse_unknown(layer, layers[0])
    first = layers[0]
    F, D, dtype = first.file.matrix("encoder.weight")
    k = whole_number(first.folder / SETTINGS_FILE, first.settings, "k")
    if k > F:
        refuse(first.folder / SETTINGS_FILE, "k", k, f"exceeds the {F} features")
    config = CLTConfig(
        n_layers=len(layers),
        d_model=D,
        n_features=F,
        k=k,
        n_targets=max(1, first.n_targets),
        skip=bool(first.settings.get("skip_connection")),
        read_site=read_site or _read_site(folder),
        feature_offset=any(layer.has_offsets for layer in layers),
    )
    transcoder = empty_transcoder(config, dtype, _scaling(layers, D))
    for layer in layers:
        _fill_target(transcoder, layer, layers)
    for layer in layers:
        transcoder.encoder_matrix(layer.number).copy_(layer.file.take("encoder.weight", F, D))
        transcoder.encoder_bias(layer.number).copy_(layer.file.take("encoder.bias", F))
        layer.file.end()
    return transcoder


def save_sparsify(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Writes folders layers.{i}.mlp, for sparsify if every source has one target, else for clt-training.

    Args:
        transcoder: a whole transcoder of kind topk with `first_offset: 0`.
        folder: new or empty.

    Raises:
        ConfigError: the format cannot represent the transcoder.
        CheckpointError: the folder is not empty or cannot be written.
    """
    config = transcoder.config
    if config.sparsity.kind != "topk" or config.sparsity.decoder_norm:
        raise ConfigError(f"clt.sparsity.kind={config.sparsity.kind}: sparsify supports topk without decoder_norm only")
    if config.first_offset:
        raise ConfigError("clt.first_offset=1: sparsify supports first_offset: 0 only; train with it")
    if config.layer_norm:
        raise ConfigError("clt.layer_norm: sparsify does not support LayerNorm before encoders; train without it")
    if config.read_site not in ("resid_mid", "mlp_in"):
        raise ConfigError(f"clt.read_site={config.read_site}: sparsify supports mlp_in and resid_mid only")
    plain = transcoder.folded()
    names = [f"layers.{layer}.mlp" for layer in range(config.n_layers)]
    with new_folder(folder) as temporary:
        for layer, name in enumerate(names):
            (temporary / name).mkdir()
            write_tensors(temporary / name / CODER_FILE, _tensors(plain, layer))
            write_json(temporary / name / SETTINGS_FILE, _settings(config, len(plain.targets_of(layer))))
        norms = [name.replace("mlp", "post_attention_layernorm") for name in names]
        reads_norm = config.read_site == "resid_mid"
        write_json(
            temporary / RUN_FILE,
            {
                "sae": _settings(config, 0),
                "hookpoints": names,
                "hookpoints_in": norms if reads_norm else [],
                "cross_layer": 0 if config.n_targets == 1 else config.n_targets or config.n_layers,
            },
        )


def _layers(folder: Path) -> list[_Layer]:
    """Hookpoints of a run, by layer."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the output folder of a run")
    paths = [path.parent for path in sorted(folder.glob(f"*/{SETTINGS_FILE}"))]
    ordered = in_order(folder, [(_number(path), path) for path in paths], f"no folder with a {SETTINGS_FILE} in it")
    return [
        _Layer(
            number=layer,
            folder=path,
            settings=read_json(path / SETTINGS_FILE),
            file=ForeignFile.safetensors(path / CODER_FILE),
        )
        for layer, path in enumerate(ordered)
    ]


def _number(path: Path) -> int:
    """Layer number in a hookpoint's name."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path.name)
    if len(numbers) != 1:
        raise CheckpointError(f"{path}: no layer number in the name; rename it like layers.3.mlp")
    return int(numbers[0])


def _refuse_unknown(layer: _Layer, first: _Layer) -> None:
    """CheckpointError for settings that are not supported or differ between layers."""
    path, settings = layer.folder / SETTINGS_FILE, layer.settings
    alike = ("k", "skip_connection", "coalesce_topk", "per_source_tied", "divide_cross_layer", "post_encoder_scale")
    if settings.get("activation", "topk") != "topk":
        refuse(path, "activation", settings["activation"], "only topk is supported")
    if not settings.get("transcode", False):
        refuse(path, "transcode", settings.get("transcode"), "an autoencoder, not a transcoder")
    if settings.get("coalesce_topk", "none") not in ("none", "concat", "per-layer"):
        refuse(path, "coalesce_topk", settings["coalesce_topk"], "only none, concat and per-layer are supported")
    for key, why in (
        ("topk_coalesced", "selects features per target; not supported"),
        ("secondary_target_tied", "decodes every target twice; not supported"),
    ):
        if settings.get(key):
            refuse(path, key, True, why)
    for key in alike:
        if settings.get(key) != first.settings.get(key):
            refuse(path, key, settings.get(key), f"differs from {first.settings.get(key)!r} of {first.folder.name}")


def _read_site(folder: Path) -> ReadSite:
    """Read site from the run's settings."""
    path = folder / RUN_FILE
    hooks = read_json(path).get("hookpoints_in") if path.exists() else None
    if not hooks:
        return "mlp_in"
    if not isinstance(hooks, list):
        refuse(path, "hookpoints_in", hooks, "expected a list")
    for hook in hooks:
        if str(hook).rpartition(".")[2] not in _NORMS:
            refuse(path, "hookpoints_in", hook, "not a norm before an MLP; set --read-site")
    return "resid_mid"


def _scaling(layers: list[_Layer], d_model: int) -> Scaling:
    """Scaling from in_norm and out_norm, the mean norms of inputs and outputs."""
    scaling = Scaling.identity(len(layers), d_model)
    for layer in layers:
        if layer.settings.get("normalize_io"):
            for key, rms in (("in_norm", scaling.rms_x), ("out_norm", scaling.rms_y)):
                norm = layer.file.take(key, 1)
                if not bool(norm > 0):
                    raise CheckpointError(f"{layer.file.path}: key '{key}' is {float(norm):g}, expected > 0")
                rms[layer.number] = norm[0] / d_model**0.5
    return scaling


def _fill_target(transcoder: CrossLayerTranscoder, goal: _Layer, layers: list[_Layer]) -> None:
    """Copies decoders, bias and skip connection of one target."""
    F, D, target = transcoder.config.n_features, transcoder.config.d_model, goal.number
    sources = transcoder.sources_of(target)
    if max(1, goal.n_targets) != len(transcoder.targets_of(target)):
        wanted = f"{len(transcoder.targets_of(target))} expected, the same horizon for all layers; download all layers"
        refuse(goal.folder / SETTINGS_FILE, "n_targets", goal.settings.get("n_targets"), wanted)
    bias_D = goal.file.take("b_dec", D) if goal.coalesced else torch.zeros(D, dtype=transcoder.dtype)
    for row, source in enumerate(sources):
        layer, place = layers[source], target - source
        divided = goal.settings.get("divide_cross_layer") and place and not goal.coalesced
        share = 1 / (len(sources) - 1) if divided else 1.0
        transcoder.decoder_matrix(target)[row].copy_(_decoder(layer, goal, row, place, (len(sources), F, D)) * share)
        offset_F = _offset(layer, place, F)
        if transcoder.config.feature_offset and offset_F is not None:
            transcoder.feature_offsets(target)[row].copy_(offset_F)
        if not goal.coalesced:
            bias_D = bias_D + share * layer.take("b_dec", place, D)
            if place and transcoder.config.skip:
                why = "it maps a source's input; only the target's own is supported"
                layer.file.take_zeros(f"W_skips.{place}", why, D, D)
    transcoder.decoder_bias(target).copy_(bias_D)
    if transcoder.config.skip:
        transcoder.skip_matrix(target).copy_(goal.take("W_skip", 0, D, D))


def _decoder(layer: _Layer, goal: _Layer, row: int, place: int, sizes: tuple[int, int, int]) -> Tensor:
    """[F,D]: decoder of a source into a target, times the scales of its features."""
    S, F, D = sizes
    match goal.coalesced:
        case "concat":
            W_FD = goal.file.take("W_dec", F, D)
        case "per-layer":
            W_GD = goal.file.take("W_dec", None, D)
            # clt-training allocates one block too many at the end of the horizon.
            if len(W_GD) % F or len(W_GD) < S * F:
                raise CheckpointError(f"{goal.file.path}: key 'W_dec' has {len(W_GD)} rows, expected {S} blocks of {F}")
            W_FD = W_GD[row * F : (row + 1) * F]
        case _ if layer.settings.get("per_source_tied"):
            W_FD = layer.file.take("W_dec", F, D)
        case _:
            W_FD = layer.take("W_dec", place, F, D)
    if layer.settings.get("post_encoder_scale"):
        W_FD = W_FD * layer.take("post_enc_scale", place, F)[:, None]
    return W_FD


def _offset(layer: _Layer, place: int, n_features: int) -> Tensor | None:
    """[F]: offsets of a source into a target, or None if the file has none."""
    if layer.file.has(f"post_encs.{place}") or layer.file.has("post_enc"):
        return layer.take("post_enc", place, n_features)
    return None


def _tensors(transcoder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """Tensors of one layer's file; a target's bias is stored with its own layer only."""
    W_FD, b_F = transcoder.encoder(layer)
    tensors = {"encoder.weight": W_FD, "encoder.bias": b_F}
    several = transcoder.config.n_targets != 1
    for place, target in enumerate(transcoder.targets_of(layer)):
        b_D = transcoder.decoder_bias(target)
        of_target = {"W_dec": transcoder.decoder(layer, target), "b_dec": torch.zeros_like(b_D) if place else b_D}
        if transcoder.config.skip:
            W_DD = transcoder.skip_matrix(target)
            of_target["W_skip"] = torch.zeros_like(W_DD) if place else W_DD
        if transcoder.config.feature_offset:
            of_target["post_enc"] = transcoder.feature_offsets(target)[transcoder.sources_of(target).index(layer)]
        tensors |= {f"{key}s.{place}" if several else key: tensor for key, tensor in of_target.items()}
    return tensors


def _settings(config: CLTConfig, n_targets: int) -> dict[str, Any]:
    """Contents of cfg.json; sparsify ignores n_targets."""
    return {
        "activation": "topk",
        "normalize_decoder": False,
        "num_latents": config.n_features,
        "k": config.k,
        "skip_connection": config.skip,
        "transcode": True,
        "n_targets": 0 if config.n_targets == 1 else n_targets,
        "d_in": config.d_model,
    }
