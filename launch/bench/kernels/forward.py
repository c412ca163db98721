"""The forward operations of the kernels' benchmark: encode, select, decode, loss, grouping, batch threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clt.kernels import ops
from clt.launch.bench.kernels.data import Problem
from clt.launch.bench.kernels.measure import Case, Contender, Runner
from clt.launch.bench.kernels.reference import Reference
from clt.launch.bench.kernels.rivals import Method, bag_decode, dense_reconstruction, loss_of, product_topk

OURS, TORCH_TOPK = "clt", "product, torch.topk"


def encode_case(problem: Problem, reference: Reference) -> Case:
    """Encoder with exact TopK."""
    arguments = problem.x_BD, problem.W_enc_FD, problem.b_enc_F, problem.size.k
    return Case(
        op="encode_topk",
        title="Encoder product, bias, ReLU and exact TopK.",
        works=(problem.shape.encode(),),
        contenders=(
            Contender(name=OURS, make=lambda: Runner(run=lambda: ops.encode_topk(*arguments))),
            Contender(name=TORCH_TOPK, make=lambda: Runner(run=lambda: product_topk(*arguments))),
        ),
        error=reference.encode_error,
    )


def select_case(problem: Problem, reference: Reference) -> Case:
    """TopK of stored pre-activations."""
    pre_BF = torch.addmm(problem.b_enc_F, problem.x_BD, problem.W_enc_FD.T)
    k = problem.size.k
    return Case(
        op="select_topk",
        title="Exact TopK of stored pre-activations.",
        works=(problem.shape.select(),),
        contenders=(
            Contender(name=OURS, make=lambda: Runner(run=lambda: ops.select_topk(pre_BF, k))),
            Contender(name="torch.topk", make=lambda: Runner(run=lambda: pre_BF.topk(k, dim=1, sorted=False))),
        ),
        error=lambda outputs: reference.select_error(pre_BF, outputs),
    )


def threshold_case(problem: Problem) -> Case:
    """BatchTopK: one threshold for the whole batch."""
    pre_BF = torch.addmm(problem.b_enc_F, problem.x_BD, problem.W_enc_FD.T)
    n = problem.size.n_tokens * problem.size.k
    capacity = min(4 * problem.size.k, problem.size.n_features)

    def ours() -> tuple[torch.Tensor, ...]:
        return ops.select_above(pre_BF, *ops.batch_threshold(pre_BF, n), capacity)

    return Case(
        op="batch_topk",
        title=f"BatchTopK of stored pre-activations: the {n:,} largest of the batch.",
        works=(problem.shape.threshold(n),),
        contenders=(
            Contender(name=f"{OURS}, threshold", make=lambda: Runner(run=lambda: ops.batch_threshold(pre_BF, n))),
            Contender(name=f"{OURS}, threshold and codes", make=lambda: Runner(run=ours)),
            Contender(name="torch.topk", make=lambda: Runner(run=lambda: pre_BF.flatten().topk(n, sorted=False))),
        ),
    )


def decode_case(problem: Problem, reference: Reference, peers: Sequence[Method]) -> Case:
    """Reconstruction of one target."""
    codes = problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD, problem.b_dec_D
    return Case(
        op="decode",
        title=f"Reconstruction from {problem.size.n_sources} source layers.",
        works=(problem.shape.decode(),),
        contenders=(
            Contender(name=OURS, make=lambda: Runner(run=lambda: ops.decode(*codes))),
            Contender(name="embedding_bag", make=lambda: Runner(run=lambda: bag_decode(problem))),
            Contender(name="dense", make=lambda: Runner(run=lambda: dense_reconstruction(problem))),
            *(_peer_decode(problem, peer) for peer in peers),
        ),
        error=reference.decode_error,
    )


def _peer_decode(problem: Problem, peer: Method) -> Contender:
    def make() -> Runner:
        indices_SBK = problem.indices_SBK.long()

        def run() -> torch.Tensor:
            y_BD = problem.b_dec_D.expand(problem.size.n_tokens, -1)
            for values_BK, indices_BK, W_FD in zip(problem.values_SBK, indices_SBK, problem.W_dec_SFD, strict=True):
                y_BD = y_BD + peer.decode((values_BK, indices_BK), W_FD)
            return y_BD

        return Runner(run=run)

    return Contender(name=peer.name, make=make, may_fail=peer.may_fail)


def loss_case(problem: Problem, reference: Reference) -> Case:
    """Reconstruction, squared error and residual."""
    codes = problem.values_SBK, problem.indices_SBK, problem.W_dec_SFD, problem.b_dec_D
    y_BD = problem.y_BD
    return Case(
        op="decode_loss",
        title=f"Reconstruction from {problem.size.n_sources} source layers, squared error and residual.",
        works=(problem.shape.decode_loss(),),
        contenders=(
            Contender(name=OURS, make=lambda: Runner(run=lambda: ops.decode_loss(*codes, y_BD))),
            Contender(
                name=f"{OURS} decode, then loss", make=lambda: Runner(run=lambda: loss_of(ops.decode(*codes), y_BD))
            ),
            Contender(name="embedding_bag", make=lambda: Runner(run=lambda: loss_of(bag_decode(problem), y_BD))),
            Contender(name="dense", make=lambda: Runner(run=lambda: loss_of(dense_reconstruction(problem), y_BD))),
        ),
        error=reference.loss_error,
    )


def csr_case(problem: Problem) -> Case:
    """Grouping of all source layers by feature."""
    codes = problem.values_SBK, problem.indices_SBK
    n_features = problem.size.n_features
    return Case(
        op="feature_csr",
        title=f"Codes of {problem.size.n_sources} layers grouped by feature.",
        works=(problem.shape.csr(problem.size.n_sources),),
        contenders=(
            Contender(name=OURS, make=lambda: Runner(run=lambda: ops.feature_csr(*codes, n_features).tensors())),
            Contender(
                name="torch.sort alone",
                make=lambda: Runner(run=lambda: tuple(problem.indices_SBK.flatten(1).sort(dim=1, stable=True))),
            ),
        ),
    )
