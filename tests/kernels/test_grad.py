"""Feature-major gradients and the Adam steps fused into them equal the reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from clt.kernels.common import adam, csr
from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs
from clt.kernels.gpu import grad
from clt.kernels.gpu.configs import GatherConfig
from clt.kernels.gpu.decode import decode_loss
from clt.kernels.gpu.optim import moment_tensors
from clt.kernels.pytorch import reference

from .conftest import random_codes

SMALL = GatherConfig(block_d=32, unroll=4, num_warps=1)
OTHER = GatherConfig(block_d=16, unroll=2, num_warps=1)

# Sums of at most 100 terms of size 1: a hundred roundings.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape; `hot` puts feature 0 into a slot of every token."""

    sources: int = 2
    tokens: int
    k: int
    n_features: int
    d: int
    filled: float = 0.6
    hot: bool = False


# Ragged everywhere, up to three column chunks; feature 0 of the hot case has 20 slots: four parts, the last ragged.
SPARSE = Case(sources=3, tokens=7, k=3, n_features=20, d=5)
HOT = Case(tokens=20, k=2, n_features=7, d=40, hot=True)
CASES = [
    Case(sources=1, tokens=1, k=1, n_features=1, d=1, filled=1.0),
    SPARSE,
    Case(sources=1, tokens=5, k=2, n_features=9, d=70),
    Case(tokens=9, k=13, n_features=13, d=37, filled=1.0),
    HOT,
    Case(tokens=4, k=2, n_features=6, d=16, filled=0.0),
]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are split from their seventh slot on."""
    monkeypatch.setattr(csr, "SPLIT", 6)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    grad: Tensor
    values: Tensor
    indices: Tensor
    W: Tensor
    weights: Tensor
    scale: Tensor
    csr: FeatureCSR

    def decoder(self, factors: bool = True) -> DecoderGradInputs:
        """Inputs of decoder_grad."""
        given = (self.weights, self.scale) if factors else (None, None)
        return DecoderGradInputs(self.grad, self.values, self.indices, self.W, self.csr, *given)

    def encoder(self) -> EncoderGradInputs:
        """Inputs of encoder_grad, the rows of grad standing for encoder inputs."""
        grad_values = self.values[0].to(reference.accumulator(self.W.dtype)) - 0.6
        codes = (self.values[0], self.indices[0])
        return EncoderGradInputs(grad_values, *codes, self.grad, self.W.shape[1], self.csr[:1])


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    shape = (case.sources, case.tokens, case.k, case.n_features)
    values, indices = random_codes(*shape, dtype=dtype, device=device, filled=case.filled)
    if case.hot:
        values[:, :, 0], indices[:, :, 0] = 1.0, 0
        values[:, :, 1:][indices[:, :, 1:] == 0] = 0
    wide = reference.accumulator(dtype)
    return Inputs(
        grad=torch.randn(case.tokens, case.d).to(device, dtype),
        values=values,
        indices=indices,
        W=torch.randn(case.sources, case.n_features, case.d).to(device, dtype),
        weights=torch.rand(case.tokens).to(device, wide),
        scale=torch.tensor(0.7).to(device, wide),
        csr=FeatureCSR.build(values, indices, case.n_features),
    )


def _assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=10 * tolerance)


def _assert_one_rounding(ours: Tensor, exact: Tensor) -> None:
    """Half a unit in the last of bfloat16's 8 bits; plus the float32 error where the sum cancels."""
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factors", [False, True])
def test_decoder_grad_equals_reference(case: Case, dtype: torch.dtype, factors: bool, device: str) -> None:
    arguments = _inputs(case, dtype, device).decoder(factors)
    _assert_close(grad.decoder_grad(arguments, config=SMALL), reference.decoder_grad(arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_encoder_grad_equals_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = _inputs(case, dtype, device).encoder()
    _assert_close(grad.encoder_grad(arguments, SMALL), reference.encoder_grad(arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_gradients_are_rounded_once(case: Case, device: str) -> None:
    inputs = _inputs(case, torch.bfloat16, device)
    wide = Inputs(**{name: t if name in ("indices", "csr") else t.double() for name, t in vars(inputs).items()})
    grad_values, grad_W = grad.decoder_grad(inputs.decoder(), config=SMALL)
    exact_values, exact_W = reference.decoder_grad(wide.decoder())
    assert grad_values.dtype == torch.float32 and grad_W is not None
    torch.testing.assert_close(grad_values.double(), exact_values, rtol=1e-5, atol=1e-4)
    _assert_one_rounding(grad_W, exact_W)
    rounded = wide.encoder().grad_values_BK.float()
    exact = reference.encoder_grad(replace(wide.encoder(), grad_values_BK=rounded.double()))
    ours = grad.encoder_grad(replace(inputs.encoder(), grad_values_BK=rounded), SMALL)
    for mine, expected in zip(ours, exact, strict=True):
        _assert_one_rounding(mine, expected)


def test_decode_loss_and_decoder_grad_pass_gradcheck(device: str) -> None:
    values, indices = random_codes(2, 2, 2, 3, dtype=torch.float64, device=device)
    W, b, y = (torch.randn(*s, dtype=torch.float64, device=device) for s in ((2, 3, 2), (2,), (2, 2)))
    weights = torch.rand(2, dtype=torch.float64, device=device)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values: Tensor, W: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            error, residual = decode_loss(DecodeInputs(values, indices, W, b, None), y, weights)
            ctx.save_for_backward(residual, values, W)
            return error

        @staticmethod
        def backward(ctx, grad_error: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
            residual, values, W = ctx.saved_tensors
            grouping = FeatureCSR.build(values, indices, 3)
            scale = 2 * grad_error / W.shape[2]
            grads = grad.decoder_grad(
                DecoderGradInputs(residual, values, indices, W, grouping, weights, scale), config=OTHER
            )
            return *grads, (residual * weights[:, None]).sum(0) * scale

    assert torch.autograd.gradcheck(Loss.apply, tuple(t.requires_grad_() for t in (values, W, b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_depend_neither_on_launch_settings_nor_on_scratch_memory(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(HOT, dtype, device)
    results = [grad.decoder_grad(inputs.decoder(), config=config) for config in (SMALL, OTHER)]
    encoders = [grad.encoder_grad(inputs.encoder(), config) for config in (SMALL, OTHER)]
    monkeypatch.setattr(grad, "SCRATCH_BYTES", 1)
    results.append(grad.decoder_grad(inputs.decoder(), config=SMALL))
    assert all(torch.equal(results[0][1], grad_W) for _, grad_W in results)
    assert all(torch.equal(ours, other) for ours, other in zip(*encoders, strict=True))
    # A dot product is added up by columns, in an order that the launch fixes.
    assert torch.equal(results[0][0], results[2][0])


def test_permuted_tokens_permute_the_activation_gradients_bitwise(device: str) -> None:
    inputs = _inputs(HOT, torch.float32, device)
    order = torch.randperm(len(inputs.grad), device=device)
    values, indices = inputs.values[:, order], inputs.indices[:, order]
    grouping = FeatureCSR.build(values, indices, HOT.n_features)
    ours, _ = grad.decoder_grad(inputs.decoder(), config=SMALL)
    shuffled = DecoderGradInputs(
        inputs.grad[order], values, indices, inputs.W, grouping, inputs.weights[order], inputs.scale
    )
    permuted, _ = grad.decoder_grad(shuffled, config=SMALL)
    assert torch.equal(ours[:, order], permuted)


def test_decoder_grad_without_weights_gives_the_same_activation_gradients(device: str) -> None:
    inputs = _inputs(HOT, torch.float32, device)
    grad_values, grad_W = grad.decoder_grad(inputs.decoder(), need_W=False, config=SMALL)
    assert grad_W is None
    assert torch.equal(grad_values, grad.decoder_grad(inputs.decoder(), config=SMALL)[0])


@pytest.mark.parametrize("case", [SPARSE, HOT])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_fused_steps_equal_gradient_then_adam(case: Case, dtype: torch.dtype, beta1: float, device: str) -> None:
    settings = RowAdam(learning_rate=1e-2, beta1=beta1, beta2=0.9)
    first = _inputs(case, dtype, device)
    W_dec, W_enc = first.W.clone(), first.W[0].clone()
    fused, apart = [(W, RowAdamState.zeros(W, settings)) for W in (W_dec, W_enc)], []
    for W, _ in fused:
        apart.append((W.clone(), RowAdamState.zeros(W, settings)))
    for step in (1, 2, 3):
        inputs = _inputs(case, dtype, device, seed=step)
        hyper = settings.hyper(step, device, dtype)
        ours = grad.decoder_step_(replace(inputs.decoder(), W_dec_SFD=W_dec), fused[0][1], hyper, SMALL)
        theirs, grad_W = reference.decoder_grad(replace(inputs.decoder(), W_dec_SFD=apart[0][0]))
        adam.row_adam_(apart[0][0], grad_W, apart[0][1], hyper, inputs.csr.touched())
        _assert_close((ours,), (theirs,), TOLERANCE[dtype])
        ours = grad.encoder_step_(inputs.encoder(), W_enc, fused[1][1], hyper, SMALL)
        grad_W, theirs = reference.encoder_grad(inputs.encoder())
        adam.row_adam_(apart[1][0], grad_W, apart[1][1], hyper, inputs.csr.touched()[0])
        _assert_close((ours,), (theirs,), TOLERANCE[dtype])
    for (W, state), (expected, expected_state) in zip(fused, apart, strict=True):
        _assert_close((W, state.v_RD), (expected, expected_state.v_RD), TOLERANCE[dtype])
        assert torch.equal(state.last_step_R, expected_state.last_step_R)
        if state.m_RD is not None:
            _assert_close((state.m_RD,), (expected_state.m_RD,), TOLERANCE[dtype])


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_fused_bfloat16_steps_round_as_the_reference_does(moments: torch.dtype, device: str) -> None:
    settings = RowAdam(learning_rate=1e-2, beta2=0.9, seed=5)
    inputs = _inputs(HOT, torch.bfloat16, device)
    hyper = settings.hyper(1, device, torch.bfloat16)
    W, expected = inputs.W.clone(), inputs.W.clone()
    state, expected_state = (RowAdamState.zeros(W, settings, moments) for _ in range(2))
    grad.decoder_step_(replace(inputs.decoder(), W_dec_SFD=W), state, hyper, SMALL)
    # The fused step never rounds the gradient, so neither may the reference.
    wide = replace(inputs.decoder(), grad_BD=inputs.grad.float(), W_dec_SFD=inputs.W.float())
    _, grad_W = reference.decoder_grad(wide)
    adam.row_adam_(expected, grad_W, expected_state, hyper, inputs.csr.touched())
    for ours, theirs in ((W, expected), (state.v_RD, expected_state.v_RD)):
        # Sums in another order differ in the last bit of float32, and one in 2^16 of those crosses the noise.
        if ours.dtype == torch.bfloat16:
            assert (ours != theirs).float().mean() < 0.01
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 37), (torch.float32, 300), (torch.bfloat16, 384)])
def test_fused_steps_on_codes_have_the_bits_of_gradient_then_adam(dtype: torch.dtype, d: int, device: str) -> None:
    if device == "cuda":
        pytest.skip("compiled kernels fuse products with sums, each in its own way")
    settings, case = RowAdam(learning_rate=1e-2, beta1=0.9, seed=5), replace(HOT, tokens=8, n_features=4, d=d)
    W = _inputs(case, dtype, device).W
    ours, theirs = ((W.clone(), RowAdamState.zeros(W, settings, torch.uint8)) for _ in range(2))
    # One array serves as decoders and, its first source alone, as the encoder.
    enc, enc_theirs = ((W[0].clone(), RowAdamState.zeros(W[0], settings, torch.uint8)) for _ in range(2))
    for step in (1, 3):
        inputs, hyper = _inputs(case, dtype, device, seed=step), settings.hyper(step, device, dtype)
        decoder, encoder = replace(inputs.decoder(factors=False), W_dec_SFD=ours[0]), inputs.encoder()
        # In float32 the stored gradient is the sum that the fused step holds in registers.
        wide = {"grad_BD": inputs.grad.float(), "values_SBK": inputs.values.float(), "W_dec_SFD": theirs[0].float()}
        _, grad_W = grad.decoder_grad(replace(decoder, **wide), config=OTHER)
        grad.decoder_step_(decoder, ours[1], hyper, SMALL)
        adam.row_adam_(theirs[0], grad_W, theirs[1], hyper, inputs.csr.touched())
        grad_W, _ = grad.encoder_grad(replace(encoder, x_BD=encoder.x_BD.float()), OTHER)
        grad.encoder_step_(encoder, enc[0], enc[1], hyper, SMALL)
        adam.row_adam_(enc_theirs[0], grad_W, enc_theirs[1], hyper, inputs.csr.touched()[0])
    for (mine, state), (expected, expected_state) in ((ours, theirs), (enc, enc_theirs)):
        pairs = zip((mine, *moment_tensors(state)), (expected, *moment_tensors(expected_state)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_steps_leave_rows_without_a_slot_alone(dtype: torch.dtype, device: str) -> None:
    settings = RowAdam(learning_rate=1e-2)
    inputs = _inputs(SPARSE, dtype, device)
    W, state = inputs.W.clone(), RowAdamState.zeros(inputs.W, settings)
    inputs_of_W = replace(inputs.decoder(), W_dec_SFD=W)
    grad.decoder_step_(inputs_of_W, state, settings.hyper(4, device, dtype), SMALL)
    touched = inputs.csr.touched()
    assert torch.equal(W[~touched], inputs.W[~touched]) and state.v_RD[~touched].eq(0).all()
    assert torch.equal(state.last_step_R, torch.where(touched, 4, 0).int())
    assert 0 < touched.sum() < touched.numel() and (W[touched] != inputs.W[touched]).float().mean() > 0.5


@pytest.mark.gpu
def test_decoders_of_more_than_two_to_the_31_elements_are_addressed(device: str) -> None:
    sources, n_features, d = 2, 300_000, 4096
    W = torch.zeros(sources, n_features, d, dtype=torch.bfloat16, device=device)
    W[1, -1] = 1
    row = torch.randn(1, d, device=device).bfloat16()
    values = torch.ones(sources, 1, 1, dtype=torch.bfloat16, device=device)
    indices = torch.full((sources, 1, 1), n_features - 1, dtype=torch.int32, device=device)
    grouping = FeatureCSR.build(values, indices, n_features)
    grad_values, grad_W = grad.decoder_grad(DecoderGradInputs(row, values, indices, W, grouping))
    assert grad_W is not None and torch.equal(grad_W[1, -1], row[0]) and grad_W[1, :-1].eq(0).all()
    torch.testing.assert_close(grad_values[1, 0, 0], row.float().sum(), rtol=1e-4, atol=1e-3)
