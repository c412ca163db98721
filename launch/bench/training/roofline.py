"""Roofline of the training benchmark: minimum time of a step by ceilings measured at its sizes.

The minimum is `clt.planning.speed.step_time` with measured rates instead of vendors' figures: arithmetic, gathered rows
and streamed bytes of a rank as `clt.planning.counts` counts them, each at its ceiling, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clt.launch.bench.common.ceilings import Ceiling, gather_ceiling, product_ceiling
from clt.launch.bench.training.sizes import TrainSize, planned_job
from clt.planning.job import Job
from clt.planning.speed import MachineModel, Rates, StepTime, step_time

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, kw_only=True)
class SizeCeilings:
    """Ceilings at one size.

    Attributes:
        products: the encoder's product, by bytes of a weight.
        gather: rows of a decoder, summed per token.
    """

    products: dict[int, Ceiling]
    gather: Ceiling


def size_ceilings(size: TrainSize, device: torch.device, rounds: int) -> SizeCeilings:
    """Measures the ceilings at a size, in the dtypes of its variants.

    Args:
        size: the size.
        device: where.
        rounds: runs of each.
    """
    shape = size.batch_tokens, size.d_model, size.n_features
    widths = sorted({planned_job(size, variant).numerics.weight for variant in size.variants})
    products = {width: product_ceiling(shape, device, _DTYPES[width], rounds) for width in widths}
    return SizeCeilings(products=products, gather=gather_ceiling(shape, size.k, device, rounds))


def measured_machine(memory: Sequence[Ceiling], size: SizeCeilings) -> MachineModel:
    """This machine for `clt.planning.speed`, with measured rates and without links."""
    read, copy, *cache = memory
    stream = max(read.rate, copy.rate)
    gather = max(size.gather.rate, *(ceiling.rate for ceiling in cache), 0.0)
    products = {width: ceiling.rate for width, ceiling in size.products.items()}
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
    """Minimum seconds of one rank's step, without links, which a rank alone does not have."""
    return replace(step_time(job, machine), model_axis=0.0, data_axis=0.0)
