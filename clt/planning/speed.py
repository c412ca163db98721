"""Roofline model of the time of a training step on a named machine. Its results are projections.

The time of a rank is the sum over its operations of arithmetic, gathered rows and streamed bytes, each divided by the
rate that the machine is assumed to achieve, plus communication, as if nothing overlapped. Kernel launches, waiting for
data and the latency of collectives are left out. The sources of the rates are given beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from clt.planning.counts import INDEX, StepTraffic, traffic
from clt.planning.job import Job, Sum, pairs, parameters, width
from clt.transcoder.layers import LayerShare


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that a device is assumed to achieve.

    Attributes:
        product_low: FLOP/s of the encoder's product in bfloat16.
        product_float32: the same in float32, without TF32, which training does not turn on.
        gather: bytes/s of decoder rows in the forward pass.
        gather_back: bytes/s of rows of gradients and inputs in the backward pass.
        stream_back: bytes/s of weights read and their gradients written in the backward pass.
        stream: bytes/s of everything else, the optimizer above all.
        source: of the numbers.
    """

    product_low: float
    product_float32: float
    gather: float
    gather_back: float
    stream_back: float
    stream: float
    source: str


@dataclass(frozen=True, kw_only=True)
class MachineModel:
    """Device and links of a machine, as the roofline model needs them.

    Attributes:
        name: of `clt plan --gpu`.
        memory: bytes of a device.
        usable: share of the memory that a job can use, after CUDA context, NCCL buffers and fragmentation.
        rates: of a device.
        per_node: devices of a node.
        node_link: bytes/s that a device receives within a node.
        network: bytes/s that a device receives from other nodes.
    """

    name: str
    memory: float
    usable: float
    rates: Rates
    per_node: int
    node_link: float
    network: float


#: Vendor data: bfloat16 (dense), float32 FLOP/s, bytes/s of memory, bytes of memory, bytes/s of NVLink per direction.
_SHEETS = {
    "h200": (989e12, 67e12, 4.8e12, 141e9, 450e9),
    "h100": (989e12, 67e12, 3.35e12, 80e9, 450e9),
    "a100": (312e12, 19.5e12, 2.04e12, 80e9, 300e9),
}
#: Measured on an H200 (research note kernels.md): 790 of 989 TFLOP/s, 4.3 of 4.8 TB/s; assumed for the others too.
_PRODUCT, _STREAM = 0.8, 0.9
#: Rows are gathered column chunk by column chunk, so that those in use stay in L2. For reads of H200's L2 9.7 TB/s were
#: published; three quarters of that is the note's planning value, which no kernel of this project has reached yet. The
#: H100 has the same L2; the note has no value for the A100, which gathers from memory here.
_L2_GATHER = 7.3e12
#: Guesses: NVLink and network at 0.8; 400 Gb/s of network for every GPU; 0.9 of a GPU's memory for the job.
_LINK, _NETWORK, _USABLE = 0.8, 50e9, 0.9


def _gpu(name: str) -> MachineModel:
    low, single, memory_rate, memory, link = _SHEETS[name]
    gather = memory_rate * _STREAM if name == "a100" else _L2_GATHER
    return MachineModel(
        name=name,
        memory=memory,
        usable=_USABLE,
        rates=Rates(
            product_low=low * _PRODUCT,
            product_float32=single * _PRODUCT,
            gather=gather,
            gather_back=gather,
            stream_back=memory_rate * _STREAM,
            stream=memory_rate * _STREAM,
            source="vendor data times assumed efficiencies, nothing measured",
        ),
        per_node=8,
        node_link=link * _LINK,
        network=_NETWORK * _LINK,
    )


#: Rates of benchmarks/kernels.md for one process with two threads; several ranks would share these two cores.
_CPU = MachineModel(
    name="cpu",
    memory=24e9,
    usable=0.9,
    rates=Rates(
        product_low=0.145e12,
        product_float32=0.145e12,
        gather=43e9,
        gather_back=9.7e9,
        stream_back=9.7e9,
        stream=40e9,
        source="benchmarks/kernels.md, 2 cores, float32",
    ),
    per_node=1,
    node_link=1e9,
    network=1e9,
)

MACHINES = {machine.name: machine for machine in (*map(_gpu, _SHEETS), _CPU)}


@dataclass(frozen=True, kw_only=True)
class StepTime(Sum):
    """Seconds of a step of one rank.

    Attributes:
        encode: product and selection.
        decode: gather of the active features' rows, and the residuals.
        decoder_gradients: gather, weights read, gradients written.
        encoder_gradients: the same of the encoders.
        auxk: all of these for AuxK; accumulating its decoder gradients costs three passes.
        optimizer: clipping and Adam; 1/data of it under ZeRO.
        model_axis: codes and their gradients.
        data_axis: gradients, and weights under ZeRO.
    """

    encode: float
    decode: float
    decoder_gradients: float
    encoder_gradients: float
    auxk: float
    optimizer: float
    model_axis: float
    data_axis: float


def step_time(job: Job, machine: MachineModel) -> StepTime:
    """Projected seconds of a step: those of the slowest rank.

    Args:
        job: the job.
        machine: the machine, one device per rank.

    Returns:
        The seconds.
    """
    moved = traffic(job)
    return max((_rank_time(job, share, machine, moved) for share in job.shares()), key=lambda time: time.total)


def _rank_time(job: Job, share: LayerShare, machine: MachineModel, moved: StepTraffic) -> StepTime:
    kind, rates, mesh = job.numerics, machine.rates, job.mesh
    forward, backward, encoder_back, encode = _passes(job, share, rates, job.batch, job.architecture.k)
    auxk = sum(_passes(job, share, rates, job.auxk_batch, job.auxk_slots)) if job.auxk_batch else 0.0
    decoders = parameters(job.architecture, share).decoders
    if job.auxk_batch:
        # Accumulating reads both gradients and writes one; the pass itself counts the write.
        auxk += 2 * decoders * kind.gradient / rates.stream
    own = parameters(job.architecture, share).total / (mesh.data if mesh.zero else 1)
    skip = 4.0 * job.batch * parameters(job.architecture, share).skip
    return StepTime(
        encode=encode,
        decode=forward + skip / _product(job, rates),
        decoder_gradients=backward,
        encoder_gradients=encoder_back,
        auxk=auxk,
        # The norm reads the gradients once, clipping reads and writes them.
        optimizer=own * (kind.optimizer_traffic + 3 * kind.gradient) / rates.stream,
        model_axis=moved.model_axis / _link(machine, mesh.model),
        data_axis=moved.data_axis / _link(machine, mesh.world),
    )


def _passes(job: Job, share: LayerShare, rates: Rates, tokens: int, slots: int) -> tuple[float, float, float, float]:
    """Seconds of decode, decoder gradients, encoder gradients and encode for some tokens."""
    architecture, size, columns = job.architecture, job.numerics.weight, width(job.architecture, share)
    n_sources, n_pairs = len(share.sources), pairs(architecture, share.targets)
    rows, matrix = tokens * slots * columns * size, architecture.n_features * columns * size
    # Where k is a large share of F, dense products are faster, and the kernels use them.
    product = 2.0 * tokens * architecture.n_features * columns / _product(job, rates)
    residuals = 2 * len(share.targets) * tokens * columns * size / rates.stream
    forward = n_pairs * min(rows / rates.gather, product) + residuals
    backward = n_pairs * (min(rows / rates.gather_back, 2 * product) + 2 * matrix / rates.stream_back)
    x_rows, x_matrix = (
        tokens * slots * architecture.d_model * size,
        architecture.n_features * architecture.d_model * size,
    )
    encoder_back = n_sources * (x_rows / rates.gather_back + x_matrix / rates.stream_back)
    pre_activations = 2 * tokens * architecture.n_features * size + tokens * slots * (size + INDEX)
    encode = (
        2.0 * tokens * architecture.n_features * architecture.d_model / _product(job, rates)
        + pre_activations / rates.stream
    )
    return forward, backward, encoder_back, n_sources * encode


def _product(job: Job, rates: Rates) -> float:
    return rates.product_float32 if job.numerics.weight == 4 else rates.product_low


def _link(machine: MachineModel, ranks: int) -> float:
    """Bytes/s between ranks: neighbouring ranks share a node, so a group of more than a node uses the network."""
    return machine.node_link if ranks <= machine.per_node else machine.network
