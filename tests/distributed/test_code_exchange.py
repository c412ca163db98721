"""The exchange of codes: overlapped equals blocking bit for bit, and moves the bytes of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clt.distributed.code_exchange import CodeExchange, ExchangeBuffers, exchange_bytes, index_dtype
from clt.distributed.mesh import Mesh, deal_layers
from clt.records import SparseCodes
from clt.training.objective import Objective
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import target_layers

from .sharded_steps import AUXK, batch_of, make_objective

TOKENS = 32
#: Three sources on two ranks leave one slot half empty; with columns and one target, a rank without any source.
CONFIGS = {
    "uneven": CLTConfig(n_features=32, k=4, n_layers=4, d_model=8, first_offset=1),
    "short_horizon": CLTConfig(n_features=32, k=4, n_layers=5, d_model=8, n_targets=2, skip=True),
    "one_target": CLTConfig(n_features=32, k=4, n_layers=2, d_model=8, first_offset=1),
}


class BlockingExchange(CodeExchange):
    """Waits for every collective where it starts."""

    def gather(self, buffers: ExchangeBuffers, slot: int, values_BK: Tensor, indices_BK: Tensor) -> None:
        super().gather(buffers, slot, values_BK, indices_BK)
        for work in buffers.gathers[slot]:
            work.wait()

    def _sum(self, buffers: ExchangeBuffers, slot: int) -> None:
        super()._sum(buffers, slot)
        for work in (*self._unread_sums, *(work for work, _ in buffers.sums.values())):
            work.wait()
        self._unread_sums.clear()


def _gradients(objective: Objective, config: CLTConfig, mesh: Mesh, dead_LF: Tensor) -> dict[str, Tensor]:
    x, y = batch_of(config, objective.transcoder.share, mesh, 0, TOKENS)
    for parameter in objective.parameters():
        parameter.grad = None
    loss, _ = objective(x, y, config.k, dead_LF)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


def both_ways(layer_size: int, column_size: int) -> dict[str, Tensor]:
    """Gradients of the overlapped step, and whether they are the blocking one's; bytes of the overlapped one."""
    results: dict[str, Tensor] = {}
    mesh = Mesh.create(layer_size, column_size)
    for name, config in CONFIGS.items():
        if layer_size > len(target_layers(config)):
            continue
        shares = deal_layers(config, layer_size, column_size)
        objective, dead_LF = make_objective(config, mesh, torch.float32)
        before = mesh.traffic.sent("model", "all_gather"), mesh.traffic.sent("model", "reduce_scatter")
        overlapped = _gradients(objective, config, mesh, dead_LF)
        sent = [mesh.traffic.sent("model", kind) for kind in ("all_gather", "reduce_scatter")]
        blocking = _gradients(
            Objective(objective.transcoder, BlockingExchange(mesh, shares), AUXK), config, mesh, dead_LF
        )
        same = [torch.equal(value, blocking[key]) for key, value in overlapped.items()]
        results[f"{name}/same"] = torch.tensor(len(same) == len(blocking) and all(same))
        results[f"{name}/sent"] = torch.tensor(sum(sent) - sum(before))
        results[f"{name}/sources"] = torch.tensor(len(objective.transcoder.share.sources))
    return results


def one_rank_waits() -> dict[str, Tensor]:
    """Gathers while the other rank is late: they start without it; forward passes without backward leave nothing."""
    mesh = Mesh.create(2)
    config = CONFIGS["short_horizon"]
    shares = deal_layers(config, 2)
    exchange = CodeExchange(mesh, shares)
    own = len(shares[mesh.model_rank].sources)
    codes = SparseCodes(
        values=torch.rand(own, 3, 2) + mesh.model_rank, indices=torch.full((own, 3, 2), 7).int(), n_features=1 << 16
    )
    for _ in range(3):
        values = codes.values.clone().requires_grad_()
        gathered = exchange(SparseCodes(values=values, indices=codes.indices, n_features=1 << 16))
    del gathered
    values = codes.values.clone().requires_grad_()
    gathered = exchange(SparseCodes(values=values, indices=codes.indices, n_features=1 << 16))
    (gathered.values * (1 + mesh.model_rank)).sum().backward()
    assert values.grad is not None
    return {"gradient": values.grad, "values": gathered.values.detach(), "indices": gathered.indices}


def every_case() -> dict[str, Tensor]:
    """All that two ranks are asked."""
    results = {f"2x1/{key}": value for key, value in both_ways(2, 1).items()}
    results |= {f"1x2/{key}": value for key, value in both_ways(1, 2).items()}
    return results | {f"waits/{key}": value for key, value in one_rank_waits().items()}


def four_ranks() -> dict[str, Tensor]:
    """The same on four ranks."""
    meshes = [(4, 1), (2, 2), (1, 4)]
    return {f"{layer}x{column}/{k}": v for layer, column in meshes for k, v in both_ways(layer, column).items()}


@pytest.fixture(scope="module")
def ranks(run_ranks: Callable[..., list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Results of two ranks."""
    return run_ranks(every_case, 2)


def _formula(config: CLTConfig, layer_size: int, column_size: int) -> int:
    shares = deal_layers(config, layer_size, column_size)
    every = round(1 / AUXK.token_fraction)
    step, dead = (
        exchange_bytes(shares, config.n_features, tokens, config.k, torch.float32)
        for tokens in (TOKENS, -(-TOKENS // every))
    )
    return step + dead


def _assert_all(found: list[dict[str, Tensor]], layer_size: int, column_size: int) -> None:
    for name, config in CONFIGS.items():
        if layer_size > len(target_layers(config)):
            continue
        for rank in found:
            assert rank[f"{layer_size}x{column_size}/{name}/same"]
            assert rank[f"{layer_size}x{column_size}/{name}/sent"] == _formula(config, layer_size, column_size)


@pytest.mark.parametrize(("layer_size", "column_size"), [(2, 1), (1, 2)])
def test_overlapped_step_equals_the_blocking_one_and_moves_the_bytes_of_the_formula(
    layer_size: int, column_size: int, ranks: list[dict[str, Tensor]]
) -> None:
    _assert_all(ranks, layer_size, column_size)


@pytest.mark.slow
def test_overlapped_step_of_four_ranks_is_the_blocking_one(
    run_ranks: Callable[..., list[dict[str, Tensor]]],
) -> None:
    found = run_ranks(four_ranks, 4)
    for layer_size, column_size in ((4, 1), (2, 2), (1, 4)):
        _assert_all(found, layer_size, column_size)


def test_rank_without_sources_takes_part(ranks: list[dict[str, Tensor]]) -> None:
    assert [int(rank["1x2/one_target/sources"]) for rank in ranks] == [1, 0]


def test_gradient_of_gathered_codes_is_summed_over_the_ranks(ranks: list[dict[str, Tensor]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["waits/gradient"], torch.full_like(rank["waits/gradient"], 3))
        assert (rank["waits/indices"] == 7).all() and rank["waits/indices"].dtype == torch.int32
        assert torch.equal(rank["waits/values"], ranks[0]["waits/values"])
    assert {int(value) for value in ranks[0]["waits/values"][:, 0, 0]} == {0, 1}


def test_formula_counts_value_index_and_gradient_of_every_slot() -> None:
    config = CLTConfig(n_features=8192, k=32, n_layers=32, d_model=4096, n_targets=16)
    shares = deal_layers(config, 8)
    # 32 layers, 4096 tokens, k=32: bfloat16 value, int16 index and float32 gradient, seven eighths of them from others.
    assert exchange_bytes(shares, 8192, 4096, 32, torch.bfloat16) == 32 * 4096 * 32 * (2 + 2 + 4) * 7 / 8
    assert index_dtype(1 << 15) == torch.int16 and index_dtype((1 << 15) + 1) == torch.int32
    assert exchange_bytes(deal_layers(config, 1), 8192, 4096, 32, torch.bfloat16) == 0
