"""Interface of a kernel backend: the operations that an implementation provides, and the inputs of their gradients.

`clt.kernels.ops` is the public form of every operation. Shape letters: S source layers of one target, B tokens, D
d_model, F features per layer, K slots per token and layer.
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
    """The operations of a backend; the modules `reference`, `cpu` and `triton_backend` provide them as functions.

    Arguments are already checked and detached; results are not differentiable.
    """

    def preactivations(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
        """x W_enc^T + b_enc.

        Args:
            x_BD: [B,D] encoder inputs.
            W_enc_FD: [F,D] encoder weights, same dtype.
            b_enc_F: [F] encoder bias, same dtype.

        Returns:
            [B,F] in the dtype of x, rounded once.
        """

    def select_topk(self, pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """TopK(ReLU(pre)).

        Args:
            pre_BF: [B,F] pre-activations.
            k: slots per token.

        Returns:
            values [B,K] and indices [B,K] int32, ascending, empty slots last as (0, 0); ties go to the lowest feature
            number.
        """

    def encode_topk(self, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """TopK(ReLU(x W_enc^T + b_enc)).

        Args:
            x_BD: [B,D] encoder inputs.
            W_enc_FD: [F,D] encoder weights, same dtype.
            b_enc_F: [F] encoder bias, same dtype; -inf excludes a feature.
            k: slots per token.

        Returns:
            values [B,K] and indices [B,K] int32, as `select_topk`.
        """

    def batch_threshold(
        self, pre_BF: Tensor, n: int, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The n-th largest positive pre-activation of a batch (BatchTopK; Bussmann et al. 2024, section 3).

        Args:
            pre_BF: [B,F] pre-activations.
            n: activations wanted over the batch, positive.
            reduce: sums a small int64 tensor of counts over the ranks that hold the rest of the batch, or None.

        Returns:
            threshold [] in the dtype of pre, 0 if fewer than n are positive, and quota [] int64: the number of those
            equal to it that are selected.
        """

    def select_above(
        self, pre_BF: Tensor, threshold: Tensor, quota: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the pre-activations above a threshold, and of the first `quota` equal to it, by (token, feature).

        Args:
            pre_BF: [B,F] pre-activations.
            threshold: [] from `batch_threshold`.
            quota: [] int64 from `batch_threshold`.
            capacity: slots per token, C.

        Returns:
            values [B,C], indices [B,C] int32 as `select_topk`, and counts [B] int32 of all selected; a token whose
            count exceeds C keeps its lowest feature numbers.
        """

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Sum over sources and slots of value times decoder vector, plus bias and skip.

        Args:
            inputs: codes, decoders, bias and skip; a feature may occur in several slots of a token.

        Returns:
            [B,D] in the dtype of the decoders.
        """

    def decode_loss(self, inputs: DecodeInputs, y_BD: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted squared error of a reconstruction and its residual.

        Args:
            inputs: codes, decoders, bias and skip.
            y_BD: [B,D] target of the reconstruction.
            weights_B: [B] weight of each token; None for 1/B.

        Returns:
            error [], the weighted sum over tokens of the mean over channels of the squared residual, in the
            accumulator's dtype; and residual [B,D], reconstruction - y in the dtype of the decoders.
        """

    def decoder_grad(self, inputs: DecoderGradInputs, need_W: bool = True) -> tuple[Tensor, Tensor | None]:
        """Gradients of `decode` with respect to activations and decoders.

        Args:
            inputs: codes, decoders and the gradient of the reconstruction.
            need_W: whether the gradient of the decoders is wanted.

        Returns:
            grad_values [S,B,K] in the accumulator's dtype, 0 in empty slots, and grad_W [S,F,D] in the dtype of W_dec,
            or None if it is not wanted.
        """

    def encoder_grad(self, inputs: EncoderGradInputs) -> tuple[Tensor, Tensor]:
        """Gradients of `encode_topk` with respect to weights and bias.

        Args:
            inputs: codes, encoder inputs and the gradient of the activations.

        Returns:
            grad_W [F,D] and grad_b [F] in the dtype of x.
        """

    def decoder_step_(self, inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor) -> Tensor:
        """`decoder_grad` and row Adam on the decoders of active features, in place.

        Args:
            inputs: as for `decoder_grad`; `W_dec_SFD` is updated.
            state: moments of the decoders; updated.
            hyper: from `RowAdam.hyper`.

        Returns:
            grad_values [S,B,K] in the accumulator's dtype, taken with the weights before the update.
        """

    def encoder_step_(self, inputs: EncoderGradInputs, W_enc_FD: Tensor, state: RowAdamState, hyper: Tensor) -> Tensor:
        """`encoder_grad` and row Adam on the encoder rows of active features, in place.

        Args:
            inputs: as for `encoder_grad`.
            W_enc_FD: [F,D] encoder; updated.
            state: moments of the encoder; updated.
            hyper: from `RowAdam.hyper`.

        Returns:
            grad_b [F] in the dtype of x; the bias is not updated.
        """

    def row_adam_(self, param: Tensor, grad: Tensor, state: RowAdamState, hyper: Tensor, touched: Tensor) -> None:
        """One Adam step on the touched rows of a parameter, in place.

        Args:
            param: [..,F,D] parameter; updated.
            grad: its gradient, same shape.
            state: its moments; updated.
            hyper: from `RowAdam.hyper`.
            touched: [..,F] bool; other rows and their moments are neither read nor written.
        """


@dataclass(frozen=True)
class StoredGradientSteps:
    """Optimizer steps of a backend that stores the weight gradient and passes it to row Adam.

    Attributes:
        decoder_grad: as `KernelBackend.decoder_grad`.
        encoder_grad: as `KernelBackend.encoder_grad`.
        row_adam_: as `KernelBackend.row_adam_`.
    """

    decoder_grad: Callable[[DecoderGradInputs], tuple[Tensor, Tensor | None]]
    encoder_grad: Callable[[EncoderGradInputs], tuple[Tensor, Tensor]]
    row_adam_: Callable[[Tensor, Tensor, RowAdamState, Tensor, Tensor], None]

    def decoder_step_(self, inputs: DecoderGradInputs, state: RowAdamState, hyper: Tensor) -> Tensor:
        """See `KernelBackend.decoder_step_`."""
        grad_values, grad_W = self.decoder_grad(inputs)
        assert grad_W is not None
        self.row_adam_(inputs.W_dec_SFD, grad_W, state, hyper, inputs.csr.touched())
        return grad_values

    def encoder_step_(self, inputs: EncoderGradInputs, W_enc_FD: Tensor, state: RowAdamState, hyper: Tensor) -> Tensor:
        """See `KernelBackend.encoder_step_`."""
        grad_W, grad_b = self.encoder_grad(inputs)
        self.row_adam_(W_enc_FD, grad_W, state, hyper, inputs.csr.touched()[0])
        return grad_b
