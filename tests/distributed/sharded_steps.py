"""Steps of one transcoder on any mesh, with weights and batches that do not depend on the mesh; run by every rank."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clt.checkpoint.columns import own_columns
from clt.checkpoint.weights import layer_tensors
from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers, input_layers
from clt.training.objective import Objective
from clt.training.settings import AuxKSettings
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

#: Weight of the auxiliary error, and every how many tokens of a rank it looks at one.
AUXK = AuxKSettings(coefficient=0.5, revival=0.1, token_fraction=0.25)


def scaling(config: CLTConfig) -> Scaling:
    """A scaling that is not the identity."""
    draw = torch.Generator().manual_seed(5)
    mean = torch.randn(2, config.n_layers, config.d_model, generator=draw) / 10
    rms = 0.5 + torch.rand(2, config.n_layers, generator=draw)
    return Scaling(mean_x=mean[0], rms_x=rms[0], mean_y=mean[1], rms_y=rms[1])


def make_objective(config: CLTConfig, mesh: Mesh, dtype: torch.dtype) -> tuple[Objective, Tensor]:
    """One rank's objective with random decoders and biases, and which of its features count as dead."""
    shares = deal_layers(config, mesh.layer_size, mesh.column_size)
    share = shares[mesh.model_rank]
    transcoder = CrossLayerTranscoder(config, scaling(config), share).to(dtype)
    whole = CrossLayerTranscoder(config, scaling(config))
    for layer in range(config.n_layers):
        draw = torch.Generator().manual_seed(layer)
        for key in ("W_dec", "b_dec", "W_skip", "W_shared", "target_scale"):
            group, own = getattr(whole, key), getattr(transcoder, key)
            if str(layer) in group:
                random = torch.randn(group[str(layer)].shape, generator=draw) / config.d_model
                if str(layer) in own:
                    own[str(layer)].data = own_columns(key, random, share.columns).to(dtype).contiguous()
    dead_LF = torch.zeros(len(share.sources), config.n_features, dtype=torch.bool)
    dead_LF[:, ::3] = True
    return Objective(transcoder, CodeExchange(mesh, shares), AUXK), dead_LF


def batch_of(config: CLTConfig, share: LayerShare, mesh: Mesh, step: int, tokens: int) -> tuple[Tensor, Tensor]:
    """x and y of one rank; `tokens` counts those of all data ranks."""
    draw = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(2, config.n_layers, tokens, config.d_model, generator=draw)
    rows = tokens // mesh.data_size
    own = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    return x[list(input_layers(config, share)), own], (x.cumsum(0).relu() + y)[list(share.targets), own]


def weights_of(mesh: Mesh, step: int, tokens: int) -> Tensor:
    """Weights of one rank's tokens in the loss, of mean 1/B over all of them; some are 0."""
    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(2000 + step)).sub(0.2).relu().double()
    return (drawn / drawn.mean()).chunk(mesh.data_size)[mesh.data_rank] * mesh.data_size / tokens


def backward(
    objective: Objective, x: Tensor, y: Tensor, dead_LF: Tensor, mesh: Mesh, weights_B: Tensor | None = None
) -> Tensor:
    """The loss over all ranks; gradients are averaged over the data axis."""
    loss, _ = objective(x, y, objective.transcoder.config.k, dead_LF, 0.0, weights_B)
    loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    mean = mesh.all_reduce(torch.cat([g.flatten() for g in gradients]), "data") / mesh.data_size
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return mesh.all_reduce(loss.detach().clone(), "world") / mesh.data_size


def one_step(config: CLTConfig, mesh: Mesh, tokens: int) -> dict[str, Tensor]:
    """Loss, gradients, codes and their margins of a float32 step."""
    objective, dead_LF = make_objective(config, mesh, torch.float32)
    transcoder = objective.transcoder
    x, y = batch_of(config, transcoder.share, mesh, 0, tokens)
    results = {"loss": backward(objective, x, y, dead_LF, mesh)}
    for layer in sorted({*transcoder.share.sources, *transcoder.share.targets}):
        results |= {
            f"grad.{layer}.{key}": p.grad for key, p in layer_tensors(transcoder, layer).items() if p.grad is not None
        }
    rows = [input_layers(config, transcoder.share).index(layer) for layer in transcoder.share.sources]
    x_LBD = transcoder.scaling.standardise_x(x[rows], transcoder.share.sources)
    for layer, x_BD in zip(transcoder.share.sources, x_LBD, strict=True):
        indices = transcoder.encode_layer(layer, x_BD)[1]
        pre_BF = (x_BD @ transcoder.W_enc[str(layer)].T + transcoder.b_enc[str(layer)]).detach()
        best = pre_BF.relu().topk(config.k + 1).values
        results[f"indices.{layer}.{mesh.data_rank}"] = indices
        # Distance of the k-th activation from the next, or all pre-activations are from zero where fewer are active:
        # closer calls may fall either way.
        to_zero_B, to_next_B = pre_BF.abs().amin(dim=1), best[:, -2] - best[:, -1]
        results[f"margin.{layer}.{mesh.data_rank}"] = torch.where(best[:, -2] > 0, to_next_B, to_zero_B)
    return results


def fifty_steps(config: CLTConfig, mesh: Mesh, tokens: int) -> dict[str, Tensor]:
    """Loss and weights after 50 float64 steps of plain Adam on tokens of different weight."""
    objective, dead_LF = make_objective(config, mesh, torch.float64)
    transcoder = objective.transcoder
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    for step in range(50):
        optimizer.zero_grad()
        x, y = (part.double() for part in batch_of(config, transcoder.share, mesh, step, tokens))
        loss = backward(objective, x, y, dead_LF, mesh, weights_of(mesh, step, tokens))
        optimizer.step()
    results = {"loss": loss}
    for layer in sorted({*transcoder.share.sources, *transcoder.share.targets}):
        results |= {f"weight.{layer}.{key}": p.detach() for key, p in layer_tensors(transcoder, layer).items()}
    return results


CASES = {"one_step": one_step, "fifty_steps": fifty_steps}


def run_cases(configs: dict[str, Any], meshes: list[list[int]], cases: list[str], tokens: int) -> dict[str, Tensor]:
    """Cases on meshes of this world; keys are `layer x column / case / name of the config / tensor`."""
    results = {}
    for layer_size, column_size in meshes:
        mesh = Mesh.create(layer_size, column_size)
        for case in cases:
            for name, tree in configs.items():
                for key, value in CASES[case](CLTConfig(**tree), mesh, tokens).items():
                    results[f"{layer_size}x{column_size}/{case}/{name}/{key}"] = value
    return results


def share_of(config: CLTConfig, mesh: str, rank: int) -> LayerShare:
    """Share of a rank on a mesh `layer x column`."""
    layer_size, column_size = map(int, mesh.split("x"))
    return deal_layers(config, layer_size, column_size)[rank % (layer_size * column_size)]


def assert_equal_unsharded(
    config: CLTConfig,
    name: str,
    mesh: str,
    ranks: list[dict[str, Tensor]],
    unsharded: dict[str, Tensor],
    *,
    exact_sets: bool = True,
) -> None:
    """Holds every tensor that any rank of a mesh found against the one process's part of it."""
    seen = set()
    for rank, found in enumerate(ranks):
        columns = share_of(config, mesh, rank).columns
        for case in CASES:
            prefix, reference = f"{mesh}/{case}/{name}/", f"1x1/{case}/{name}/"
            for key in (k.removeprefix(prefix) for k in found if k.startswith(prefix)):
                seen.add(f"{case}/{key}")
                if key.startswith(("indices", "margin")):
                    continue
                expected = own_columns(key, unsharded[reference + key], columns)
                value = found[prefix + key]
                if case == "fifty_steps":
                    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=f"{mesh} {key} rank {rank}")
                elif exact_sets:
                    # Only the order of float32 sums differs: 1e-5 of the tensor's largest entry.
                    largest = unsharded[reference + key].abs().max()
                    assert (value - expected).abs().max() <= 1e-5 * largest, f"{mesh} {key} rank {rank}"
    expected_keys = {k.partition("/")[2].replace(f"/{name}/", "/", 1) for k in unsharded if f"/{name}/" in k}
    assert {key for key in expected_keys if "/indices" not in key and "/margin" not in key} <= seen


def assert_same_features(
    config: CLTConfig, name: str, mesh: str, ranks: list[dict[str, Tensor]], unsharded: dict[str, Tensor]
) -> None:
    """Holds the selected features of all ranks against the one process's, but for calls closer than 1e-5."""
    found = {key: value for rank in ranks for key, value in rank.items()}
    layer_size, column_size = map(int, mesh.split("x"))
    data_size = len(ranks) // (layer_size * column_size)
    prefix = f"/one_step/{name}/"
    for layer in LayerShare.everything(config).sources:
        parts = [found[f"{mesh}{prefix}indices.{layer}.{rank}"] for rank in range(data_size)]
        clear = unsharded[f"1x1{prefix}margin.{layer}.0"] >= 1e-5
        assert clear.float().mean() > 0.8
        assert torch.equal(torch.cat(parts)[clear], unsharded[f"1x1{prefix}indices.{layer}.0"][clear])


def tree_of(config: CLTConfig) -> dict[str, Any]:
    """A config as JSON carries it to the ranks."""
    return asdict(config)
