"""Interface of a kernel backend: the operations that an implementation provides, and what their gradients take.

`clt.kernels.ops` documents every operation. Shape letters: S source layers of one target, B tokens, D d_model, F
features per layer, K slots per token and layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from clt.kernels.common.adam import RowAdamState
from clt.kernels.common.csr import FeatureCSR


@dataclass(frozen=True)
class DecodeInputs:
    """Inputs of `decode`, which are those of `decode_loss` too.

    Attributes:
        values_SBK: [S,B,K] activations, 0 in empty slots.
        indices_SBK: [S,B,K] int32 feature numbers, 0 in empty slots.
        W_dec_SFD: [S,F,D] decoders.
        b_dec_D: [D] bias.
        skip_BD: [B,D] added to the sum, or None.
    """

    values_SBK: Tensor
    indices_SBK: Tensor
    W_dec_SFD: Tensor
    b_dec_D: Tensor
    skip_BD: Tensor | None


@dataclass(frozen=True)
class DecoderGradInputs:
    """Inputs of the gradients of `decode` with respect to activations and decoders.

    Attributes:
        grad_BD: [B,D] gradient of the reconstruction, up to the two factors below.
        values_SBK: [S,B,K] activations.
        indices_SBK: [S,B,K] int32 feature numbers.
        W_dec_SFD: [S,F,D] decoders.
        csr: slots of the S layers, grouped by feature.
        weights_B: [B] factor per token, None for 1.
        scale: [] factor, None for 1.
    """

    grad_BD: Tensor
    values_SBK: Tensor
    indices_SBK: Tensor
    W_dec_SFD: Tensor
    csr: FeatureCSR
    weights_B: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class EncoderGradInputs:
    """Inputs of the gradients of `encode_topk` with respect to its weights and bias.

    Attributes:
        grad_values_BK: [B,K] gradient of the activations; ignored in empty slots.
        values_BK: [B,K] activations.
        indices_BK: [B,K] int32 feature numbers.
        x_BD: [B,D] encoder inputs.
        n_features: F.
        csr: slots of this one layer, grouped by feature.
    """

    grad_values_BK: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    x_BD: Tensor
    n_features: int
    csr: FeatureCSR


class KernelBackend(Protocol):
    """The operations of a backend; the modules `reference`, `cpu` and `triton_backend` provide them as functions."""

    def preactivations(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor: ...

    def select_topk(self, pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]: ...

    def encode_topk(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]: ...

    def batch_threshold(
        self, pre_BF: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def select_above(
        self, pre_BF: Tensor, threshold: Tensor, quota: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def decode(self, inputs: DecodeInputs) -> Tensor: ...

    def decode_loss(self, inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def decoder_grad(self, inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
        """Gradients of `decode`.

        Args:
            inputs: of the gradients.
            need_W: whether the gradient of the decoders is wanted.

        Returns:
            grad_values [S,B,K] in the accumulator's dtype, 0 in empty slots, and grad_W [S,F,D] in the dtype of W_dec,
            or None if it is not wanted.
        """

    def encoder_grad(self, inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
        """grad_W [F,D] and grad_b [F] of `encode_topk`, in the dtype of x."""

    def decoder_step_(self, inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor) -> Tensor:
        """`decoder_grad` and row Adam on the decoders in place; returns grad_values, taken before the update."""

    def encoder_step_(self, inputs: EncoderGradInputs, W_enc_FD: Tensor, state: RowAdamState, hyper: Tensor) -> Tensor:
        """`encoder_grad` and row Adam on the encoder in place; returns grad_b."""

    def row_adam_(self, param: Tensor, grad: Tensor, state: RowAdamState, hyper: Tensor, touched: Tensor) -> None: ...


@dataclass(frozen=True)
class StoredGradientSteps:
    """Optimizer steps of a backend that stores the weight gradient, and then has row Adam read it.

    Attributes:
        decoder_grad: as `KernelBackend.decoder_grad`.
        encoder_grad: as `KernelBackend.encoder_grad`.
        row_adam_: as `KernelBackend.row_adam_`.
    """

    decoder_grad: Callable[[DecoderGradInputs], tuple[Tensor, Tensor | None]]
    encoder_grad: Callable[[EncoderGradInputs], tuple[Tensor, Tensor]]
    row_adam_: Callable[[Tensor, Tensor, RowAdamState, Tensor, Tensor], None]

    def decoder_step_(self, inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor) -> Tensor:
        grad_values, grad_W = self.decoder_grad(inputs)
        assert grad_W is not None
        self.row_adam_(inputs.W_dec_SFD, grad_W, state, hyper, inputs.csr.touched())
        return grad_values

    def encoder_step_(self, inputs: EncoderGradInputs, W_enc_FD: Tensor, state: RowAdamState, hyper: Tensor) -> Tensor:
        grad_W, grad_b = self.encoder_grad(inputs)
        self.row_adam_(W_enc_FD, grad_W, state, hyper, inputs.csr.touched()[0])
        return grad_b
