"""Forward passes of other projects, restated over the files on disk; random native transcoders to compare with.

Every function takes a folder and raw inputs x [L,B,D], and returns the outputs [L,B,D] of all layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import target_layers
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

L, D, F, K, B = 3, 4, 6, 2, 9


def make(seed: int = 0, **changes: Any) -> CrossLayerTranscoder:
    """A float64 transcoder in which every number matters."""
    draw = torch.Generator().manual_seed(seed)
    config = CLTConfig(**({"n_layers": L, "d_model": D, "n_features": F, "k": K} | changes))
    mean, rms = torch.randn(2, L, D, generator=draw), torch.rand(2, L, generator=draw) + 0.5
    transcoder = CrossLayerTranscoder(
        config, Scaling(mean_x=mean[0], rms_x=rms[0], mean_y=mean[1], rms_y=rms[1])
    ).double()
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        for parameter in transcoder.log_threshold.values():
            parameter.mul_(0.3).sub_(1)
    return transcoder.eval().requires_grad_(False)


def inputs() -> Tensor:
    """Raw encoder inputs [L,B,D]."""
    return torch.randn(L, B, D, dtype=torch.float64)


def of_all_layers(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> Tensor:
    """Outputs of the native transcoder for all layers, zeros where it has no source."""
    y_LBD = torch.zeros(transcoder.config.n_layers, *x_LBD.shape[1:], dtype=x_LBD.dtype)
    y_LBD[list(target_layers(transcoder.config))] = transcoder(x_LBD)
    return y_LBD


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def draw(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random float64 tensors by name."""
    return {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}


def circuit_tracer(folder: Path, x_LBD: Tensor) -> Tensor:
    """circuit-tracer: sources write to their own and all later layers; W_skip multiplies from the right."""
    n_layers = len(list(folder.glob("W_enc_*")))
    files = [load_file(folder / f"W_enc_{i}.safetensors") for i in range(n_layers)]
    y = torch.stack([file[f"b_dec_{i}"].expand(x_LBD.shape[1], -1) for i, file in enumerate(files)]).clone()
    for i, file in enumerate(files):
        pre = x_LBD[i] @ file[f"W_enc_{i}"].T + file[f"b_enc_{i}"]
        threshold = file.get(f"threshold_{i}")
        acts = torch.relu(pre) if threshold is None else pre * (pre > threshold)
        y[i:] += torch.einsum("bf,ftd->tbd", acts, load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"])
        if f"W_skip_{i}" in file:
            y[i] += x_LBD[i] @ file[f"W_skip_{i}"]
    return y


def transcoder_set(folder: Path, x_LBD: Tensor) -> Tensor:
    """circuit-tracer's set of single-layer transcoders; W_skip is transposed."""
    outputs = []
    for i, x_BD in enumerate(x_LBD):
        file = load_file(folder / f"layer_{i}.safetensors")
        pre = x_BD @ file["W_enc"].T + file["b_enc"]
        acts = pre * (pre > file["activation_function.threshold"])
        outputs.append(acts @ file["W_dec"] + file["b_dec"] + x_BD @ file["W_skip"].T)
    return torch.stack(outputs)


def sparsify(folder: Path, x_LBD: Tensor, hook: str = "layers.{}.mlp") -> Tensor:
    """sparsify and clt-training, layer after layer, as the runner of the latter keeps the sources that still write."""
    alive: list[tuple[int, dict[str, Any], dict[str, Tensor], Tensor, Tensor]] = []
    outputs = []
    for layer, x_BD in enumerate(x_LBD):
        path = folder / hook.format(layer)
        cfg, w = json.loads((path / "cfg.json").read_text()), load_file(path / "sae.safetensors")
        width = x_BD.shape[1] ** 0.5
        scaled = x_BD * (width / w["in_norm"]) if cfg.get("normalize_io") else x_BD
        top = torch.relu(scaled @ w["encoder.weight"].T + w["encoder.bias"]).topk(cfg["k"], dim=1)
        acts = torch.zeros(len(x_BD), len(w["encoder.bias"]), dtype=x_BD.dtype).scatter(1, top.indices, top.values)
        alive.append((layer, cfg, w, scaled, acts))
        several = cfg.get("n_targets", 0) > 0
        form = cfg.get("coalesce_topk", "none")
        total = torch.zeros_like(x_BD)
        for block, (source, their_cfg, theirs, their_x, z) in enumerate(alive):
            j = layer - source
            keys = ("W_dec", "b_dec", "W_skip", "post_enc", "post_enc_scale")
            name = {key: f"{key}s.{j}" if several else key for key in keys}
            if name["post_enc"] in theirs:
                z = z + theirs[name["post_enc"]] * (z > 0)
            if their_cfg.get("post_encoder_scale"):
                z = z * theirs[name["post_enc_scale"]]
            if form == "concat":
                total = total + z @ w["W_dec"]
            elif form == "per-layer":
                total = total + z @ w["W_dec"].view(-1, z.shape[1], x_BD.shape[1])[block]
            else:
                W = theirs["W_dec"] if their_cfg.get("per_source_tied") else theirs[name["W_dec"]]
                part = z @ W + theirs[name["b_dec"]]
                if their_cfg.get("skip_connection"):
                    part = part + their_x @ theirs[name["W_skip"]].T
                others = len(alive) - 1
                total = total + (part / others if cfg.get("divide_cross_layer") and j else part)
        if form != "none":
            total = total + w["b_dec"] + (scaled @ w["W_skip"].T if cfg.get("skip_connection") else 0)
        outputs.append(total * (w["out_norm"] / width) if cfg.get("normalize_io") else total)
        alive = [entry for entry in alive if layer - entry[0] + 1 < max(1, entry[1].get("n_targets", 0))]
    return torch.stack(outputs)


def crosslayer_coding(folder: Path, x_LBD: Tensor) -> Tensor:
    """crosslayer-coding: normalise, encode, decode every pair, skip, denormalise."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "model.safetensors")
    method, tying = cfg["normalization_method"], cfg["decoder_tying"]
    stats = json.loads((folder / "norm_stats.json").read_text()) if method == "mean_std" else {}

    def norm(layer: int, part: str) -> tuple[Tensor, Tensor]:
        if method == "mean_std":
            mean, std = (torch.tensor(stats[str(layer)][part][key], dtype=torch.float64) for key in ("mean", "std"))
            return mean, std + 1e-6
        one = torch.ones((), dtype=torch.float64)
        return 0 * one, one / (x_LBD.shape[2] ** 0.5 if method == "sqrt_d_model" else 1)

    x, acts = [], []
    for layer, x_BD in enumerate(x_LBD):
        mean, std = norm(layer, "inputs")
        x.append((x_BD - mean) / std)
        key = f"encoder_module.encoders.{layer}"
        pre = x[layer] @ w[f"{key}.weight"].T + w[f"{key}.bias_param"]
        jump = cfg["activation_fn"] == "jumprelu"
        acts.append(pre * (pre >= w["theta_manager.log_threshold"][layer].exp()) if jump else torch.relu(pre))
    outputs = []
    for target in range(len(x_LBD)):
        scale = w.get(f"decoder_module.feature_scale.{target}", torch.ones((), dtype=torch.float64))
        offset = w.get(f"decoder_module.feature_offset.{target}", torch.zeros((), dtype=torch.float64))
        z = [(act + offset * (act != 0)) * scale for act in acts[: target + 1]]
        y = torch.zeros_like(x_LBD[0])
        if tying == "per_target":
            key = f"decoder_module.decoders.{target}"
            y = sum(z) @ w[f"{key}.weight"].T + w[f"{key}.bias_param"]
        for source in range(target + 1 if tying != "per_target" else 0):
            key = f"decoder_module.decoders.{source if tying == 'per_source' else f'{source}->{target}'}"
            y = y + z[source] @ w[f"{key}.weight"].T + w[f"{key}.bias_param"]
            if cfg["skip_connection"] and tying == "none":
                y = y + x[source] @ w[f"decoder_module.skip_weights.{source}->{target}"].T
        if cfg["skip_connection"] and tying != "none":
            y = y + x[target] @ w[f"decoder_module.skip_weights.{target}"].T
        mean, std = norm(target, "targets")
        outputs.append(y * std + mean)
    return torch.stack(outputs)


def vlm_clt_training(folder: Path, x_LBD: Tensor, k: int | None = None) -> Tensor:
    """The vlm-clt-training replacement: LayerNorm, encoder and decoder of every source, summed over sources."""
    y_LBD = torch.zeros_like(x_LBD)
    for source in range(len(x_LBD) - 1):
        state = torch.load(folder / f"transcoder_L{source}.pt", weights_only=True)["state_dict"]
        w = {key.removeprefix("_orig_mod."): tensor.double() for key, tensor in state.items()}
        x = x_LBD[source]
        centred = x - x.mean(dim=1, keepdim=True)
        normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        pre = (normed * w["enc.0.weight"] + w["enc.0.bias"]) @ w["enc.1.weight"].T + w["enc.1.bias"]
        z = torch.relu(pre)
        if k is not None:
            z = torch.zeros_like(z).scatter(1, (top := z.topk(k, dim=1)).indices, top.values)
        y = (z @ w["dec.weight"].T + w["dec.bias"]).view(len(x), -1, x.shape[1])
        for place in range(min(y.shape[1], len(x_LBD) - 1 - source)):
            y_LBD[source + 1 + place] += y[:, place]
    return y_LBD
