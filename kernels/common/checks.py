"""Checks of argument shapes: a letter must have the same size wherever it occurs."""

from __future__ import annotations

from torch import Tensor


def fit(op: str, **tensors: tuple[Tensor | None, str]) -> None:
    """Checks that every letter has one size.

    Args:
        op: name of the operation, for the message.
        tensors: by argument name, the tensor (None is skipped) and its expected shape, one letter per dimension.

    Raises:
        ValueError: shapes do not fit; the message lists all of them.
    """
    sizes: dict[str, int] = {}
    for tensor, letters in tensors.values():
        if tensor is None:
            continue
        if tensor.ndim != len(letters) or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, tensor.shape, strict=True)
        ):
            given = ", ".join(f"{name} {tuple(t.shape)}" for name, (t, _) in tensors.items() if t is not None)
            wanted = ", ".join(f"[{','.join(letters)}]" for t, letters in tensors.values() if t is not None)
            raise ValueError(f"{op}: {given} must be {wanted}")


def check_k(op: str, k: int, n_features: int) -> None:
    """Checks the number of slots.

    Args:
        op: name of the operation, for the message.
        k: slots per token.
        n_features: F.

    Raises:
        ValueError: k is not in 1..F.
    """
    if not 1 <= k <= n_features:
        raise ValueError(f"{op}: k={k} must lie in 1..{n_features}")


def fit_decode(
    op: str, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, **more: tuple[Tensor | None, str]
) -> None:
    """`fit` for the arguments of a decoding operation.

    Args:
        op: name of the operation, for the message.
        values: [S,B,K] activations.
        indices: [S,B,K] feature numbers.
        W_dec: [S,F,D] decoders.
        b_dec: [D] bias.
        more: further tensors and their shapes, as for `fit`.
    """
    fit(op, values=(values, "SBK"), indices=(indices, "SBK"), W_dec=(W_dec, "SFD"), b_dec=(b_dec, "D"), **more)


def fit_grad(
    op: str,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
) -> None:
    """`fit` for the arguments of a decoder's gradient.

    Args:
        op: name of the operation, for the message.
        grad: [B,D] gradient of the reconstruction.
        values: [S,B,K] activations.
        indices: [S,B,K] feature numbers.
        W_dec: [S,F,D] decoders.
        weights: [B] factor per token, or None.
        scale: [] factor, or None.
    """
    codes = {"values": (values, "SBK"), "indices": (indices, "SBK")}
    fit(op, grad=(grad, "BD"), **codes, W_dec=(W_dec, "SFD"), weights=(weights, "B"), scale=(scale, ""))


def fit_encoder(op: str, grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor) -> None:
    """`fit` for the arguments of an encoder's gradient.

    Args:
        op: name of the operation, for the message.
        grad_values: [B,K] gradient of the activations.
        values: [B,K] activations.
        indices: [B,K] feature numbers.
        x: [B,D] encoder inputs.
    """
    fit(op, grad_values=(grad_values, "BK"), values=(values, "BK"), indices=(indices, "BK"), x=(x, "BD"))
