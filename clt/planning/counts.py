"""Memory, traffic and arithmetic of a training step, counted from the job alone.

Memory was checked against live tensors of gloo ranks under ZeRO 0, 1 and 2, traffic is that of ring collectives, and
arithmetic is exact. `tests/clt/planning/test_plan.py` holds all three to hand-computed numbers. Shape letters:
`clt.planning.job`.
"""

from __future__ import annotations

from dataclasses import dataclass

from clt.distributed.code_exchange import index_dtype, slot_count
from clt.distributed.mesh import input_layers
from clt.planning.job import Job, Sum, pairs, parameters, width
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.layers import LayerShare, source_layers, target_layers, targets_of

#: Bytes of a feature number in memory, of an activation's gradient, and of a number that all ranks add up.
INDEX, CODE_GRADIENT, SCALAR = 4, 4, 8
#: Bytes of a float32, and of an activation in a batch.
FLOAT, RAW = 4, 4
#: Most bytes of pre-activations that the Triton encoder holds at a time (`clt.kernels.gpu.encode`).
PRE_ACTIVATIONS = 512 * 2**20
#: Most numbers that DeepSpeed reduces at once (`clt.training.deepspeed_engine`).
BUCKET = 500_000_000
#: Numbers that all ranks agree on in a step: loss, norm and stop of `Engine.check`, and who failed in `Mesh.together`.
AGREED = 4


@dataclass(frozen=True, kw_only=True)
class RankMemory(Sum):
    """Peak bytes of a rank during a step.

    Attributes:
        weights: as the kernels read them.
        gradients: kept after the backward pass; 1/data of them under ZeRO.
        optimizer: moments and master copy, 1/data of them under ZeRO; and EMA weights.
        buffers: DeepSpeed's bucket, all gradients once under ZeRO-1, and the decoder gradients of AuxK for one target
            before they are accumulated.
        inputs: activations as read and standardised.
        pre_activations: those that the sparsity rule needs at the same time.
        codes: values and indices of own and of all sources, their gradients, and the grouping by feature.
        residuals: of the own targets, or of every (source, target) pair for independent sources.
        shared_decoders: decoders of all sources, if they belong to sources, with their gradients, which are also
            packed, sent and received.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    inputs: float
    pre_activations: float
    codes: float
    residuals: float
    shared_decoders: float


@dataclass(frozen=True, kw_only=True)
class StepTraffic(Sum):
    """Bytes that a rank receives, and sends, in a step, for ring collectives, which no algorithm beats by much.

    Attributes:
        values: all-gather of code values.
        indices: all-gather of feature numbers.
        code_gradients: reduce-scatter of the values' gradients.
        auxk: the same three for the codes of dead features.
        gradients: mean of the gradients over the data axis.
        weights: ZeRO's all-gather of updated weights over the data axis.
        shared_decoders: decoders that belong to sources, and their gradients.
        selection: collectives that select features, for rules other than topk.
        bookkeeping: features that fired, the finite check and the messages of `Mesh.together`.
    """

    values: float
    indices: float
    code_gradients: float
    auxk: float
    gradients: float
    weights: float
    shared_decoders: float
    selection: float
    bookkeeping: float

    @property
    def model_axis(self) -> float:
        """Bytes within a model group (layer x column)."""
        return self.values + self.indices + self.code_gradients + self.auxk + self.shared_decoders + self.selection

    @property
    def data_axis(self) -> float:
        """Bytes between data-parallel replicas."""
        return self.gradients + self.weights


@dataclass(frozen=True, kw_only=True)
class Flops(Sum):
    """Multiplications and additions of a step over all ranks.

    Attributes:
        encode: 2 N L F D, on tensor cores.
        decode: 2 N K P D, of the active features.
        decoder_gradients: 4 N K P D, of activations and decoders.
        encoder_gradients: 2 N K L D.
        skip: 4 N M D^2, forward and weights.
        auxk: all of these for AuxK's tokens and features, without skip.
    """

    encode: float
    decode: float
    decoder_gradients: float
    encoder_gradients: float
    skip: float
    auxk: float


def memory(job: Job, share: LayerShare) -> RankMemory:
    """Peak bytes of one rank during a step.

    With p parameters of the share, n replicas, and w, g, m, o bytes of a weight, gradient, master and moments: ZeRO-0
    holds p (w + g + m + o) and flattens gradients in buckets. ZeRO-1 and 2 hold p w + p (g + 4 + o) / n, where the 4 is
    DeepSpeed's float32 master, made for float32 weights too; ZeRO-1 also holds all gradients, p g, until they are
    reduced, and bfloat16 gradients are widened to float32 for the step. EMA weights are 4 p more.

    Args:
        job: the job.
        share: the rank's.

    Returns:
        The bytes.
    """
    kind, zero, tokens, architecture = job.numerics, job.mesh.zero, job.part, job.architecture
    own, columns = parameters(architecture, share).total, width(architecture, share)
    split = job.mesh.data if zero else 1
    matrices = (
        1 if architecture.tied_decoders == "target" else max(pairs(architecture, [target]) for target in share.targets)
    )
    largest = matrices * architecture.n_features * columns
    buffers = kind.gradient * (min(own, max(BUCKET, largest)) + (own if zero == 1 else 0))
    if job.auxk_batch:
        buffers += kind.gradient * largest
    if kind.master:
        buffers += kind.master * own // split
    mean = FLOAT * own if job.config.optimizer.ema_decay else 0
    x_layers, n_targets = len(input_layers(architecture, share)), len(share.targets)
    raw = job.batch * (x_layers + n_targets) * architecture.d_model * RAW
    standardised = tokens * (x_layers * architecture.d_model + n_targets * columns) * kind.weight
    return RankMemory(
        weights=own * kind.weight,
        gradients=own * kind.gradient / split,
        optimizer=own * (kind.moments + (max(kind.master, FLOAT) if zero else kind.master)) / split + mean,
        buffers=buffers,
        inputs=raw + standardised,
        pre_activations=_pre_activations(job, len(share.sources)),
        codes=_code_memory(job, len(share.sources)),
        # AuxK stacks the residuals of its tokens and keeps its own.
        residuals=_residuals(architecture, share) * columns * kind.weight * (tokens + 2 * job.auxk_part),
        shared_decoders=len(source_layers(architecture))
        * _shared_numbers(architecture, columns)
        * (kind.weight + 3 * CODE_GRADIENT),
    )


def _residuals(architecture: CLTConfig, share: LayerShare) -> int:
    """Residuals of a rank: one per target, or per (source, target) pair for independent sources."""
    return len(share.targets) if architecture.independent is None else pairs(architecture, share.targets)


def _shared_numbers(architecture: CLTConfig, columns: int) -> int:
    """Numbers (decoder and scales) that one source sends to a rank, if decoders belong to sources."""
    if architecture.tied_decoders != "source":
        return 0
    return architecture.n_features * (
        columns + max(len(targets_of(architecture, layer)) for layer in source_layers(architecture))
    )


def _pre_activations(job: Job, own_sources: int) -> int:
    """Bytes: topk holds a chunk of one layer, the other rules hold those of all own layers several times."""
    layer = job.part * job.architecture.n_features * job.numerics.weight
    if job.architecture.sparsity.kind == "topk" and not job.architecture.sparsity.uses_decoder_norm:
        return min(layer, PRE_ACTIVATIONS) if own_sources else 0
    # As computed, as compared, stacked, and for joint_topk token by token (`clt.transcoder.encoding`,
    # `clt.transcoder.sparsity`).
    return (4 if job.architecture.sparsity.kind == "joint_topk" else 3) * own_sources * layer


def _code_memory(job: Job, own_sources: int) -> int:
    """Bytes: own codes; those of all sources, also as sent; their gradients; slot and token numbers by feature."""
    slots = job.part * job.slots + job.auxk_part * job.auxk_slots
    code, layers = job.numerics.weight + INDEX, len(source_layers(job.architecture))
    received = code + index_dtype(job.architecture.n_features).itemsize + CODE_GRADIENT + 2 * INDEX
    return slots * (own_sources * code + layers * received)


def traffic(job: Job) -> StepTraffic:
    """Bytes that a rank receives in a step in which features can be dead.

    With R = layer x column ranks of a model group of up to S encoders each, B tokens, K slots, n replicas and p
    parameters of the largest share. Model axis, as `clt.distributed.code_exchange.exchange_bytes`: (R-1) S B K times w
    for the values, 2 (4 from F = 32,769 on) for the indices and 4 for their gradients; for AuxK the same with its own
    tokens and slots. Data axis: an all-reduce of the gradients, 2 p g (n-1)/n (what DeepSpeed does under ZeRO-1 and 2
    too, under ZeRO-2 for every micro-batch) and, under these, an all-gather of the weights, p w (n-1)/n.

    Args:
        job: the job.

    Returns:
        The bytes, including the padding of ranks with fewer than S encoders.
    """
    shares, kind, mesh = job.shares(), job.numerics, job.mesh
    most_sources, index = slot_count(shares), index_dtype(job.architecture.n_features).itemsize
    slots = (mesh.model - 1) * most_sources * job.batch * job.slots
    auxk_slots = (mesh.model - 1) * most_sources * job.auxk_batch * job.auxk_slots
    own = max(parameters(job.architecture, share).total for share in shares)
    return StepTraffic(
        values=slots * kind.weight,
        indices=slots * index,
        code_gradients=slots * CODE_GRADIENT,
        auxk=auxk_slots * (kind.weight + index + CODE_GRADIENT),
        gradients=all_reduce(own * kind.gradient, mesh.data) * (job.config.data.micro_batches if mesh.zero == 2 else 1),
        weights=own * kind.weight * (mesh.data - 1) / mesh.data if mesh.zero else 0,
        shared_decoders=(mesh.model - 1)
        * most_sources
        * _shared_numbers(job.architecture, width(job.architecture, shares[0]))
        * (kind.weight + CODE_GRADIENT)
        * job.config.data.micro_batches,
        selection=_selection(job),
        bookkeeping=all_reduce(most_sources * job.architecture.n_features, mesh.data)
        + all_reduce(AGREED * SCALAR, mesh.world),
    )


def _selection(job: Job) -> float:
    """Bytes of the all-reduces of `clt.transcoder.sparsity`, of 8-byte numbers.

    Decoder norms: L F over the model group. joint_topk: 256 B per radix digit (one per byte of a value), L B ties and
    one count. batch_topk: 256 per digit and data (L + 1) ties over the world, and one count.
    """
    architecture, mesh, digits = job.architecture, job.mesh, job.numerics.weight
    layers, kind = len(source_layers(architecture)), architecture.sparsity.kind
    # The penalty's norms have gradients, which are summed too.
    numbers = (
        layers
        * architecture.n_features
        * (architecture.sparsity.uses_decoder_norm + 2 * architecture.sparsity.has_penalty)
    )
    numbers += 0 if kind == "topk" else 1
    if kind == "joint_topk":
        numbers += (256 * digits + layers) * job.batch
    everywhere = 256 * digits + mesh.data * (layers + 1) if kind == "batch_topk" else 0
    return all_reduce(numbers * SCALAR, mesh.model) + all_reduce(everywhere * SCALAR, mesh.world)


def all_reduce(n_bytes: float, ranks: int) -> float:
    """Bytes that each of r ranks receives in a ring all-reduce of b bytes: 2 b (r - 1) / r."""
    return 2 * n_bytes * (ranks - 1) / ranks


def flops(job: Job) -> Flops:
    """Arithmetic of a step over all ranks and replicas; only active features are decoded."""
    architecture, tokens = job.architecture, job.config.data.batch_tokens
    n_sources, n_pairs = len(source_layers(architecture)), pairs(architecture)
    auxk_tokens = job.auxk_batch * job.mesh.data
    encode, slots = 2.0 * n_sources * architecture.n_features * architecture.d_model, float(tokens * architecture.k)
    auxk_slots = float(auxk_tokens * job.auxk_slots)
    return Flops(
        encode=encode * tokens,
        decode=2 * slots * n_pairs * architecture.d_model,
        decoder_gradients=4 * slots * n_pairs * architecture.d_model,
        encoder_gradients=2 * slots * n_sources * architecture.d_model,
        skip=4.0 * tokens * len(target_layers(architecture)) * architecture.d_model**2 if architecture.skip else 0.0,
        auxk=encode * auxk_tokens + auxk_slots * (6 * n_pairs + 2 * n_sources) * architecture.d_model,
    )


def dense_flops(job: Job) -> float:
    """FLOP of a step that decodes every feature, 2 N F D (2 L + 3 P), without AuxK and skip."""
    architecture = job.architecture
    products = 2 * len(source_layers(architecture)) + 3 * pairs(architecture)
    return 2.0 * job.config.data.batch_tokens * architecture.n_features * architecture.d_model * products


def store_bytes_per_token(architecture: CLTConfig, itemsize: int = 2) -> int:
    """Bytes of activations that a store holds per token: input and output of every layer's MLP, 2 L D each."""
    return 2 * architecture.n_layers * architecture.d_model * itemsize
