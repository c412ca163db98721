"""How long a training step should take on a named machine: a roofline model. Its results are projections.

The time of a rank is the sum over its operations of arithmetic, gathered rows and streamed bytes, each over the rate
that the machine is taken to achieve; then the links, as if nothing overlapped. Launches, waiting for data and the
latency of collectives are left out. Where the rates come from stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from clt.planning.counts import INDEX, StepTraffic, traffic
from clt.planning.job import Job, Sum, pairs, parameters, width
from clt.transcoder.layers import LayerShare


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device is taken to achieve.

    Attributes:
        product_low: FLOP/s of the encoder's product in bfloat16.
        product_float32: the same in float32, without TF32, which training does not turn on.
        gather: bytes/s of decoder rows in the forward pass.
        gather_back: bytes/s of rows of gradients and inputs in the backward pass.
        stream_back: bytes/s of weights read and their gradients written in the backward pass.
        stream: bytes/s of everything else, the optimizer above all.
        source: where the numbers come from.
    """

    product_low: float
    product_float32: float
    gather: float
    gather_back: float
    stream_back: float
    stream: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and what connects it.

    Attributes:
        name: what `clt plan --gpu` calls it.
        memory: bytes of a device.
        usable: share of them that a job can fill: CUDA context, NCCL's buffers and fragmentation take the rest.
        rates: of a device.
        per_node: devices that the node's link connects.
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


#: Vendors' bfloat16 (dense) and float32 FLOP/s, bytes/s of memory, bytes of memory, bytes/s of NVLink per direction.
_SHEETS = {
    "h200": (989e12, 67e12, 4.8e12, 141e9, 450e9),
    "h100": (989e12, 67e12, 3.35e12, 80e9, 450e9),
    "a100": (312e12, 19.5e12, 2.04e12, 80e9, 300e9),
}
#: Measured on an H200 (research note kernels.md): 790 of 989 TFLOP/s, 4.3 of 4.8 TB/s; taken for the others too.
_PRODUCT, _STREAM = 0.8, 0.9
#: Rows are gathered column chunk by column chunk, so that those in use stay in L2. For reads of H200's L2 9.7 TB/s were
#: published; three quarters of that is the note's planning value, which no kernel of ours has shown yet. The H100 has
#: the same L2; of the A100's the note says nothing, so that it gathers from memory here.
_L2_GATHER = 7.3e12
#: Guesses: NVLink and network at 0.8; 400 Gb/s of network for every GPU; 0.9 of a GPU's memory for the job.
_LINK, _NETWORK, _USABLE = 0.8, 50e9, 0.9


def _gpu(name: str) -> Machine:
    low, single, memory_rate, memory, link = _SHEETS[name]
    gather = memory_rate * _STREAM if name == "a100" else _L2_GATHER
    return Machine(
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
            source="vendor's figures times assumed efficiencies, nothing measured",
        ),
        per_node=8,
        node_link=link * _LINK,
        network=_NETWORK * _LINK,
    )


#: Rates of benchmarks/kernels.md for one process with two threads, whose ranks would share the same two cores.
_CPU = Machine(
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
        auxk: all of these for AuxK; its decoder gradients are added to those of the loss, which costs three passes.
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


def step_time(job: Job, machine: Machine) -> StepTime:
    """Projected seconds of a step: those of the rank with most to do.

    Args:
        job: the job.
        machine: where it runs, one device per rank.

    Returns:
        The seconds.
    """
    moved = traffic(job)
    return max((_rank_time(job, share, machine, moved) for share in job.shares()), key=lambda time: time.total)


def _rank_time(job: Job, share: LayerShare, machine: Machine, moved: StepTraffic) -> StepTime:
    kind, rates, mesh = job.numerics, machine.rates, job.mesh
    forward, backward, encoder_back, encode = _passes(job, share, rates, job.batch, job.architecture.k)
    auxk = sum(_passes(job, share, rates, job.auxk_batch, job.auxk_slots)) if job.auxk_batch else 0.0
    decoders = parameters(job.architecture, share).decoders
    if job.auxk_batch:
        # Adding to a gradient that is there reads both and writes one; the pass itself counts the writing.
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
    # Where k is a large share of F, products over all features are faster, and the kernels take them.
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


def _link(machine: Machine, ranks: int) -> float:
    """Bytes/s between ranks: neighbouring ranks share a node, so a group of more than a node uses the network."""
    return machine.node_link if ranks <= machine.per_node else machine.network
