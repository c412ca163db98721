"""The CPU path is held to the reference, and the reference to definitions that fit in a line."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.kernels import cpu, ops, reference

F64 = torch.float64


def _brute_force_topk(pre: list[float], k: int) -> list[int]:
    """Feature numbers of the k largest positive entries, lowest number first among equals, ascending."""
    positive = [f for f in range(len(pre)) if pre[f] > 0]
    return sorted(sorted(positive, key=lambda f: (-pre[f], f))[:k])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_select_topk_equals_brute_force_with_ties_and_negatives(data: st.DataObject) -> None:
    n_features = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, n_features))
    row = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=n_features, max_size=n_features)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    for select in (reference.select_topk, cpu.select_topk):
        indices, filled = select(torch.tensor(rows), k)
        for pre, index, mask in zip(rows, indices, filled, strict=True):
            expected = _brute_force_topk(pre, k)
            assert index[mask].tolist() == expected
            assert index[~mask].tolist() == [0] * (k - len(expected))
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("tokens", "k", "n_features", "d"), [(7, 3, 11, 5), (1, 1, 1, 1), (9, 13, 13, 6), (33, 4, 65, 17)]
)
def test_encode_topk_equals_reference_forward_and_every_gradient(tokens: int, k: int, n_features: int, d: int) -> None:
    x, W, b = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((tokens, d), (n_features, d), (n_features,)))
    weight = torch.randn(tokens, k, dtype=F64)
    results = []
    for module in (cpu, reference):
        values, indices = module.encode_topk(x, W, b, k)
        results.append((indices, values, *torch.autograd.grad((values * weight).sum(), (x, W, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sources", "tokens", "k", "n_features", "d"), [(2, 7, 3, 11, 5), (1, 1, 1, 1, 1), (4, 33, 9, 65, 17)]
)
def test_decode_equals_reference_forward_and_every_gradient(
    sources: int, tokens: int, k: int, n_features: int, d: int
) -> None:
    pairs = [
        cpu.encode_topk(torch.randn(tokens, d), torch.randn(n_features, d), torch.randn(n_features), k)
        for _ in range(sources)
    ]
    values = torch.stack([v for v, _ in pairs]).double().requires_grad_()
    indices = torch.stack([i for _, i in pairs])
    W = torch.randn(sources, n_features, d, dtype=F64, requires_grad=True)
    b = torch.randn(d, dtype=F64, requires_grad=True)
    weight = torch.randn(tokens, d, dtype=F64)
    results = []
    for module in (cpu, reference):
        y = module.decode(values, indices, W, b)
        results.append((y, *torch.autograd.grad((y * weight).sum(), (values, W, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_pass_gradcheck_in_float64() -> None:
    x, W = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((5, 4), (9, 4)))
    # A bias that makes every slot filled: an empty one is a constant, which gradcheck would perturb.
    b = torch.full((9,), 20.0, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_topk(*a, 3)[0], (x, W, b))
    values, indices = ops.encode_topk(x, W, b, 3)
    values = values.detach()[None].requires_grad_()
    W_dec, b_dec = torch.randn(1, 9, 6, dtype=F64, requires_grad=True), torch.randn(6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w, c: ops.decode(v, indices[None], w, c), (values, W_dec, b_dec))


def test_rows_without_positive_preactivation_are_empty_and_get_no_gradient() -> None:
    x, W = torch.ones(3, 2), torch.ones(5, 2)
    b = torch.full((5,), -10.0, requires_grad=True)
    values, indices = ops.encode_topk(x, W, b, 4)
    assert values.eq(0).all() and indices.eq(0).all()
    values.sum().backward()
    assert b.grad is not None and b.grad.eq(0).all()


def test_a_bias_of_minus_infinity_excludes_a_feature() -> None:
    bias = torch.zeros(6)
    bias[:3] = -torch.inf
    _, indices = ops.encode_topk(torch.ones(2, 4), torch.ones(6, 4), bias, 2)
    assert indices.tolist() == [[3, 4], [3, 4]]


def test_nan_preactivation_reaches_the_values() -> None:
    x = torch.tensor([[float("nan"), 1.0]])
    for module in (cpu, reference):
        values, _ = module.encode_topk(x, torch.eye(2), torch.zeros(2), 1)
        assert values.isnan().any()


def test_half_precision_takes_the_reference_and_selects_what_float32_of_the_same_values_selects() -> None:
    x, W = torch.randn(6, 8).bfloat16(), torch.randn(32, 8).bfloat16()
    values, indices = ops.encode_topk(x, W, torch.zeros(32).bfloat16(), 4)
    pre = x @ W.T
    expected, filled = reference.select_topk(pre.float(), 4)
    assert torch.equal(indices.long()[filled], expected[filled])
    assert values.dtype == torch.bfloat16


def test_repeated_runs_are_bitwise_equal() -> None:
    x, W, b = torch.randn(64, 16), torch.randn(256, 16), torch.zeros(256)
    W.requires_grad_()
    runs = []
    for _ in range(2):
        values, _ = ops.encode_topk(x, W, b, 8)
        runs.append((values, torch.autograd.grad(values.square().sum(), W)[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ops.encode_topk(torch.ones(2, 3), torch.ones(4, 5), torch.ones(4), 1), "W_enc"),
        (lambda: ops.encode_topk(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), 5), "k=5"),
        (
            lambda: ops.decode(torch.ones(1, 2, 3), torch.ones(1, 2, 4).int(), torch.ones(1, 5, 6), torch.ones(6)),
            "values",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_their_shapes(call: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()  # type: ignore[operator]
