"""Row-sparse Adam equals Adam for beta1 = 0, and its Triton kernel equals the PyTorch update."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from clt.kernels.common import adam, storage
from clt.kernels.common.adam import RowAdam, RowAdamState
from clt.kernels.gpu import optim
from clt.kernels.gpu.configs import GatherConfig

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SMALL = GatherConfig(block_d=16, unroll=1, num_warps=1)

#: Parameter and moments.
PRECISIONS = [(F64, F64), (F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)]


def _moments(state: RowAdamState) -> list[Tensor]:
    return [state.v_RD] if state.m_RD is None else [state.v_RD, state.m_RD]


def _assert_same(ours: Tensor, theirs: Tensor, moments: torch.dtype) -> None:
    """Bitwise in the interpreter, but for exp2 of float64, in which numpy and torch differ by a unit in the last place.

    On a GPU roots and quotients are approximate (2 units of float32) and products fuse with sums. A difference of one
    float32 unit can flip a stochastic rounding, which is one unit of bfloat16: in a moment, a change of the next moves
    (1e-2 each) by that share.
    """
    if ours.dtype == F64:
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    elif ours.device.type == "cpu":
        assert torch.equal(ours, theirs)
    else:
        rtol, atol = 2.0**-7 if ours.dtype == BF16 else 1e-5, 4e-2 * 2.0**-7 if moments == BF16 else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@triton.jit
def _noise_kernel(OUT, STEP, base, seed, STREAM: tl.constexpr, BITS: tl.constexpr):
    """16 numbers of noise from element `base` on; one program."""
    lanes = tl.arange(0, 16)
    tl.store(OUT + lanes, optim._noise(tl.cast(base, tl.int64) + lanes, tl.load(STEP), seed, STREAM, BITS).to(tl.int32))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.integers(0, 2**40),
    step=st.integers(1, 2**24 - 1),
    seed=st.integers(0, 2**31 - 1),
    stream=st.integers(0, 2),
    bits=st.sampled_from((16, 19, 20)),
)
def test_noise_of_the_kernel_is_the_noise_of_the_reference(
    device: str, base: int, step: int, seed: int, stream: int, bits: int
) -> None:
    ours = torch.empty(16, dtype=torch.int32, device=device)
    step_ = torch.tensor(float(step), device=device)
    _noise_kernel[(1,)](ours, step_, base, seed, stream, bits)
    theirs = storage.noise(base + torch.arange(16, device=device), step_, seed, stream, bits)
    assert torch.equal(ours.long(), theirs)


def test_noise_is_uniform_and_independent_of_neighbour_step_seed_and_stream() -> None:
    n = 1 << 18

    def noise(step: int = 1, seed: int = 3, stream: int = 0) -> Tensor:
        return storage.noise(torch.arange(n), torch.tensor(float(step)), seed, stream).double() / 2**16 - 0.5

    base = noise()
    # Five standard errors of the mean of n uniform numbers and of products of two of them.
    assert abs(base.mean()) < 5 / math.sqrt(12 * n)
    for other in (noise(step=2), noise(seed=4), noise(stream=1), noise(stream=2), base.roll(1), base.roll(768)):
        assert abs((base * other).mean()) < 5 / (12 * math.sqrt(n))
    counts = torch.bincount(((base + 0.5) * 256).long(), minlength=256)
    # Chi-squared with 255 degrees of freedom: standard deviation sqrt(510).
    assert abs(((counts - n / 256) ** 2).sum() / (n / 256) - 255) < 5 * math.sqrt(510)


@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32))
def test_stochastic_rounding_yields_a_neighbour_and_its_mean_is_exact(x: float) -> None:
    every_noise = torch.arange(2**16)
    rounded = storage.round_stochastically(torch.full((2**16,), x), every_noise).double()
    if math.isnan(x) or math.isinf(x):
        assert rounded.isnan().all() if math.isnan(x) else rounded.eq(x).all()
        return
    values = rounded.unique()
    # Cutting off the lower half of the bits gives the neighbour nearer to zero.
    inner = (torch.tensor(x).view(torch.int32) >> 16 << 16).view(F32).double()
    outer = ((torch.tensor(x).view(torch.int32) >> 16) + 1 << 16).view(F32).double()
    assert set(values.tolist()) <= {inner.item(), outer.item()}
    if outer.isfinite():
        assert rounded.mean().item() == pytest.approx(x, rel=1e-12, abs=0)


def test_updates_below_half_a_unit_move_bfloat16_parameters_by_the_right_mean(device: str) -> None:
    rows, d, seeds, rate = 16, 64, 16, 2e-4
    moved = []
    for seed in range(seeds):
        settings_ = RowAdam(learning_rate=rate, seed=seed)
        param = torch.ones(rows, d, dtype=BF16, device=device)
        state = RowAdamState.zeros(param, settings_, BF16)
        everywhere = torch.ones(rows, dtype=torch.bool, device=device)
        optim.row_adam_(param, torch.ones_like(param), state, settings_.hyper(1, device, BF16), everywhere)
        moved.append(1 - param.double())
        # v = (1 - beta2) g^2 = 0.001 lies between two bfloat16 numbers 2^-17 apart.
        assert (state.v_RD.double() - 0.001).abs().max() < 2.0**-17
    samples = torch.stack(moved)
    # The first step of Adam is the learning rate; the bfloat16 number below 1 is 2^-8 away.
    unit, n = 2.0**-8, samples.numel()
    assert set(samples.unique().tolist()) == {0.0, unit}
    assert abs(samples.mean().item() - rate) < 5 * math.sqrt(rate * unit / n)


def _dense_adam(param: Tensor, settings_: RowAdam) -> torch.optim.Adam:
    # Row Adam takes betas as the dtype holds them.
    beta1, beta2 = (torch.tensor(beta, dtype=param.dtype).item() for beta in (settings_.beta1, settings_.beta2))
    return torch.optim.Adam([param], lr=settings_.learning_rate, betas=(beta1, beta2), eps=settings_.eps)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(("beta1", "share"), [(0.0, 0.3), (0.0, 1.0), (0.9, 1.0), (0.9, 0.3)])
def test_lazy_steps_equal_dense_adam(device: str, dtype: torch.dtype, beta1: float, share: float) -> None:
    # float64: exp2 of up to 40 missed steps rounds once, and so do the 40 steps of dense Adam: 1e-14, grown by the sum
    # of moves. float32: the same with its unit of 6e-8.
    tolerance = 1e-12 if dtype == F64 else 1e-5
    settings_ = RowAdam(learning_rate=1e-2, beta1=beta1, beta2=0.97)
    ours = torch.randn(5, 13, dtype=dtype, device=device)
    theirs = ours.clone().requires_grad_()
    state, dense = RowAdamState.zeros(ours, settings_), _dense_adam(theirs, settings_)
    for step in range(1, 41):
        touched = torch.rand(5, device=device) < share
        grad = torch.randn_like(ours) * touched[:, None]
        optim.row_adam_(ours, grad, state, settings_.hyper(step, device, dtype), touched)
        theirs.grad = grad
        dense.step()
        moments = dense.state[theirs]["exp_avg_sq"], dense.state[theirs]["exp_avg"]
        for mine, full in zip(_moments(state), moments, strict=False):
            torch.testing.assert_close(mine[touched], full[touched], rtol=tolerance, atol=tolerance)
        if beta1 == 0 or share == 1:
            # Moves of rows with a gradient of zero are exactly zero, so every row agrees at every step.
            torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("missed", [1, 2, 1000, 20000])
def test_decay_over_missed_steps_is_precise(device: str, missed: int) -> None:
    settings_ = RowAdam(learning_rate=0.0, beta2=0.999)
    param = torch.zeros(1, 4, device=device)
    state = RowAdamState.zeros(param, settings_)
    state.v_RD.fill_(3.0)
    state.last_step_R.fill_(7)
    touched = torch.ones(1, dtype=torch.bool, device=device)
    optim.row_adam_(param, param, state, settings_.hyper(7 + missed, device, F32), touched)
    expected = 3.0 * torch.tensor(0.999).double().item() ** missed
    # log2 beta is float32, so its error of 2^-25 is raised to the power; the result is rounded twice.
    relative = 2.0**-23 + missed * abs(math.log(0.999)) * 2.0**-25
    torch.testing.assert_close(state.v_RD[0, 0].item(), expected, rtol=relative, atol=0)


@pytest.mark.parametrize(("dtype", "moments"), PRECISIONS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(2, 4, 37), (3, 1), (5, 32)])
def test_kernel_equals_reference(
    device: str, dtype: torch.dtype, moments: torch.dtype, beta1: float, shape: tuple[int, ...]
) -> None:
    settings_ = RowAdam(learning_rate=1e-2, beta1=beta1, beta2=0.99, seed=11)
    ours = torch.randn(shape, device=device).to(dtype)
    theirs = ours.clone()
    states = [RowAdamState.zeros(ours, settings_, moments) for _ in range(2)]
    for step in (1, 2, 3, 7):
        grad, touched = torch.randn(shape, device=device).to(dtype), torch.rand(shape[:-1], device=device) < 0.6
        hyper = settings_.hyper(step, device, dtype)
        optim.row_adam_(ours, grad, states[0], hyper, touched, SMALL)
        adam.row_adam_(theirs, grad, states[1], hyper, touched)
    _assert_same(ours, theirs, moments)
    assert torch.equal(states[0].last_step_R, states[1].last_step_R)
    for mine, full in zip(_moments(states[0]), _moments(states[1]), strict=True):
        _assert_same(mine, full, moments)


def _one_step(device: str, dtype: torch.dtype, grad: Tensor, touched: Tensor, config: GatherConfig) -> list[Tensor]:
    """Parameter and moments after step 5 from fixed ones of rows never touched, poisoned where they are not touched."""
    settings_ = RowAdam(learning_rate=1e-2, beta1=0.9, seed=2)
    numbers = torch.linspace(-1, 1, grad.numel(), device=device).view_as(grad)
    param = numbers.to(dtype)
    state = RowAdamState.zeros(param, settings_, BF16 if dtype == BF16 else None)
    for moment in _moments(state):
        moment[~touched] = torch.nan
    optim.row_adam_(param, grad.to(dtype), state, settings_.hyper(5, device, dtype), touched, config)
    return [param, *_moments(state)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_repeats_and_block_sizes_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    grad, touched = torch.randn(4, 50, device=device), torch.ones(4, dtype=torch.bool, device=device)
    first, *others = (
        _one_step(device, dtype, grad, touched, GatherConfig(block_d=block, unroll=1, num_warps=warps))
        for block, warps in ((16, 1), (16, 1), (64, 2))
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_untouched_rows_are_neither_read_nor_written(device: str, dtype: torch.dtype) -> None:
    touched = torch.tensor([True, False, True, False], device=device)
    grad = torch.randn(4, 21, device=device)
    grad[~touched] = torch.nan
    param, v, m = _one_step(device, dtype, grad, touched, SMALL)
    before = torch.linspace(-1, 1, grad.numel(), device=device).view_as(grad).to(dtype)
    assert torch.equal(param[~touched], before[~touched])
    assert v[~touched].isnan().all() and m[~touched].isnan().all()
    assert param[touched].isfinite().all() and v[touched].isfinite().all() and m[touched].isfinite().all()
    assert not torch.equal(param[touched], before[touched])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_gradient_shows_in_its_element_and_nowhere_else(
    device: str, dtype: torch.dtype, broken: float
) -> None:
    grad = torch.randn(3, 20, device=device)
    grad[1, 17] = broken
    param, v, m = _one_step(device, dtype, grad, torch.ones(3, dtype=torch.bool, device=device), SMALL)
    # inf / sqrt(inf) is NaN.
    assert param[1, 17].isnan()
    assert v[1, 17].isnan() if math.isnan(broken) else v[1, 17].isinf() and m[1, 17].isinf()
    for tensor, (row, column) in itertools.product((param, v, m), ((1, 16), (1, 18), (0, 17), (2, 17))):
        assert tensor[row, column].isfinite()


def test_only_touched_rows_record_the_step(device: str) -> None:
    settings_ = RowAdam(learning_rate=1e-2)
    param = torch.zeros(2, 3, 8, device=device)
    state = RowAdamState.zeros(param, settings_)
    touched = torch.tensor([[True, False, False], [False, False, True]], device=device)
    optim.row_adam_(param, torch.ones_like(param), state, settings_.hyper(9, device, F32), touched)
    assert state.last_step_R.tolist() == [[9, 0, 0], [0, 0, 9]]
    assert state.last_step_R.dtype == torch.int32


@pytest.mark.gpu
def test_a_captured_step_follows_new_hyper_parameters() -> None:
    settings_ = RowAdam(learning_rate=1e-2)
    params = [torch.ones(64, 512, device="cuda") for _ in range(2)]
    states = [RowAdamState.zeros(param, settings_) for param in params]
    grad, touched = torch.randn_like(params[0]), torch.rand(64, device="cuda") < 0.5
    hyper = settings_.hyper(1, "cuda", F32)
    optim.row_adam_(params[0], grad, states[0], hyper, touched)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optim.row_adam_(params[0], grad, states[0], hyper, touched)
    for step in (2, 3, 4):
        hyper.copy_(RowAdam(learning_rate=1e-2 / step).hyper(step, "cuda", F32))
        graph.replay()
    for step in (1, 2, 3, 4):
        fresh = RowAdam(learning_rate=1e-2 / step).hyper(step, "cuda", F32)
        optim.row_adam_(params[1], grad, states[1], fresh, touched)
    assert torch.equal(params[0], params[1]) and torch.equal(states[0].v_RD, states[1].v_RD)


def test_hyper_parameters_are_the_nine_numbers_of_the_step() -> None:
    beta1, beta2 = 0.75, 0.9921875
    numbers = RowAdam(learning_rate=0.5, beta1=beta1, beta2=beta2, eps=0.25).hyper(3, "cpu", BF16)
    expected = [0.5, beta1, beta2, 0.25, 1 - beta1**3, 1 - beta2**3, math.log2(beta1), math.log2(beta2), 3.0]
    assert numbers.tolist() == torch.tensor(expected).tolist() and numbers.dtype == F32
    plain = RowAdam(learning_rate=0.5).hyper(1, "cpu", F64)
    assert plain[[1, 4, 6]].tolist() == [0.0, 1.0, 0.0] and plain.dtype == F64


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"beta1": 1.0}, {"beta2": 0.0}, {"beta2": 1 - 1e-9}, {"beta1": -0.1}, {"seed": 2**31}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RowAdam(learning_rate=1.0, **wrong)  # type: ignore[arg-type]
    for step in (0, 2**24):
        with pytest.raises(ValueError, match="step"):
            RowAdam(learning_rate=1.0).hyper(step, "cpu", F32)
    for dtype in (torch.float16, F64):
        with pytest.raises(ValueError, match="moments"):
            RowAdamState.zeros(torch.zeros(2, 3), RowAdam(learning_rate=1.0), dtype)


def test_moments_start_at_zero_in_the_wanted_dtype() -> None:
    for beta1, (dtype, moments) in itertools.product((0.0, 0.9), PRECISIONS):
        state = RowAdamState.zeros(
            torch.ones(2, 3, 4, dtype=dtype), RowAdam(learning_rate=1.0, beta1=beta1, seed=6), moments
        )
        assert (state.m_RD is None) == (beta1 == 0) and state.seed == 6
        for moment in _moments(state):
            assert moment.shape == (2, 3, 4) and moment.dtype == moments and moment.eq(0).all()
        assert state.last_step_R.shape == (2, 3) and state.last_step_R.eq(0).all()
    assert RowAdamState.zeros(torch.ones(2, 3, dtype=BF16), RowAdam(learning_rate=1.0)).v_RD.dtype == F32
