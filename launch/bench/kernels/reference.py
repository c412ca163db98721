"""float64 references of the benchmark's operations, on samples of tokens and features where all would take too long.

They read the same tensors as the implementations, so that errors are those of the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clt.launch.bench.kernels.data import KernelInputs
from clt.launch.bench.kernels.measure import relative_error

Encode = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

_TOKENS, _FEATURES = 64, 32
#: Tokens whose float64 pre-activations or rows are held at once.
_CHUNK = 256


class Reference:
    """Expected results of the operations, computed on first use.

    Args:
        inputs: of the operations.
    """

    def __init__(self, inputs: KernelInputs) -> None:
        self.inputs = inputs
        n_tokens = inputs.size.n_tokens
        self.tokens = torch.linspace(0, n_tokens - 1, min(_TOKENS, n_tokens), device=inputs.device).long()

    @cached_property
    def features(self) -> Tensor:
        """Sample of features of the first source: half of them those that fire most."""
        count_F = self.inputs.csr.bounds[0].diff()
        order = count_F.argsort(descending=True)
        few = order[: _FEATURES // 2]
        return torch.cat([few, order[_FEATURES // 2 :: max(1, 2 * len(order) // _FEATURES)]])

    def _rows(self, source: int, indices_BK: Tensor) -> Tensor:
        return self.inputs.W_dec_SFD[source][indices_BK.long()].double()

    def _reconstruct(self, tokens: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B,D] of some tokens; `own` replaces the codes of the last source on all tokens."""
        inputs = self.inputs
        y_BD = inputs.b_dec_D.double().expand(len(tokens), -1)
        for source in range(inputs.size.n_sources):
            last = source == inputs.size.n_sources - 1
            codes = own if own and last else (inputs.values_SBK[source], inputs.indices_SBK[source])
            values_BK, indices_BK = (part[tokens] for part in codes)
            y_BD = y_BD + torch.einsum("bk,bkd->bd", values_BK.double(), self._rows(source, indices_BK))
        return y_BD

    def _preactivations(self, tokens: Tensor) -> Tensor:
        inputs = self.inputs
        return torch.addmm(inputs.b_enc_F.double(), inputs.x_BD[tokens].double(), inputs.W_enc_FD.double().T)

    def _residual(self, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[N,D] of all tokens."""
        tokens = torch.arange(self.inputs.size.n_tokens, device=self.inputs.device)
        parts = [self._reconstruct(part, own) - self.inputs.y_BD[part].double() for part in tokens.split(_CHUNK)]
        return torch.cat(parts)

    @cached_property
    def residual(self) -> Tensor:
        """[N,D] reconstruction - y for the codes of the inputs."""
        return self._residual()

    def encoded_residual(self, encode: Encode) -> Tensor:
        """[N,D] residual with the codes of the last source selected by an encoder."""
        inputs = self.inputs
        indices_BK = encode(inputs.x_BD, inputs.W_enc_FD, inputs.b_enc_F, inputs.size.k)[1].long()
        tokens = torch.arange(inputs.size.n_tokens, device=inputs.device)
        values = [self._preactivations(part).gather(1, indices_BK[part]) for part in tokens.split(_CHUNK)]
        return self._residual((torch.cat(values), indices_BK))

    def decoder_rows(self, grad_BD: Tensor) -> Tensor:
        """Decoder gradients of the sampled features of the first source, from the gradient of the reconstruction."""
        values_BK, indices_BK = self.inputs.values_SBK[0].double(), self.inputs.indices_SBK[0]
        columns = [(values_BK * (indices_BK == feature)).sum(dim=1) for feature in self.features.tolist()]
        return torch.stack(columns) @ grad_BD.double()

    def encode_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """Error of values, and of float64 pre-activations of selected features, against the k largest in any order."""
        pre_BF = self._preactivations(self.tokens)
        return self._selection_error(outputs, pre_BF)

    def select_error(self, pre_BF: Tensor, outputs: tuple[Tensor, Tensor]) -> float:
        """The same error for given pre-activations."""
        return self._selection_error(outputs, pre_BF[self.tokens].double())

    def _selection_error(self, outputs: tuple[Tensor, Tensor], pre_BF: Tensor) -> float:
        values_BK, indices_BK = (output[self.tokens] for output in outputs)
        best_BK = pre_BF.topk(values_BK.shape[1]).values
        chosen_BK = pre_BF.gather(1, indices_BK.long()).sort(descending=True).values
        found_BK = values_BK.double().sort(descending=True).values
        return max(relative_error(chosen_BK, best_BK), relative_error(found_BK, best_BK))

    def decode_error(self, y_BD: Tensor) -> float:
        """Error of the reconstructions of sampled tokens."""
        return relative_error(y_BD[self.tokens], self._reconstruct(self.tokens))

    def loss_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """Larger error of the loss of all tokens and of the residuals of sampled tokens."""
        error, residual_BD = outputs
        expected = self.residual.square().mean()
        residual = relative_error(residual_BD[self.tokens], self.residual[self.tokens])
        return max(relative_error(error, expected), residual)

    def decoder_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """Larger error of activation gradients of sampled tokens and decoder gradients of sampled features."""
        grad_values, grad_W = outputs
        grad = relative_error(grad_W[0][self.features], self.decoder_rows(self.inputs.grad_BD.double()))
        return max(grad, self.values_error(grad_values))

    def values_error(self, grad_values: Tensor) -> float:
        """Error of the activation gradients of sampled tokens."""
        grad_BD = self.inputs.grad_BD[self.tokens].double()
        expected = [
            torch.einsum("bd,bkd->bk", grad_BD, self._rows(source, indices_BK[self.tokens]))
            for source, indices_BK in enumerate(self.inputs.indices_SBK)
        ]
        return relative_error(torch.stack([part[self.tokens] for part in grad_values]), torch.stack(expected))

    def adam_error(self, W_dec: Tensor | Sequence[Tensor], grad_RD: Tensor, learning_rate: float) -> float:
        """Error of the decoders of the sampled features after the first step of Adam with beta1 = 0.

        Args:
            W_dec: all decoders after the step.
            grad_RD: float64 gradients of the sampled features.
            learning_rate: of the step.
        """
        before_RD = self.inputs.W_dec_SFD[0][self.features].double()
        return relative_error(W_dec[0][self.features], before_RD - learning_rate * grad_RD / (grad_RD.abs() + 1e-8))

    def encoder_error(self, grad_values_BK: Tensor, source: int, grad_W_FD: Tensor) -> float:
        """Error of the encoder gradients of sampled features that fire.

        Args:
            grad_values_BK: [N,k] gradients of the activations.
            source: layer of the encoder.
            grad_W_FD: [F,D] result.
        """
        inputs = self.inputs
        features = inputs.indices_SBK[source].flatten().unique()[:: max(1, inputs.size.n_features // _FEATURES)]
        weight = [
            (grad_values_BK.double() * (inputs.indices_SBK[source] == feature)).sum(dim=1)
            for feature in features.tolist()
        ]
        return relative_error(grad_W_FD[features], torch.stack(weight) @ inputs.x_BD.double())


class StepReference:
    """Expected results of a training step that encodes its last source.

    Pre-activations near the k-th largest are often equal after rounding, so encoders that round alike still select
    different features; each step is compared with the result of its own selection.

    Args:
        reference: of the inputs.
        encode: values and indices from x, W_enc, b_enc and k.
    """

    def __init__(self, reference: Reference, encode: Encode) -> None:
        self.reference, self.encode = reference, encode

    @cached_property
    def residual(self) -> Tensor:
        """[N,D] reconstruction - y."""
        return self.reference.encoded_residual(self.encode)

    @property
    def _rows(self) -> Tensor:
        return self.reference.decoder_rows(self.residual) * (2.0 / self.residual.numel())

    def gradient_error(self, outputs: Sequence[Any]) -> float:
        """Larger error of the loss and of the decoder gradients of sampled features of the first source."""
        rows = relative_error(outputs[1][0][self.reference.features], self._rows)
        return max(relative_error(outputs[0], self.residual.square().mean()), rows)

    def trained_error(self, outputs: Sequence[Any], learning_rate: float) -> float:
        """Larger error of the loss and of the decoders of sampled features after a first step of Adam."""
        rows = self.reference.adam_error(outputs[1], self._rows, learning_rate)
        return max(relative_error(outputs[0], self.residual.square().mean()), rows)
