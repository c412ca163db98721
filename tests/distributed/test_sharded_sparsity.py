"""Every rule of sparsity selects the same features and has the same gradients however layers and tokens are dealt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from clt.checkpoint.columns import COLUMN_DIMS, own_columns
from clt.checkpoint.weights import layer_buffers, layer_tensors
from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers
from clt.training.deepspeed_engine import joined_job
from clt.training.objective import Objective
from clt.training.settings import AuxKSettings
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.encoding import decoder_squares
from clt.transcoder.layers import LayerShare
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.sparsity import Peers

from .toy_job import ToyBatches, toy_scaling

L, D, F, K, TOKENS = 4, 16, 24, 3, 32
SPARSITY: dict[str, dict[str, Any]] = {
    "topk": {"decoder_norm": True},
    "joint_topk": {},
    "batch_topk": {},
    "batch_topk_norm": {"kind": "batch_topk", "decoder_norm": True},
    "jumprelu": {"threshold": 0.3},
    "relu": {},
}
#: Ranks of the layer and of the column axis, of two.
MESHES = {"layer": (2, 1), "data": (1, 1), "column": (1, 2)}

Tensors = dict[str, torch.Tensor]


def _config(name: str) -> CLTConfig:
    sparsity = SparsitySettings(**({"kind": name} | SPARSITY[name]))
    return CLTConfig(n_layers=L, d_model=D, n_features=F, k=K, sparsity=sparsity)


def _transcoder(name: str, share: LayerShare, levels: int | None, dtype: torch.dtype) -> CrossLayerTranscoder:
    """Weights that depend on the layer only; with levels, multiples of 1/levels, whose products have no rounding."""
    transcoder = CrossLayerTranscoder(_config(name), toy_scaling(), share)
    for layer in range(L):
        draw = torch.Generator().manual_seed(layer)
        weights = {"W_enc": torch.randn(F, D, generator=draw), "W_dec": torch.randn(L, F, D, generator=draw)}
        for key, own in layer_tensors(transcoder, layer).items():
            if key in weights:
                value = own_columns(key, weights[key][: len(own)], share.columns)
                own.data = (value * levels).round() / levels if levels else value / 4
    return transcoder.to(dtype)


def _inputs(levels: int | None, share: LayerShare, mesh: Mesh) -> torch.Tensor:
    """This rank's part of inputs that all ranks draw with one seed."""
    x = torch.randn(L, TOKENS, D, generator=torch.Generator().manual_seed(9))
    x = (x * levels).round() / levels if levels else x
    rows = TOKENS // mesh.data_size
    return x[list(share.sources), mesh.data_rank * rows : (mesh.data_rank + 1) * rows]


def selections(mesh: Mesh) -> Tensors:
    """Selection of every rule in training and after it, by data rank and layer."""
    share = deal_layers(_config("topk"), mesh.layer_size, mesh.column_size)[mesh.model_rank]
    results = {}
    for name in SPARSITY:
        # Coarse levels make most scores tie.
        for dtype, levels in ((torch.float32, 4), (torch.bfloat16, 1)):
            transcoder = _transcoder(name, share, levels, dtype)
            x = _inputs(levels, share, mesh).to(dtype)
            trained = transcoder.encode(x, peers=Peers(mesh=mesh))
            transcoder.eval()
            after = transcoder.encode(x, peers=Peers(mesh=mesh))
            for row, layer in enumerate(share.sources):
                key = f"{name}/{dtype}/{layer}/{mesh.data_rank}"
                results |= {f"{key}/values": trained.values[row], f"{key}/indices": trained.indices[row]}
                results |= {f"{key}/after": after.values[row]}
                for buffer, tensor in layer_buffers(transcoder, layer).items():
                    results[f"{name}/{dtype}/{layer}/{mesh.data_rank}/{buffer}"] = tensor
    return {key: value.detach().to(torch.float64) for key, value in results.items()}


def gradients(mesh: Mesh) -> Tensors:
    """Loss and gradients of a step in float64, summed or averaged over the ranks as training does."""
    shares = deal_layers(_config("topk"), mesh.layer_size, mesh.column_size)
    share = shares[mesh.model_rank]
    results = {}
    for name in SPARSITY:
        transcoder = _transcoder(name, share, None, torch.float64)
        objective = Objective(
            transcoder, CodeExchange(mesh, shares), AuxKSettings(coefficient=0.5, token_fraction=0.25)
        )
        batch = next(iter(ToyBatches(transcoder.config, share, mesh.data_rank, mesh.data_size)))
        dead_LF = torch.zeros(len(share.sources), F, dtype=torch.bool)
        dead_LF[:, ::3] = True
        loss, seen = objective(batch.x.double(), batch.y.double(), K, dead_LF, 0.2)
        loss.backward()
        results[f"{name}/loss"] = mesh.all_reduce(loss.detach().clone(), "world") / mesh.data_size
        for layer in sorted({*share.sources, *share.targets}):
            for key, parameter in layer_tensors(transcoder, layer).items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                name_of_part = f"{name}/{layer}/{key}"
                if share.columns is not None and key in COLUMN_DIMS:
                    name_of_part += f"/columns {share.columns.start}"
                results[name_of_part] = mesh.all_reduce(gradient, "data") / mesh.data_size
        results[f"{name}/l0"] = mesh.all_reduce(seen.l0_L.sum().double(), "world") / mesh.data_size
    return results


class CountedMesh(Mesh):
    """Counts the all-reduces that are started."""

    started = 0

    def all_reduce(self, *arguments: Any) -> torch.Tensor:
        """As `Mesh`."""
        CountedMesh.started += 1
        return super().all_reduce(*arguments)


def collectives() -> Tensors:
    """All-reduces that rules start, counted on two layer ranks; and squared norms of all decoders."""
    mesh = Mesh.create(2)
    share = deal_layers(_config("topk"), 2)[mesh.layer_rank]
    counts = {}
    for name in SPARSITY:
        for dtype in (torch.float32, torch.bfloat16):
            transcoder = _transcoder(name, share, 4, dtype)
            counted = CountedMesh(**{field.name: getattr(mesh, field.name) for field in fields(mesh)})
            transcoder.encode(_inputs(4, share, mesh).to(dtype), peers=Peers(mesh=counted))
            counts[f"{name}/{dtype}"] = torch.tensor(CountedMesh.started)
            CountedMesh.started = 0
    transcoder = _transcoder("relu", share, None, torch.float64)
    return counts | {"squares": decoder_squares(transcoder, Peers(mesh=mesh)).detach()}


def everything(layer_size: int, column_size: int) -> Tensors:
    """The cases of one mesh."""
    mesh = Mesh.create(layer_size, column_size)
    found = {f"selections/{key}": value for key, value in selections(mesh).items()}
    return found | {f"gradients/{key}": value for key, value in gradients(mesh).items()}


@pytest.fixture(scope="module")
def unsharded() -> Tensors:
    """One process that owns everything and sees all tokens."""
    with joined_job():
        return everything(1, 1)


@pytest.fixture(scope="module", params=sorted(MESHES))
def sharded(request: pytest.FixtureRequest, run_ranks: Callable[..., list[Tensors]]) -> Tensors:
    """Both ranks' results; entries that both have are equal."""
    layer_size, column_size = MESHES[request.param]
    first, second = run_ranks(everything, 2, layer_size=layer_size, column_size=column_size)
    for key in first.keys() & second.keys():
        torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-12)
    return _joined(first | second)


def _joined(found: Tensors) -> Tensors:
    """With the columns of split gradients put together."""
    parts = sorted(key for key in found if "/columns " in key)
    for key in dict.fromkeys(key.partition("/columns ")[0] for key in parts):
        own = [found.pop(part) for part in parts if part.startswith(f"{key}/columns ")]
        found[key] = torch.cat(own, dim=COLUMN_DIMS[key.rpartition("/")[2]])
    return found


@pytest.mark.parametrize("name", SPARSITY)
def test_two_ranks_select_the_same_features_with_the_same_values(
    name: str, sharded: Tensors, unsharded: Tensors
) -> None:
    keys = [key for key in sharded if key.startswith(f"selections/{name}/")]
    data_size = 1 + any("/1/values" in key for key in keys)
    compared = 0
    for key in keys:
        *left, rank, what = key.split("/")
        whole, own = unsharded["/".join([*left, "0", what])], sharded[key]
        if what in ("values", "indices", "after"):
            rows = TOKENS // data_size
            whole = whole[int(rank) * rows : (int(rank) + 1) * rows]
            width = max(whole.shape[1], own.shape[1])
            whole, own = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (whole, own))
        assert torch.equal(own.nan_to_num(nan=-1), whole.nan_to_num(nan=-1)), key
        compared += what == "values" and bool((own > 0).any())
    assert compared >= 2 * L * data_size // 2


@pytest.mark.parametrize("name", SPARSITY)
def test_two_ranks_have_the_loss_and_gradients_of_one(name: str, sharded: Tensors, unsharded: Tensors) -> None:
    keys = [key for key in unsharded if key.startswith(f"gradients/{name}/")]
    assert sum(float(unsharded[key].abs().sum()) > 0 for key in keys) > 3 * L
    for key in keys:
        torch.testing.assert_close(
            sharded[key], unsharded[key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_rules_start_as_many_collectives_as_they_say(run_ranks: Callable[..., list[Tensors]]) -> None:
    first, second = run_ranks(collectives, 2)
    # Radix digits; then ties and slots. Decoder norms are one more.
    digits = {"torch.float32": 4, "torch.bfloat16": 2}
    for dtype, n in digits.items():
        expected = {"topk": 1, "joint_topk": n + 3, "batch_topk": n + 2, "batch_topk_norm": n + 3}
        expected |= {"jumprelu": 1, "relu": 1}
        assert {name: int(first[f"{name}/{dtype}"]) for name in SPARSITY} == expected
    assert torch.equal(first["squares"], second["squares"])
