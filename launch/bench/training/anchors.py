"""What the machine can do at most at the sizes of the training benchmark, and the least time of a step by that.

The least time is `clt.planning.speed.step_time`, fed with what was measured here instead of vendors' figures:
arithmetic, gathered rows and streamed bytes of a rank as `clt.planning.counts` counts them, each at its ceiling, one
after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clt.launch.bench.kernels.anchors import Anchor, product_anchor
from clt.launch.bench.kernels.data import Size as ProductSize
from clt.launch.bench.kernels.measure import time_runs
from clt.launch.bench.training.sizes import Size, planned_job
from clt.planning.job import Job
from clt.planning.speed import MachineModel, Rates, StepTime, step_time

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, kw_only=True)
class SizeAnchors:
    """Ceilings of one size.

    Attributes:
        products: the encoder's product, by bytes of a weight.
        gather: rows of a decoder, summed per token.
    """

    products: dict[int, Anchor]
    gather: Anchor


def size_anchors(size: Size, device: torch.device, rounds: int) -> SizeAnchors:
    """Measures the ceilings of a size, in the types of its variants."""
    shape = ProductSize(
        name=size.name,
        d_model=size.d_model,
        n_features=size.n_features,
        n_tokens=size.batch_tokens,
        k=size.k,
        n_sources=1,
    )
    widths = sorted({planned_job(size, variant).numerics.weight for variant in size.variants})
    products = {width: product_anchor(shape, device, _DTYPES[width], rounds) for width in widths}
    return SizeAnchors(products=products, gather=_gather_anchor(size, device, rounds))


def anchored_machine(memory: tuple[Anchor, ...], size: SizeAnchors) -> MachineModel:
    """The machine as `clt.planning.speed` takes one, all of whose rates were measured; without links."""
    read, copy, *cache = memory
    stream = max(read.rate, copy.rate)
    gather = max(size.gather.rate, *(anchor.rate for anchor in cache), 0.0)
    products = {width: anchor.rate for width, anchor in size.products.items()}
    most = max(products.values())
    return MachineModel(
        name="this machine",
        memory=0,
        usable=1,
        rates=Rates(
            product_low=products.get(2, most),
            product_float32=products.get(4, most),
            gather=gather,
            gather_back=gather,
            stream_back=stream,
            stream=stream,
            source="measured in this run",
        ),
        per_node=1,
        node_link=1,
        network=1,
    )


def least_time(job: Job, machine: MachineModel) -> StepTime:
    """Least seconds of one rank's step by the ceilings, links left out: a rank alone has none."""
    return replace(step_time(job, machine), model_axis=0.0, data_axis=0.0)


def _gather_anchor(size: Size, device: torch.device, rounds: int) -> Anchor:
    """Reads k random rows per token and writes their sum."""
    draw = torch.Generator(device).manual_seed(2)
    rows_NK = torch.randint(size.n_features, (size.batch_tokens, size.k), generator=draw, device=device)
    table_FD = torch.randn(size.n_features, size.d_model, generator=draw, device=device)

    def run() -> object:
        return torch.nn.functional.embedding_bag(rows_NK, table_FD, mode="sum")

    for _ in range(2):
        run()
    timing = time_runs(run, device, rounds)
    amount = (rows_NK.numel() + size.batch_tokens) * size.d_model * table_FD.element_size()
    name = f"gather {size.batch_tokens} x {size.k} rows of {size.d_model}, float32"
    return Anchor(name=name, amount=amount, unit="B/s", best_s=timing.best_s, median_s=timing.median_s)
