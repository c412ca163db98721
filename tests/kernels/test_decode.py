"""Gather decode equals the reference, and its bits depend on its inputs alone."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from clt.kernels.common.interface import DecodeInputs
from clt.kernels.gpu.configs import GatherConfig
from clt.kernels.gpu.decode import decode, decode_loss
from clt.kernels.pytorch import reference

from .conftest import random_codes

# S, B, K, F, D; the last has three column chunks of which the last is ragged, and slots past a whole unrolled step.
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 11, 5), (3, 5, 13, 13, 37), (2, 6, 11, 40, 70)]
SMALL = GatherConfig(block_d=32, unroll=4, num_warps=1)

# Sums of at most 100 terms of size 1: a hundred roundings.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def _inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices, W_dec, b_dec, y, weights, skip."""
    sources, tokens, k, n_features, d = shape
    torch.manual_seed(0)
    values, indices = random_codes(sources, tokens, k, n_features, dtype=dtype, device=device, filled=0.7)
    dense = [torch.randn(*s).to(device, dtype) for s in ((sources, n_features, d), (d,), (tokens, d), (tokens, d))]
    return values, indices, *dense[:3], torch.rand(tokens, device=device).to(values.dtype), dense[3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_skip", [False, True])
def test_decode_equals_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, with_skip: bool, device: str
) -> None:
    values, indices, W, b, _, _, skip = _inputs(shape, dtype, device)
    inputs = DecodeInputs(values, indices, W, b, skip if with_skip else None)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(decode(inputs, SMALL), reference.decode(inputs), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("weighted", "with_skip"), [(False, True), (True, False)])
def test_decode_loss_equals_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, weighted: bool, with_skip: bool, device: str
) -> None:
    values, indices, W, b, y, weights, skip = _inputs(shape, dtype, device)
    inputs = DecodeInputs(values, indices, W, b, skip if with_skip else None)
    arguments = (inputs, y, weights if weighted else None)
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip(decode_loss(*arguments, SMALL), reference.decode_loss(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_rounded_once(shape: tuple[int, int, int, int, int], device: str) -> None:
    values, indices, W, b, y, weights, skip = _inputs(shape, torch.bfloat16, device)
    error, residual = decode_loss(DecodeInputs(values, indices, W, b, skip), y, weights, SMALL)
    wide = DecodeInputs(values.double(), indices, W.double(), b.double(), skip.double())
    exact_error, exact_residual = reference.decode_loss(wide, y.double(), weights.double())
    assert error.dtype == torch.float32 and residual.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits; plus the float32 error where the sum cancels.
    torch.testing.assert_close(residual.double(), exact_residual, rtol=2.0**-8, atol=1e-5)
    torch.testing.assert_close(error.double(), exact_error, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_result_does_not_depend_on_the_launch_settings(dtype: torch.dtype, device: str) -> None:
    values, indices, W, b, y, weights, skip = _inputs((2, 3, 11, 40, 70), dtype, device)
    configs = [
        GatherConfig(block_d=block_d, unroll=unroll, num_warps=warps)
        for block_d, unroll, warps in ((16, 1, 1), (64, 8, 1), (128, 4, 4), (32, 16, 2))
    ]
    inputs = DecodeInputs(values, indices, W, b, skip)
    results = [decode(inputs, config) for config in configs]
    results += [decode_loss(inputs, torch.zeros_like(y), weights, config)[1] for config in configs]
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeats_are_bitwise_equal_and_tokens_independent(dtype: torch.dtype, device: str) -> None:
    values, indices, W, b, y, weights, skip = _inputs((2, 9, 5, 12, 40), dtype, device)
    inputs = DecodeInputs(values, indices, W, b, skip)
    error, residual = decode_loss(inputs, y, weights)
    again, _ = decode_loss(inputs, y, weights)
    order = torch.randperm(9, device=device)
    reordered = DecodeInputs(values[:, order], indices[:, order], W, b, skip[order])
    _, permuted = decode_loss(reordered, y[order], weights[order])
    assert torch.equal(error, again) and torch.equal(residual[order], permuted)


def test_empty_slots_add_nothing(device: str) -> None:
    values, indices = torch.zeros(2, 4, 3, device=device), torch.zeros(2, 4, 3, dtype=torch.int32, device=device)
    W, b, skip = (torch.randn(*s, device=device) for s in ((2, 5, 20), (20,), (4, 20)))
    assert torch.equal(decode(DecodeInputs(values, indices, W, b, skip)), b + skip)


def test_strided_arguments_are_read_by_their_strides(device: str) -> None:
    values, indices, W, b, y, _, _ = _inputs((2, 6, 3, 8, 20), torch.float64, device)
    arguments = (values, indices, W, b, y)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in arguments]
    weights = torch.ones((), dtype=torch.float64, device=device).expand(6)
    ours = decode_loss(DecodeInputs(*strided), strided[4], weights)
    theirs = reference.decode_loss(DecodeInputs(*arguments), y, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_decoders_of_more_than_two_to_the_31_elements_are_addressed(device: str) -> None:
    sources, n_features, d = 2, 300_000, 4096
    W = torch.zeros(sources, n_features, d, dtype=torch.bfloat16, device=device)
    W[1, -1] = torch.randn(d, device=device)
    values = torch.ones(sources, 1, 1, dtype=torch.bfloat16, device=device)
    indices = torch.full((sources, 1, 1), n_features - 1, dtype=torch.int32, device=device)
    assert torch.equal(decode(DecodeInputs(values, indices, W, torch.zeros_like(W[0, 0]), None))[0], W[1, -1])
