"""The tanh penalty and the gradients of thresholds against autograd and against dense formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clt.training.schedules import penalty_weight
from clt.transcoder.architecture import SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.penalty import sparsity_loss
from clt.transcoder.sparsity import Peers

from .sparse_cases import D, L, dense, make_clt, scores_by_hand

TOKENS, WEIGHT = 40, 0.3


def squared_error(transcoder: CrossLayerTranscoder, z_LBF: Tensor, y_LBD: Tensor, weights_B: Tensor) -> Tensor:
    """Mean over targets and channels, weighted over tokens, from dense activations."""
    total = z_LBF.new_zeros(())
    for target in range(L):
        rows = transcoder.sources_of(target)
        found = torch.einsum("sbf,sfd->bd", z_LBF[rows.start : rows.stop], transcoder.W_dec[str(target)])
        total = total + (found + transcoder.b_dec[str(target)] - y_LBD[target]).square().mean(dim=1) @ weights_B
    return total / L


def dense_penalty(transcoder: CrossLayerTranscoder, z_LBF: Tensor, weights_B: Tensor) -> Tensor:
    """By definition, differentiable with respect to activations and decoders."""
    norms = torch.stack(
        [
            torch.cat(
                [
                    transcoder.W_dec[str(t)][source - transcoder.sources_of(t).start]
                    for t in transcoder.targets_of(source)
                ],
                dim=1,
            ).norm(dim=1)
            for source in range(L)
        ]
    )
    return (
        torch.tanh(transcoder.config.sparsity.penalty_scale * z_LBF * norms[:, None]).sum(dim=2) @ weights_B
    ).sum() / L


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_penalty_and_its_gradients_are_those_of_the_definition(kind: str) -> None:
    transcoder = make_clt(kind)
    x = torch.randn(L, TOKENS, D, dtype=torch.float64)
    weights_B = torch.rand(TOKENS, dtype=torch.float64)
    codes = transcoder.encode(x, peers=Peers())
    share, penalty = sparsity_loss(transcoder, codes, WEIGHT, Peers(), weights_B)
    expected = dense_penalty(transcoder, dense(codes), weights_B)
    torch.testing.assert_close(penalty, expected.detach())
    torch.testing.assert_close(share, WEIGHT * expected)
    leaves = [codes.values, *transcoder.W_dec.values()]
    ours, theirs = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (share, WEIGHT * expected))
    filled = codes.values != 0
    torch.testing.assert_close(ours[0][filled], theirs[0][filled])
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(our, their)


def test_penalty_of_decoders_that_are_zero_has_a_finite_gradient() -> None:
    transcoder = make_clt("jumprelu")
    with torch.no_grad():
        for weights in transcoder.W_dec.values():
            weights.zero_()
    codes = transcoder.encode(torch.randn(L, TOKENS, D, dtype=torch.float64), peers=Peers())
    sparsity_loss(transcoder, codes, WEIGHT, Peers())[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in transcoder.parameters())


def test_threshold_gradient_is_the_gain_of_dropping_activations_just_above() -> None:
    transcoder = make_clt("jumprelu", bandwidth=0.5)
    x, y = (torch.randn(L, TOKENS, D, dtype=torch.float64) for _ in range(2))
    weights_B = torch.rand(TOKENS, dtype=torch.float64) / TOKENS
    codes = transcoder.encode(x, peers=Peers())
    z = dense(codes)
    loss = squared_error(transcoder, z, y, weights_B) + sparsity_loss(transcoder, codes, WEIGHT, Peers(), weights_B)[0]
    found = torch.autograd.grad(loss, list(transcoder.log_threshold.values()))
    # By hand: slope of the squared error at each activation, its curvature, and the penalty's step.
    pre, _ = scores_by_hand(transcoder, x)
    t = torch.stack([p.detach().exp() for p in transcoder.log_threshold.values()])[:, None]
    free = torch.where(pre > t, pre, 0).detach().requires_grad_()
    (slope,) = torch.autograd.grad(squared_error(transcoder, free, y, weights_B), free)
    norms = torch.stack(
        [
            sum(  # type: ignore[misc]
                transcoder.W_dec[str(target)][s - transcoder.sources_of(target).start].detach().square().sum(dim=1)
                for target in transcoder.targets_of(s)
            )
            for s in range(L)
        ]
    ).sqrt()[:, None]
    curvature = 2 * norms.square() * weights_B[:, None] / (D * L)
    c = transcoder.config.sparsity.penalty_scale
    step = WEIGHT * weights_B[:, None] / L * torch.tanh(c * t * norms)
    gain = t * slope - t.square() / 2 * curvature + step
    window = (pre > t) & (pre <= t + 0.5)
    expected = -(t / 0.5) * torch.where(window, gain, 0).sum(dim=1, keepdim=True)
    for row, gradient in enumerate(found):
        torch.testing.assert_close(gradient, expected[row, 0].detach())


def test_threshold_gradient_approaches_the_derivative_of_the_mean_loss() -> None:
    """Of one feature over very many tokens, where the derivative can be had by moving the threshold."""
    torch.manual_seed(3)
    transcoder = make_clt("jumprelu", bandwidth=0.05, threshold=0.5)
    tokens = 400_000
    pre = torch.randn(tokens, dtype=torch.float64)
    d = transcoder.W_dec["0"][0, 0].detach()
    # Residual of the target without this feature, correlated with it.
    rest = 0.7 * pre[:, None] * d + torch.randn(tokens, D, dtype=torch.float64)

    def mean_loss(t: float) -> Tensor:
        z = torch.where(pre > t, pre, 0)
        n = d.norm()
        return (z[:, None] * d - rest).square().mean() + WEIGHT * torch.tanh(4 * z * n).mean()

    t, h, w = 0.5, 0.02, 0.05
    derivative = (mean_loss(t + h) - mean_loss(t - h)) / (2 * h)
    slope = 2 * ((pre[:, None] * d - rest) @ d) / D
    gain = t * slope - t * t * d.square().sum() / D + WEIGHT * torch.tanh(4 * t * d.norm())
    window = (pre > t) & (pre <= t + w)
    estimate = -torch.where(window, gain, 0).mean() / w
    plain = -torch.where(window, t * slope, 0).mean() / w
    # About 7,000 tokens in the window, and a bias of first order in its width.
    assert estimate.item() == pytest.approx(derivative.item(), rel=0.15)
    assert abs(plain - derivative) > 2 * abs(estimate - derivative)


def test_features_that_never_fire_keep_their_infinite_threshold() -> None:
    transcoder = make_clt("jumprelu")
    with torch.no_grad():
        transcoder.log_threshold["1"][2] = torch.inf
    codes = transcoder.encode(torch.randn(L, TOKENS, D, dtype=torch.float64), peers=Peers())
    assert not (dense(codes)[1, :, 2] > 0).any()
    (codes.values.sum() + sparsity_loss(transcoder, codes, WEIGHT, Peers())[0]).backward()
    assert transcoder.log_threshold["1"].grad is not None and transcoder.log_threshold["1"].grad.isfinite().all()
    assert transcoder.log_threshold["1"].grad[2] == 0


def test_penalty_weight_rises_linearly() -> None:
    settings = SparsitySettings(kind="relu", penalty=2.0, penalty_warmup_steps=10)
    assert [penalty_weight(step, settings) for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert penalty_weight(0, SparsitySettings(kind="relu", penalty=2.0, penalty_warmup_steps=0)) == 0.0
