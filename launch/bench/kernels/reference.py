"""float64 references of the benchmark's operations, on samples of tokens and features where all would take too long.

They read the very tensors that the rivals were given, so an error is that of the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clt.launch.bench.kernels.data import Problem
from clt.launch.bench.kernels.measure import relative_error

Encode = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

_TOKENS, _FEATURES = 64, 32
#: Tokens whose float64 pre-activations or rows are held at once.
_CHUNK = 256


class Reference:
    """What the operations should give on a problem; computed when it is first asked for."""

    def __init__(self, problem: Problem) -> None:
        """Remembers the problem and picks the samples.

        Args:
            problem: the inputs.
        """
        self.problem = problem
        n_tokens = problem.size.n_tokens
        self.tokens = torch.linspace(0, n_tokens - 1, min(_TOKENS, n_tokens), device=problem.device).long()

    @cached_property
    def features(self) -> Tensor:
        """Features of the first source: those that fire most, and some of the others."""
        count_F = self.problem.csr.bounds[0].diff()
        order = count_F.argsort(descending=True)
        few = order[: _FEATURES // 2]
        return torch.cat([few, order[_FEATURES // 2 :: max(1, 2 * len(order) // _FEATURES)]])

    def _rows(self, source: int, indices_BK: Tensor) -> Tensor:
        return self.problem.W_dec_SFD[source][indices_BK.long()].double()

    def _reconstruct(self, tokens: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Of some tokens; `own` stands for the codes of the last source on all tokens."""
        problem = self.problem
        y_BD = problem.b_dec_D.double().expand(len(tokens), -1)
        for source in range(problem.size.n_sources):
            last = source == problem.size.n_sources - 1
            codes = own if own and last else (problem.values_SBK[source], problem.indices_SBK[source])
            values_BK, indices_BK = (part[tokens] for part in codes)
            y_BD = y_BD + torch.einsum("bk,bkd->bd", values_BK.double(), self._rows(source, indices_BK))
        return y_BD

    def _preactivations(self, tokens: Tensor) -> Tensor:
        problem = self.problem
        return torch.addmm(problem.b_enc_F.double(), problem.x_BD[tokens].double(), problem.W_enc_FD.double().T)

    def _residual(self, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[N,D] of all tokens."""
        tokens = torch.arange(self.problem.size.n_tokens, device=self.problem.device)
        parts = [self._reconstruct(part, own) - self.problem.y_BD[part].double() for part in tokens.split(_CHUNK)]
        return torch.cat(parts)

    @cached_property
    def residual(self) -> Tensor:
        """Reconstruction - y for the codes of the problem."""
        return self._residual()

    def encoded_residual(self, encode: Encode) -> Tensor:
        """[N,D] with the last source's codes as an encoder chooses them."""
        problem = self.problem
        indices_BK = encode(problem.x_BD, problem.W_enc_FD, problem.b_enc_F, problem.size.k)[1].long()
        tokens = torch.arange(problem.size.n_tokens, device=problem.device)
        values = [self._preactivations(part).gather(1, indices_BK[part]) for part in tokens.split(_CHUNK)]
        return self._residual((torch.cat(values), indices_BK))

    def decoder_rows(self, grad_BD: Tensor) -> Tensor:
        """Gradients of the decoders of the sample of features of the first source, from that of the reconstruction."""
        values_BK, indices_BK = self.problem.values_SBK[0].double(), self.problem.indices_SBK[0]
        columns = [(values_BK * (indices_BK == feature)).sum(dim=1) for feature in self.features.tolist()]
        return torch.stack(columns) @ grad_BD.double()

    def encode_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """Values, and the float64 pre-activations of the chosen features, against the k largest; slots in any order."""
        pre_BF = self._preactivations(self.tokens)
        return self._selection_error(outputs, pre_BF)

    def select_error(self, pre_BF: Tensor, outputs: tuple[Tensor, Tensor]) -> float:
        """The same for given pre-activations."""
        return self._selection_error(outputs, pre_BF[self.tokens].double())

    def _selection_error(self, outputs: tuple[Tensor, Tensor], pre_BF: Tensor) -> float:
        values_BK, indices_BK = (output[self.tokens] for output in outputs)
        best_BK = pre_BF.topk(values_BK.shape[1]).values
        chosen_BK = pre_BF.gather(1, indices_BK.long()).sort(descending=True).values
        found_BK = values_BK.double().sort(descending=True).values
        return max(relative_error(chosen_BK, best_BK), relative_error(found_BK, best_BK))

    def decode_error(self, y_BD: Tensor) -> float:
        """Reconstructions of a sample of tokens."""
        return relative_error(y_BD[self.tokens], self._reconstruct(self.tokens))

    def loss_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """The error of all tokens, and residuals of a sample."""
        error, residual_BD = outputs
        expected = self.residual.square().mean()
        residual = relative_error(residual_BD[self.tokens], self.residual[self.tokens])
        return max(relative_error(error, expected), residual)

    def decoder_error(self, outputs: tuple[Tensor, Tensor]) -> float:
        """Gradients of activations of a sample of tokens and, of the first source, decoders of a sample of features."""
        grad_values, grad_W = outputs
        grad = relative_error(grad_W[0][self.features], self.decoder_rows(self.problem.grad_BD.double()))
        return max(grad, self.values_error(grad_values))

    def values_error(self, grad_values: Tensor) -> float:
        """Gradients of activations of a sample of tokens."""
        grad_BD = self.problem.grad_BD[self.tokens].double()
        expected = [
            torch.einsum("bd,bkd->bk", grad_BD, self._rows(source, indices_BK[self.tokens]))
            for source, indices_BK in enumerate(self.problem.indices_SBK)
        ]
        return relative_error(torch.stack([part[self.tokens] for part in grad_values]), torch.stack(expected))

    def adam_error(self, W_dec: Tensor | Sequence[Tensor], grad_RD: Tensor, learning_rate: float) -> float:
        """Decoders of the sample of features of the first source after the first step of Adam with beta1 = 0.

        Args:
            W_dec: all decoders after the step.
            grad_RD: float64 gradients of the sample.
            learning_rate: of the step.
        """
        before_RD = self.problem.W_dec_SFD[0][self.features].double()
        return relative_error(W_dec[0][self.features], before_RD - learning_rate * grad_RD / (grad_RD.abs() + 1e-8))

    def encoder_error(self, grad_values_BK: Tensor, source: int, grad_W_FD: Tensor) -> float:
        """Gradients of the encoder rows of a sample of features that fire."""
        problem = self.problem
        features = problem.indices_SBK[source].flatten().unique()[:: max(1, problem.size.n_features // _FEATURES)]
        weight = [
            (grad_values_BK.double() * (problem.indices_SBK[source] == feature)).sum(dim=1)
            for feature in features.tolist()
        ]
        return relative_error(grad_W_FD[features], torch.stack(weight) @ problem.x_BD.double())


class StepReference:
    """What a training step should give whose last source is encoded; which features it has is up to the encoder.

    Pre-activations near the k-th largest are often equal after rounding, so encoders that round alike still choose
    differently; each step is held to its own choice.
    """

    def __init__(self, reference: Reference, encode: Encode) -> None:
        """Remembers whose choice it is.

        Args:
            reference: of the problem.
            encode: gives values and indices from x, W_enc, b_enc and k.
        """
        self.reference, self.encode = reference, encode

    @cached_property
    def residual(self) -> Tensor:
        """Reconstruction - y, [N,D]."""
        return self.reference.encoded_residual(self.encode)

    @property
    def _rows(self) -> Tensor:
        return self.reference.decoder_rows(self.residual) * (2.0 / self.residual.numel())

    def gradient_error(self, outputs: Sequence[Any]) -> float:
        """Loss of all tokens and, of the first source, gradients of the decoders of a sample of features."""
        rows = relative_error(outputs[1][0][self.reference.features], self._rows)
        return max(relative_error(outputs[0], self.residual.square().mean()), rows)

    def trained_error(self, outputs: Sequence[Any], learning_rate: float) -> float:
        """Loss of all tokens and, of the first source, decoders of a sample of features after a first step of Adam."""
        rows = self.reference.adam_error(outputs[1], self._rows, learning_rate)
        return max(relative_error(outputs[0], self.residual.square().mean()), rows)
