"""8-bit moments: range and rounding of the codes, equal bits in Triton and PyTorch, effect on training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from clt.kernels import library, ops
from clt.kernels.common import adam, packed, storage
from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.gpu import optim
from clt.kernels.gpu.configs import GatherConfig

from .conftest import random_codes

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _block(block_d: int) -> GatherConfig:
    return GatherConfig(block_d=block_d, unroll=1, num_warps=1)


def _raw(state: RowAdamState) -> list[Tensor]:
    return [tensor for tensor in optim.moment_tensors(state) if tensor is not None]


def _number(units: Tensor) -> Tensor:
    """The float32 number of so many units in the last kept bit."""
    return (units.int() << packed.DROPPED_BITS).view(F32).double()


def _noise(shape: torch.Size) -> Tensor:
    return torch.randint(1 << packed.DROPPED_BITS, shape)


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(finite, min_size=1, max_size=300), signed=st.booleans(), nearest=st.booleans())
def test_codes_keep_their_precision_and_pack_again_exactly(numbers: list[float], signed: bool, nearest: bool) -> None:
    x = torch.tensor(numbers) if signed else torch.tensor(numbers).abs()
    codes, exponents = packed.pack(x, signed, None if nearest else _noise(x.shape))
    y = packed.unpack(codes, exponents, signed)
    again = packed.pack(y, signed)
    assert torch.equal(again[0], codes) or bool((exponents == packed.BROKEN).any())
    assert torch.equal(again[1], exponents)
    kept, columns = packed.MANTISSA_BITS, len(numbers)
    exponent = packed._spread(exponents.long(), columns)
    smallest = _number(((exponent - packed.reach(signed)) * (1 << kept)).clamp(min=0) + 1)
    # The largest may round up to infinity.
    sound = exponent < packed.BROKEN
    assert sound.all() or x.abs().max() > torch.finfo(F32).max * (1 - 2.0**-kept)
    x, y, smallest = x[sound].double(), y[sound].double(), smallest[sound]
    unit = torch.exp2(x.abs().clamp(min=2.0**-126).log2().floor() - kept)
    inside = x.abs() >= smallest
    assert ((y - x).abs()[inside] <= (unit / 2 if nearest else unit)[inside]).all()
    assert (y[x == 0] == 0).all() and (y * x >= 0).all()
    below = ~inside & (x != 0)
    assert (y[below].abs() <= smallest[below]).all() if signed else torch.equal(y[below], smallest[below])


@settings(max_examples=50, deadline=None)
@given(x=st.floats(2.0**-100, 2.0**100, width=32), negative=st.booleans(), signed=st.booleans())
def test_the_mean_over_all_noise_is_the_number_itself(x: float, negative: bool, signed: bool) -> None:
    x = -x if signed and negative else x
    every_noise = torch.arange(1 << packed.DROPPED_BITS).view(-1, packed.GROUP)
    rounded = packed.unpack(*packed.pack(torch.full(every_noise.shape, x), signed, every_noise), signed).double()
    assert len(rounded.unique()) <= 2
    assert rounded.mean().item() == pytest.approx(x, rel=1e-12, abs=0)


def test_codes_of_numbers_worked_out_by_hand() -> None:
    x = torch.tensor([1.0, 1.5, 1.96875, 2.0**-14, 1.1 * 2.0**-15, 2.0**-40, 0.0])
    # Nearest of the 3-bit mantissas: 1.96875 rounds up to 2, so that E is 128 and 2 has 31 octaves below it, or 15.
    codes, exponents = packed.pack(x, signed=False)
    assert exponents.tolist() == [128]
    assert codes.tolist() == [240, 244, 248, 128, 121, 1, 0]
    small = [2.0**-14, 1.125 * 2.0**-15, 1.125 * 2.0**-30]
    assert packed.unpack(codes, exponents, signed=False).tolist() == [1, 1.5, 2, *small, 0]
    codes, exponents = packed.pack(-x, signed=True)
    assert exponents.tolist() == [128]
    assert codes.tolist() == [0x80 | 112, 0x80 | 116, 0x80 | 120, 0x80, 0x80, 0x80, 0x80]
    assert packed.unpack(codes, exponents, signed=True).tolist() == [-1, -1.5, -2, 0, 0, 0, 0]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_its_group_nan(broken: float, signed: bool) -> None:
    x = torch.rand(2, 300)
    x[1, 130] = broken
    codes, exponents = packed.pack(x, signed, _noise(x.shape))
    y = packed.unpack(codes, exponents, signed)
    assert exponents[1, 1] == packed.BROKEN and y[1, 128:256].isnan().all()
    assert y[0].isfinite().all() and y[1, :128].isfinite().all() and y[1, 256:].isfinite().all()
    assert packed.pack(y, signed)[1].tolist() == exponents.tolist()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize(("shape", "block_d"), [((2, 2, 37), 16), ((3, 300), 128), ((3, 300), 512), ((2, 384), 256)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_gives_the_bits_of_the_reference(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], block_d: int, beta1: float
) -> None:
    adam_ = RowAdam(learning_rate=1e-2, beta1=beta1, beta2=0.99, seed=11)
    ours = torch.randn(shape, device=device).to(dtype)
    theirs = ours.clone()
    states = [RowAdamState.zeros(ours, adam_, U8) for _ in range(2)]
    for step in (1, 2, 3, 7, 8):
        # Over some twenty octaves: more than codes reach.
        grad = (torch.randn(shape, device=device) * torch.exp2(5 * torch.randn(shape, device=device))).to(dtype)
        touched, hyper = torch.rand(shape[:-1], device=device) < 0.6, adam_.hyper(step, device, dtype)
        optim.row_adam_(ours, grad, states[0], hyper, touched, _block(block_d))
        adam.row_adam_(theirs, grad, states[1], hyper, touched)
    if device == "cuda":
        # Products fuse with sums there: a last bit of float32 flips one rounding in some thousand.
        pairs = zip((ours, *_raw(states[0])), (theirs, *_raw(states[1])), strict=True)
        assert all((a != b).float().mean() < 0.01 for a, b in pairs)
        return
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(_raw(states[0]), _raw(states[1]), strict=True))


def _one_step(device: str, block_d: int, grad: Tensor, touched: Tensor) -> list[Tensor]:
    """Parameter and raw moments after a step from those that an earlier step left."""
    adam_ = RowAdam(learning_rate=1e-2, beta1=0.9, seed=2)
    param = torch.linspace(-1, 1, grad.numel(), device=device).view_as(grad)
    state = RowAdamState.zeros(param, adam_, U8)
    everywhere = torch.ones_like(touched)
    optim.row_adam_(param, param.flip(0), state, adam_.hyper(1, device, F32), everywhere, _block(block_d))
    optim.row_adam_(param, grad, state, adam_.hyper(5, device, F32), touched, _block(block_d))
    return [param, *_raw(state)]


def test_repeats_and_block_sizes_give_the_same_bits(device: str) -> None:
    grad, touched = torch.randn(2, 390, device=device), torch.ones(2, dtype=torch.bool, device=device)
    first, *others = (_one_step(device, block_d, grad, touched) for block_d in (128, 128, 32, 256, 512))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_untouched_rows_are_not_written(device: str) -> None:
    touched = torch.tensor([True, False, True], device=device)
    before = _one_step(device, 128, torch.ones(3, 150, device=device), torch.zeros_like(touched))
    after = _one_step(device, 128, torch.ones(3, 150, device=device), touched)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[~touched], new[~touched]) and not torch.equal(old[touched], new[touched])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_broken_gradient_stays_in_its_element_and_its_moments_in_their_group(device: str) -> None:
    grad = torch.randn(2, 300, device=device)
    grad[1, 130] = math.inf
    touched = torch.ones(2, dtype=torch.bool, device=device)
    param, _, v_exponents, _, m_exponents = _one_step(device, 128, grad, touched)
    assert param[1, 130].isnan() and param.isfinite().sum() == param.numel() - 1
    for exponents in (v_exponents, m_exponents):
        assert (exponents == packed.BROKEN).nonzero().tolist() == [[1, 1]]


def test_stored_moments_have_the_right_mean() -> None:
    d, seeds, gradient = 256, 64, 1.7
    touched = torch.ones(8, dtype=torch.bool)
    samples: dict[str, list[Tensor]] = {"exp_avg_sq": [], "exp_avg": []}
    for seed in range(seeds):
        adam_ = RowAdam(learning_rate=1e-3, beta1=0.9, seed=seed)
        param = torch.zeros(8, d)
        state = RowAdamState.zeros(param, adam_, U8)
        adam.row_adam_(param, torch.full((8, d), gradient), state, adam_.hyper(1, "cpu", F32), touched)
        for name, moment in state.moments().items():
            samples[name].append(moment)
    for name, exact in (("exp_avg_sq", (1 - 0.999) * gradient**2), ("exp_avg", (1 - 0.9) * gradient)):
        numbers = torch.stack(samples[name]).double()
        below, above = numbers.unique().tolist()
        assert below < exact < above
        # Standard deviation of two values that occur with probabilities p and 1 - p.
        share = (exact - below) / (above - below)
        deviation = (above - below) * math.sqrt(share * (1 - share) / numbers.numel())
        assert abs(numbers.mean().item() - exact) < 5 * deviation


@pytest.mark.parametrize("moments", [F32, BF16, U8])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_state_is_unchanged_by_saving_and_loading(moments: torch.dtype, beta1: float) -> None:
    adam_ = RowAdam(learning_rate=1e-2, beta1=beta1)
    param = torch.randn(2, 5, 200)
    first, second = (RowAdamState.zeros(param, adam_, moments) for _ in range(2))
    for step in (1, 4, 5):
        touched = torch.rand(2, 5) < 0.6
        adam.row_adam_(param, torch.randn_like(param), first, adam_.hyper(step, "cpu", F32), touched)
    given_ = first.moments()
    assert list(given_) == (["exp_avg_sq", "exp_avg"] if beta1 else ["exp_avg_sq"])
    assert all(moment.dtype == F32 and moment.shape == param.shape for moment in given_.values())
    second.load(given_, first.last_step_R)
    assert all(torch.equal(a, b) for a, b in zip(_raw(first), _raw(second), strict=True))
    assert torch.equal(first.last_step_R, second.last_step_R)


def test_moments_that_do_not_fit_are_refused() -> None:
    param = torch.randn(3, 7)
    state = RowAdamState.zeros(param, RowAdam(learning_rate=1.0), U8)
    for wrong in ({}, {"exp_avg_sq": param[:2]}, {"exp_avg_sq": param, "exp_avg": param}):
        with pytest.raises(ValueError, match="exp_avg_sq"):
            state.load(wrong, state.last_step_R)
    with pytest.raises(ValueError, match="float64"):
        RowAdamState.zeros(param.double(), RowAdam(learning_rate=1.0), U8)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_operators_step_on_codes_and_pass_opcheck(backend: str, device: str) -> None:
    device = "cpu" if backend == "cpu" else device
    values, indices = random_codes(2, 5, 2, 7, dtype=F32, device=device)
    x, W = torch.randn(5, 130, device=device), torch.randn(2, 7, 130, device=device)
    csr, adam_ = ops.feature_csr(values, indices, 7), RowAdam(learning_rate=0.01, beta1=0.5)
    state, state_enc = RowAdamState.zeros(W, adam_, U8), RowAdamState.zeros(W[0], adam_, U8)
    hyper, touched = adam_.hyper(1, device, F32), csr.touched()
    first = csr[:1].tensors()
    calls = [
        (library.row_adam_, (W, torch.randn_like(W), state.tensors(), state.seed, hyper, touched)),
        (library.decoder_step_, (x, values, indices, W, csr.tensors(), None, None, state.tensors(), state.seed, hyper)),
        (
            library.encoder_step_,
            (values[0], values[0], indices[0], x, W[0], first, state_enc.tensors(), state_enc.seed, hyper),
        ),
    ]
    ops.use_backend(backend)  # type: ignore[arg-type]
    try:
        if backend == "reference":
            for operator, arguments in calls:
                torch.library.opcheck(operator, arguments)
        before = W.clone()
        for operator, arguments in calls[1:]:
            operator(*arguments)
    finally:
        ops.use_backend("auto")
    for after, mask in ((state, touched), (state_enc, touched[0])):
        assert (after.v_RD[mask] > 0).all() and after.v_RD[~mask].eq(0).all()
    assert torch.equal(W[~touched], before[~touched]) and (W[touched] != before[touched]).all(dim=-1).all()


def _train(moments: torch.dtype, beta1: float, steps: int = 300) -> float:
    """Mean loss of the last 50 steps of sparse regression: rows of W are learnt from noisy sums of k of them."""
    rows, d, k, tokens = 48, 160, 4, 32
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(rows, d, generator=generator)
    # Gradients of one row differ ten thousandfold between channels, as those of outlier channels do.
    scale = torch.logspace(-2, 2, d)
    # Some features fire often and some seldom.
    frequency = torch.logspace(-1.5, 0, rows)
    adam_ = RowAdam(learning_rate=0.02, beta1=beta1, beta2=0.99)
    W = torch.zeros(rows, d)
    state, losses = RowAdamState.zeros(W, adam_, moments), []
    for step in range(1, steps + 1):
        chosen = torch.multinomial(frequency.expand(tokens, -1), k, generator=generator)
        codes = torch.zeros(tokens, rows).scatter_(1, chosen, torch.rand(tokens, k, generator=generator) + 0.5)
        noise = 0.3 * torch.randn(tokens, d, generator=generator)
        error = codes @ W - (codes @ truth + noise)
        losses.append(error.square().mean().item())
        grad = codes.T @ error * scale
        adam.row_adam_(W, grad, state, adam_.hyper(step, "cpu", F32), codes.any(dim=0))
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_training_ends_where_it_does_with_wide_moments(beta1: float) -> None:
    # Measured: within 0.001 of it; the runs see the same batches.
    assert _train(U8, beta1) == pytest.approx(_train(F32, beta1), rel=0.01)


def test_noise_of_twenty_bits_is_uniform() -> None:
    n = 1 << 18
    numbers = storage.noise(torch.arange(n), torch.tensor(1.0), 3, storage.MOMENT_1, 20)
    for digits in (numbers >> 12, (numbers >> 6) & 0xFF, numbers & 0xFF):
        counts = torch.bincount(digits, minlength=256)
        # Chi-squared with 255 degrees of freedom: standard deviation sqrt(510).
        assert abs(((counts - n / 256) ** 2).sum() / (n / 256) - 255) < 5 * math.sqrt(510)
