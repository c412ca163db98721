"""Reference against one-line definitions; CPU backend and dense path against the reference."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.kernels.common import csr
from clt.kernels.common.csr import FeatureCSR
from clt.kernels.common.interface import DecodeInputs, DecoderGradInputs, EncoderGradInputs
from clt.kernels.pytorch import cpu, dense, reference

from .conftest import random_codes

F64 = torch.float64

# sources, tokens, k, features, d: off the power of two, k = 1, k = F, one of everything.
SHAPES = [(2, 7, 3, 11, 5), (1, 1, 1, 1, 1), (3, 33, 9, 65, 17), (1, 6, 8, 8, 3)]


def _brute_force_topk(pre: list[float], k: int) -> list[int]:
    """Feature numbers of the k largest positive entries, lowest number first among equals, ascending."""
    positive = [f for f in range(len(pre)) if pre[f] > 0]
    return sorted(sorted(positive, key=lambda f: (-pre[f], f))[:k])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rank_topk_equals_brute_force_with_ties_and_negatives(data: st.DataObject) -> None:
    n_features = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, n_features))
    row = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=n_features, max_size=n_features)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    for rank in (reference.rank_topk, cpu.rank_topk):
        indices, filled = rank(torch.tensor(rows), k)
        for pre, index, mask in zip(rows, indices, filled, strict=True):
            expected = _brute_force_topk(pre, k)
            assert index[mask].tolist() == expected
            assert index[~mask].tolist() == [0] * (k - len(expected))
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_batch_topk_takes_the_n_largest_of_the_batch_first_entries_first_among_equals(data: st.DataObject) -> None:
    tokens, n_features = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    n = data.draw(st.integers(1, tokens * n_features))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, F64]))
    numbers = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=n_features, max_size=n_features)
    rows = [data.draw(numbers) for _ in range(tokens)]
    flat = [value for row in rows for value in row]
    expected = _brute_force_topk(flat, n)
    pre = torch.tensor(rows, dtype=dtype)
    threshold, quota = reference.batch_threshold(pre, n)
    values, indices, counts = reference.select_above(pre, threshold, quota, n_features)
    chosen = [b * n_features + int(f) for b in range(tokens) for f in indices[b, : counts[b]]]
    assert chosen == expected
    assert values[values > 0].tolist() == [flat[place] for place in expected]


def test_batch_threshold_over_two_ranks_equals_the_threshold_of_both_batches_together() -> None:
    pre = torch.randn(6, 40).mul(4).round()
    whole = reference.batch_threshold(pre, 50)
    first_counts: list[torch.Tensor] = []
    reference.batch_threshold(pre[:2], 50, lambda counts: first_counts.append(counts.clone()) or counts)
    # A rank that holds the first rows, with the other rank's counts added at every pass of the search.
    shares = iter(_counts_along(pre[2:], whole[0]))
    ours = reference.batch_threshold(pre[:2], 50, lambda counts: counts + next(shares))
    assert torch.equal(ours[0], whole[0]) and torch.equal(ours[1], whole[1])


def _counts_along(pre: torch.Tensor, threshold: torch.Tensor) -> list[torch.Tensor]:
    """Counts that a rank with these rows contributes at each pass of the search that ends at a threshold."""
    keys, goal = reference.positive_keys(pre).reshape(-1), int(reference.positive_keys(threshold))
    keys = keys[keys > 0]
    shares = []
    for shift in (24, 16, 8, 0):
        digits = (keys[keys >> shift >> 8 == goal >> shift >> 8] >> shift) & 0xFF
        shares.append(torch.bincount(digits, minlength=256))
    return shares


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    tokens=st.integers(1, 30),
    n_features=st.integers(1, 12),
    filled=st.sampled_from([0.0, 0.3, 1.0]),
    split=st.sampled_from([1, 3, 256]),
    data=st.data(),
)
def test_feature_csr_lists_every_filled_slot_once_in_token_order(
    layers: int, tokens: int, n_features: int, filled: float, split: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n_features))
    values, indices = random_codes(layers, tokens, k, n_features, dtype=torch.float32, device="cpu", filled=filled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "SPLIT", split)
        grouping = FeatureCSR.build(values, indices, n_features)
    for layer in range(layers):
        parts = []
        for feature in range(n_features):
            first, last = grouping.bounds[layer, feature], grouping.bounds[layer, feature + 1]
            held = (indices[layer].reshape(-1) == feature) & (values[layer].reshape(-1) != 0)
            assert grouping.slots[layer, first:last].tolist() == held.nonzero()[:, 0].tolist()
            assert grouping.tokens[layer, first:last].tolist() == (held.nonzero()[:, 0] // k).tolist()
            further = max(0, -(-int(last - first) // split) - 1)
            assert int(grouping.spill_bounds[layer, feature + 1] - grouping.spill_bounds[layer, feature]) == further
            parts += [feature] * further
        spills = grouping.spill_feature[layer].tolist()
        assert spills == parts + [n_features] * (tokens * k // split - len(parts))


@pytest.mark.parametrize(("sources", "tokens", "k", "n_features", "d"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_explicit_gradients_are_those_of_autograd(
    sources: int, tokens: int, k: int, n_features: int, d: int, weighted: bool
) -> None:
    values, indices = random_codes(sources, tokens, k, n_features, dtype=F64, device="cpu", filled=0.8)
    values.requires_grad_()
    W = torch.randn(sources, n_features, d, dtype=F64, requires_grad=True)
    b, y = torch.randn(d, dtype=F64), torch.randn(tokens, d, dtype=F64)
    weights = torch.rand(tokens, dtype=F64) if weighted else None
    error, residual = reference.decode_loss(DecodeInputs(values, indices, W, b, None), y, weights)
    expected = torch.autograd.grad(error, (values, W))
    grouping = FeatureCSR.build(values.detach(), indices, n_features)
    scale = torch.tensor(2 / d if weighted else 2 / (d * tokens), dtype=F64)
    inputs = DecoderGradInputs(residual, values.detach(), indices, W.detach(), grouping, weights, scale)
    for grads in (
        reference.decoder_grad(inputs),
        cpu.decoder_grad(inputs),
        dense.decoder_grad(inputs),
    ):
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sources", "tokens", "k", "n_features", "d"), SHAPES)
def test_cpu_and_dense_paths_equal_the_reference(sources: int, tokens: int, k: int, n_features: int, d: int) -> None:
    values, indices = random_codes(sources, tokens, k, n_features, dtype=F64, device="cpu", filled=0.8)
    W, b = torch.randn(sources, n_features, d, dtype=F64), torch.randn(d, dtype=F64)
    y, skip, weights = torch.randn(tokens, d, dtype=F64), torch.randn(tokens, d, dtype=F64), torch.rand(tokens).double()
    x, grad_values = torch.randn(tokens, d, dtype=F64), torch.randn(tokens, k, dtype=F64)
    grouping = FeatureCSR.build(values[:1], indices[:1], n_features)
    encoder = EncoderGradInputs(grad_values, values[0], indices[0], x, n_features, grouping)
    inputs = DecodeInputs(values, indices, W, b, skip)
    expected = _results(reference, inputs, y, weights, encoder)
    for path in (cpu, dense):
        results = _results(path, inputs, y, weights, encoder)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _results(
    path: ModuleType, inputs: DecodeInputs, y: torch.Tensor, weights: torch.Tensor, encoder: EncoderGradInputs
) -> list[torch.Tensor]:
    without_skip = replace(inputs, skip_BD=None)
    return [
        path.decode(without_skip),
        path.decode(inputs),
        *path.decode_loss(without_skip, y, None),
        *path.decode_loss(inputs, y, weights),
        *path.encoder_grad(encoder),
    ]


@pytest.mark.parametrize("path", [cpu, dense])
def test_features_may_repeat_within_a_token(path: ModuleType) -> None:
    # Tied decoders join the slots of several sources: more slots than features, and features repeat.
    values, indices = torch.rand(1, 5, 11, dtype=F64), torch.randint(0, 4, (1, 5, 11), dtype=torch.int32)
    values[:, :, -3:], indices[:, :, -3:] = 0, 0
    W, grad = torch.randn(1, 4, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    grouping = csr.FeatureCSR.build(values, indices, 4)
    inputs = DecoderGradInputs(grad, values, indices, W, grouping)
    found, expected = (
        (module.decode(DecodeInputs(values, indices, W, W.new_zeros(6), None)), *module.decoder_grad(inputs))
        for module in (path, reference)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("tokens", "k", "n_features", "d"), [(7, 3, 11, 5), (1, 1, 1, 1), (9, 13, 13, 6), (33, 4, 65, 17)]
)
def test_cpu_encode_equals_the_reference(tokens: int, k: int, n_features: int, d: int) -> None:
    x, W, b = (
        torch.randn(tokens, d, dtype=F64),
        torch.randn(n_features, d, dtype=F64),
        torch.randn(n_features, dtype=F64),
    )
    for ours, theirs in zip(cpu.encode_topk(x, W, b, k), reference.encode_topk(x, W, b, k), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scattered_codes_keep_feature_zero_when_slots_are_empty() -> None:
    values, indices = torch.tensor([[[3.0, 0.0, 0.0]]]), torch.tensor([[[0, 0, 0]]], dtype=torch.int32)
    assert dense.scatter_codes(values, indices, 2).tolist() == [[3.0, 0.0]]


def test_nan_preactivation_reaches_the_values() -> None:
    pre = torch.tensor([[float("nan"), 1.0], [2.0, -float("nan")]])
    for path in (cpu, reference):
        values, _ = path.select_topk(pre, 1)
        assert values.isnan().all()
