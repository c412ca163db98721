"""Row-sparse Adam inside the backward pass, without stored gradients of the matrices.

The forward pass is that of `clt.training.objective`. Then all ranks agree whether the loss is finite; if it is, one
read of the residuals of every own target gives the gradients of its activations and updates its decoders; the gradients
are sent to the encoders, which are updated too. AuxK's tokens are appended to those of the loss, so that a row is
updated once, by the sum of both gradients.

Weights are updated before all gradients are known: no clipping, no micro-batches, one data-parallel replica, and only
the loss is checked for NaN/inf. With beta1 > 0 momentum is Adam's only for rows whose feature fires
(`clt.kernels.common.adam`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from clt.checkpoint.columns import LAST_STEP
from clt.distributed.mesh import Mesh
from clt.kernels import ops
from clt.kernels.common.dtypes import accumulator
from clt.records import SparseCodes
from clt.step_phases import phase
from clt.training.deepspeed_engine import agree
from clt.training.engine import FIRST_MOMENT, SECOND_MOMENT, StepCheck, StepInputs
from clt.training.loss import revival
from clt.training.metrics import Observations
from clt.training.objective import ForwardPass, Objective
from clt.training.settings import OptimizerSettings

_MOMENTS = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.uint8}


class RowEngine:
    """Forward, backward and row-sparse Adam of one rank's share; implements `clt.training.engine.Engine`.

    Args:
        objective: of the share; its sparsity has no penalty.
        mesh: the processes, one data-parallel replica.
        settings: of kind row_adam.
        seed: random seed of the stochastic rounding of bfloat16 and 8-bit numbers.

    Attributes:
        adam_steps: steps taken.
    """

    def __init__(self, objective: Objective, mesh: Mesh, settings: OptimizerSettings, seed: int) -> None:
        self._objective, self._mesh = objective, mesh
        (beta1, beta2), rate = settings.betas, settings.learning_rate
        self._adam = ops.RowAdam(learning_rate=rate, beta1=beta1, beta2=beta2, eps=settings.eps)
        self.adam_steps, self._bias_rate = 0, settings.bias_rate
        self._states: dict[Tensor, ops.RowAdamState] = {}
        for name, parameter in objective.named_parameters():
            # A bias is one row that is updated in every step. It is small: its moments stay in full precision.
            rows = parameter if parameter.dim() > 1 else parameter[None]
            kept = _MOMENTS[settings.moments] if parameter.dim() > 1 else None
            own = replace(self._adam, seed=zlib.crc32(f"{seed}/{name}".encode()) >> 1)
            self._states[parameter] = ops.RowAdamState.zeros(rows, own, kept)

    @torch.no_grad()
    def train_step(
        self, parts: Iterable[StepInputs], learning_rate: float, stop: bool
    ) -> tuple[StepCheck, Observations]:
        """See `clt.training.engine.Engine.train_step`; one micro-batch, and only the loss is checked for NaN/inf."""
        (inputs,) = parts
        passed = self._objective.run(
            inputs.x_raw, inputs.y_raw, inputs.k, inputs.dead_LF, inputs.weights_B, needs_gradient=True
        )
        check = agree(self._mesh, passed.terms.total, torch.zeros_like(passed.terms.total), stop)
        if check.finite:
            self.adam_steps += 1
            transcoder = self._objective.transcoder
            hyper, bias_hyper = (
                replace(self._adam, learning_rate=rate).hyper(self.adam_steps, passed.x_LBD.device, transcoder.dtype)
                for rate in (learning_rate, learning_rate * self._bias_rate)
            )
            self._backward(passed, hyper, bias_hyper)
        return replace(check, gradient_norm=math.nan if check.finite else math.inf), passed.observations()

    def weights(self, parameter: Tensor) -> Tensor:
        """See `clt.training.engine.Engine.weights`."""
        return parameter.detach()

    def optimizer_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """See `clt.training.engine.Engine.optimizer_state`; also the step in which each row was last updated."""
        state = self._states[parameter]
        moments = {key: moment.view(parameter.shape) for key, moment in state.moments().items()}
        return moments | {LAST_STEP: state.last_step_R}

    @torch.no_grad()
    def restore(self, parameter: Tensor, weights: Tensor, state: Mapping[str, Tensor]) -> None:
        """See `clt.training.engine.Engine.restore`."""
        parameter.copy_(weights)
        own = self._states[parameter]
        keys = (SECOND_MOMENT, *(() if self._adam.beta1 == 0 else (FIRST_MOMENT,)))
        own.load({key: state[key].reshape(own.v_RD.shape) for key in keys}, state[LAST_STEP])

    @phase("backward")
    def _backward(self, passed: ForwardPass, hyper: Tensor, bias_hyper: Tensor) -> None:
        """Updates all weights; targets whose codes arrived last come first, so that sums over ranks start early."""
        merged = _Merged(self._objective, passed)
        for row in reversed(self._objective.order):
            self._move_target(row, passed, merged, hyper)
        layers = self._objective.transcoder.share.sources
        for row in reversed(range(len(layers))):
            grad_b_F = self._move_encoder(row, merged, hyper)
            self._move(self._objective.transcoder.encoder_bias(layers[row]), grad_b_F, bias_hyper)

    def _move_target(self, row: int, passed: ForwardPass, merged: _Merged, hyper: Tensor) -> None:
        transcoder = self._objective.transcoder
        layer = transcoder.share.targets[row]
        rows, W_dec_SFD = transcoder.source_rows(layer), transcoder.decoder_matrix(layer)
        # The loss is the mean over targets and channels of the weighted squares.
        scale = hyper.new_tensor(2 / (transcoder.config.d_model * self._objective.n_targets))
        grads_SNK = ops.decoder_step_(
            merged.residual(row),
            merged.values[rows],
            merged.indices[rows],
            W_dec_SFD,
            merged.csr[rows],
            self._states[W_dec_SFD],
            hyper,
            merged.weights_N,
            scale,
        )
        merged.add_gradient(rows, grads_SNK)
        grad_BD = passed.residuals[row].to(scale.dtype) * (scale * merged.weights_N[: merged.tokens, None])
        self._move(transcoder.decoder_bias(layer), grad_BD.sum(dim=0), hyper)
        if passed.x_MBD is not None:
            self._move(transcoder.skip_matrix(layer), grad_BD.T @ passed.x_MBD[row].to(grad_BD.dtype), hyper)

    def _move_encoder(self, row: int, merged: _Merged, hyper: Tensor) -> Tensor:
        """Updates W_enc of an own source; returns the gradient [F] of its b_enc."""
        transcoder = self._objective.transcoder
        layer = transcoder.share.sources[row]
        W_enc_FD, own = transcoder.encoder_matrix(layer), transcoder.source_row(layer)
        return ops.encoder_step_(
            merged.own_gradient(row),
            merged.values[own],
            merged.indices[own],
            merged.x(row),
            W_enc_FD,
            merged.csr[own : own + 1],
            self._states[W_enc_FD],
            hyper,
        )

    @phase("optimizer")
    def _move(self, parameter: Tensor, grad: Tensor, hyper: Tensor) -> None:
        """An Adam step on all rows of a small parameter."""
        state = self._states[parameter]
        rows = parameter.view(state.v_RD.shape)
        touched = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        ops.row_adam_(rows, grad.view(rows.shape).to(rows.dtype), state, hyper, touched)


class _Merged:
    """Codes, residuals and inputs of the loss's tokens, followed by those of AuxK.

    Attributes:
        tokens: B, tokens of the loss; N with those of AuxK.
        values, indices: [L,N,K] codes of all source layers, slots padded to the wider of both.
        csr: their grouping.
        weights_N: [N] factor of each token's squared error, AuxK's coefficient included.
    """

    def __init__(self, objective: Objective, passed: ForwardPass) -> None:
        self._objective, self._passed = objective, passed
        self.tokens = passed.x_LBD.shape[1]
        self.values, self.indices, csr = passed.codes.all_rows()
        wide = accumulator(self.values.dtype)
        self.weights_N = _weights(passed.weights_B, self.tokens, self.values.new_empty(0, dtype=wide))
        self._k = self.values.shape[2]
        dead = passed.dead
        if dead is not None:
            aux_values, aux_indices, _ = dead.codes.all_rows()
            k = max(self._k, aux_values.shape[2])
            self.values = torch.cat([_padded(self.values, k), _padded(aux_values, k)], dim=1)
            self.indices = torch.cat([_padded(self.indices, k), _padded(aux_indices, k)], dim=1)
            aux_B = _weights(dead.weights_B, aux_values.shape[1], self.weights_N)
            self.weights_N = torch.cat([self.weights_N, objective.settings.coefficient * aux_B])
            self._aux_k = aux_values.shape[2]
            csr = ops.feature_csr(self.values, self.indices, objective.transcoder.config.n_features)
        assert csr is not None, "codes that need gradients arrive grouped"
        self.csr = csr

    def residual(self, row: int) -> Tensor:
        """[N,D_own] residuals of an own target."""
        own, dead = self._passed.residuals[row], self._passed.dead
        return own if dead is None else torch.cat([own, dead.residuals[row]])

    def x(self, row: int) -> Tensor:
        """[N,D] encoder inputs of an own source."""
        own, dead = self._passed.x_LBD[row], self._passed.dead
        return own if dead is None else torch.cat([own, dead.x_LBD[row]])

    def add_gradient(self, rows: slice, gradient_SNK: Tensor) -> None:
        """Adds the gradients of one target's sources, which are sent to their ranks when complete."""
        self._passed.codes.add_gradient(rows, gradient_SNK[:, : self.tokens, : self._k])
        if self._passed.dead is not None:
            self._passed.dead.codes.add_gradient(rows, gradient_SNK[:, self.tokens :, : self._aux_k])

    def own_gradient(self, row: int) -> Tensor:
        """[N,K] gradient of an own source's activations, over all targets of all ranks."""
        gradient_BK, dead = self._passed.codes.own_gradient(row), self._passed.dead
        if dead is None:
            return gradient_BK
        aux_BK = dead.codes.own_gradient(row)
        lift = revival_gradient(self._objective, dead.codes.own, dead.weights_B)[row]
        aux_BK = aux_BK + self._objective.settings.revival * lift
        k = self.values.shape[2]
        return torch.cat([_padded(gradient_BK, k), _padded(aux_BK, k)])


def revival_gradient(objective: Objective, codes: SparseCodes, weights_B: Tensor | None) -> Tensor:
    """Gradient of the revival term with respect to activations.

    Args:
        objective: of the share.
        codes: dead features' codes of the own sources, [L_own,B,K].
        weights_B: [B] weight of each token; None for 1/B.

    Returns:
        [L_own,B,K].
    """
    with torch.enable_grad():
        values = codes.values.detach().requires_grad_()
        term = revival(replace(codes, values=values), objective.transcoder.n_sources, weights_B)
        return torch.autograd.grad(term, values)[0]


def _weights(weights_B: Tensor | None, tokens: int, like: Tensor) -> Tensor:
    """[B] weights in the dtype of `like`, 1/B where there are none."""
    return like.new_full((tokens,), 1 / tokens) if weights_B is None else weights_B.to(like.dtype)


def _padded(codes: Tensor, k: int) -> Tensor:
    """Codes padded with empty slots to k."""
    return pad(codes, (0, k - codes.shape[-1]))
