"""Public operations: every backend gives the same results and gradients, eager and compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from clt.kernels import backend, library, ops
from clt.kernels.common.interface import DecodeInputs
from clt.kernels.gpu import configs
from clt.kernels.pytorch import reference

from .conftest import random_codes

F64 = torch.float64
BACKENDS = ["reference", "cpu", "triton-sparse", "triton-dense"]


@pytest.fixture(params=BACKENDS)
def chosen(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test with each implementation; the device its tensors must lie on."""
    backend_name, _, path = request.param.partition("-")
    if path:
        # Both at sizes for which the rule would always take dense products.
        monkeypatch.setattr(configs, "path", lambda *_: path)
    ops.use_backend(backend_name)
    yield "cpu" if backend_name == "cpu" else device
    ops.use_backend("auto")


def _leaves(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=F64, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("tokens", "k", "n_features", "d"), [(7, 3, 11, 5), (1, 1, 1, 1), (5, 9, 9, 6)])
def test_encode_topk_has_the_gradients_of_the_definition(
    chosen: str, tokens: int, k: int, n_features: int, d: int
) -> None:
    x, W, b = _leaves(chosen, (tokens, d), (n_features, d), (n_features,))
    weight = torch.randn(tokens, k, dtype=F64, device=chosen)
    values, indices = ops.encode_topk(x, W, b, k)
    pre = torch.addmm(b, x, W.T)
    expected, filled = reference.rank_topk(pre.detach(), k)
    assert torch.equal(indices.long(), expected) and indices.dtype == torch.int32
    meant = torch.where(filled, pre.gather(1, expected), 0)
    ours = torch.autograd.grad((values * weight).sum(), (x, W, b))
    theirs = torch.autograd.grad((meant * weight).sum(), (x, W, b))
    for a, e in zip((values, *ours), (meant, *theirs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sources", "tokens", "k", "n_features", "d"), [(2, 7, 3, 11, 5), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_and_its_loss_have_the_gradients_of_the_definition(
    chosen: str, sources: int, tokens: int, k: int, n_features: int, d: int, shared: bool
) -> None:
    values, indices = random_codes(sources, tokens, k, n_features, dtype=F64, device=chosen, filled=0.8)
    values.requires_grad_()
    W, b, skip = _leaves(chosen, (sources, n_features, d), (d,), (tokens, d))
    y, weights = torch.randn(tokens, d, dtype=F64, device=chosen), torch.rand(tokens, dtype=F64, device=chosen)
    csr = ops.feature_csr(values, indices, n_features) if shared else None
    leaves = (values, W, b, skip)
    inputs = DecodeInputs(values, indices, W, b, skip)
    meant = reference.decode(inputs)

    ours = ops.decode(values, indices, W, b, skip, csr)
    _assert_same(ours, meant, leaves, torch.randn_like(meant))
    for token_weights in (None, weights):
        error, residual = ops.decode_loss(values, indices, W, b, y, token_weights, skip, csr)
        expected, _ = reference.decode_loss(inputs, y, token_weights)
        _assert_same(error, expected, leaves, torch.tensor(1.7, dtype=F64, device=chosen))
        torch.testing.assert_close(residual, (meant - y).detach(), rtol=1e-12, atol=1e-12)
        assert not residual.requires_grad


def test_loss_of_numbers_worked_out_by_hand(chosen: str) -> None:
    values, indices = torch.tensor([[[2.0], [0.0]]], device=chosen), torch.tensor([[[1], [0]]], device=chosen).int()
    W, b = torch.tensor([[[9.0, 9.0], [1.0, 3.0]]], device=chosen), torch.tensor([0.5, 0.0], device=chosen)
    y = torch.tensor([[1.5, 2.0], [0.5, 2.0]], device=chosen)
    # Reconstructions: 2*[1,3] + b = [2.5,6]; an empty slot gives b = [0.5,0].
    error, residual = ops.decode_loss(values, indices, W, b, y)
    assert residual.tolist() == [[1.0, 4.0], [0.0, -2.0]]
    assert error.item() == (1 + 16 + 0 + 4) / 4
    weighted, _ = ops.decode_loss(values, indices, W, b, y, torch.tensor([0.0, 3.0], device=chosen))
    assert weighted.item() == 3 * (0 + 4) / 2


def _assert_same(ours: torch.Tensor, meant: torch.Tensor, leaves: Any, grad: torch.Tensor) -> None:
    torch.testing.assert_close(ours, meant, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(ours, leaves, grad, retain_graph=True),
        torch.autograd.grad(meant, leaves, grad, retain_graph=True),
        strict=True,
    )
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradients_pass_gradcheck_in_float64(chosen: str, request: pytest.FixtureRequest) -> None:
    # Small, because gradcheck runs the operation twice for every number of its inputs. That takes 30 s in Triton's
    # interpreter: there along random directions, and the tests above hold each number to the definition's.
    fast = request.node.callspec.params["chosen"].startswith("triton")
    x, W = _leaves(chosen, (2, 2), (3, 2))
    # A bias that makes every slot filled: an empty one is a constant, which gradcheck would perturb.
    b = torch.full((3,), 20.0, dtype=F64, device=chosen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.encode_topk(*a, 2)[0], (x, W, b), fast_mode=fast)
    values, indices = ops.encode_topk(x, W, b, 2)
    values, indices = values.detach()[None].requires_grad_(), indices[None]
    W_dec, b_dec, skip = _leaves(chosen, (1, 3, 2), (2,), (2, 2))
    y, weights = torch.randn(2, 2, dtype=F64, device=chosen), torch.rand(2, dtype=F64, device=chosen)
    assert torch.autograd.gradcheck(
        lambda v, w, c, s: ops.decode_loss(v, indices, w, c, y, weights, s)[0],
        (values, W_dec, b_dec, skip),
        fast_mode=fast,
    )


def test_a_gradient_that_is_one_number_for_all_slots_is_read_as_such(chosen: str) -> None:
    # The gradient of a sum arrives as one number with strides of 0.
    x, W, b = _leaves(chosen, (5, 4), (7, 4), (7,))
    ours = torch.autograd.grad(ops.encode_topk(x, W, b, 2)[0].sum(), (x, W, b))
    meant = torch.autograd.grad((ops.encode_topk(x, W, b, 2)[0] * torch.ones(5, 2, device=chosen)).sum(), (x, W, b))
    for a, e in zip(ours, meant, strict=True):
        assert torch.equal(a, e)
    values, indices = random_codes(1, 4, 2, 6, dtype=F64, device=chosen)
    values.requires_grad_()
    W_dec, b_dec = _leaves(chosen, (1, 6, 3), (3,))
    y = ops.decode(values, indices, W_dec, b_dec)
    ours = torch.autograd.grad(y.sum(), (values, W_dec, b_dec), retain_graph=True)
    meant = torch.autograd.grad(y, (values, W_dec, b_dec), torch.ones_like(y))
    for a, e in zip(ours, meant, strict=True):
        assert torch.equal(a, e)


def test_frozen_decoders_cost_no_gradient_of_theirs(chosen: str) -> None:
    values, indices = random_codes(2, 4, 2, 6, dtype=F64, device=chosen)
    values.requires_grad_()
    W, b = torch.randn(2, 6, 3, dtype=F64, device=chosen), torch.randn(3, dtype=F64, device=chosen)
    ours = torch.autograd.grad(ops.decode(values, indices, W, b).square().sum(), values)[0]
    meant = torch.autograd.grad(reference.decode(DecodeInputs(values, indices, W, b, None)).square().sum(), values)[0]
    torch.testing.assert_close(ours, meant, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_steps_equal_gradient_then_optimizer(chosen: str, beta1: float) -> None:
    settings = ops.RowAdam(learning_rate=0.01, beta1=beta1)
    values, indices = random_codes(2, 6, 2, 9, dtype=F64, device=chosen, filled=0.7)
    grad, x = (torch.randn(6, 5, dtype=F64, device=chosen) for _ in range(2))
    W, W_enc = torch.randn(2, 9, 5, dtype=F64, device=chosen), torch.randn(9, 5, dtype=F64, device=chosen)
    fused, plain = [(t.clone(), ops.RowAdamState.zeros(t, settings)) for t in (W, W_enc)], []
    plain = [(t.clone(), ops.RowAdamState.zeros(t, settings)) for t in (W, W_enc)]
    csr = ops.feature_csr(values, indices, 9)
    for step in (1, 2, 5):
        hyper = settings.hyper(step, chosen, F64)
        dz = ops.decoder_step_(grad, values, indices, fused[0][0], csr, fused[0][1], hyper)
        db = ops.encoder_step_(dz[0], values[0], indices[0], x, fused[1][0], csr[:1], fused[1][1], hyper)
        expected_dz, dW = ops.decoder_grad(grad, values, indices, plain[0][0], csr)
        ops.row_adam_(plain[0][0], dW, plain[0][1], hyper, csr.touched())
        dW_enc, expected_db = ops.encoder_grad(dz[0], values[0], indices[0], x, 9, csr[:1])
        ops.row_adam_(plain[1][0], dW_enc, plain[1][1], hyper, csr.touched()[0])
        for a, e in ((dz, expected_dz), (db, expected_db), *((f[0], p[0]) for f, p in zip(fused, plain, strict=True))):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        for (_, ours), (_, theirs) in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours.v_RD, theirs.v_RD, rtol=1e-12, atol=1e-15)
            assert torch.equal(ours.last_step_R, theirs.last_step_R)


def _operator_calls(device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """One call of every registered operator."""
    values, indices = random_codes(2, 5, 2, 7, dtype=F64, device=device, filled=0.8)
    x, W_enc, b_enc = _leaves(device, (5, 4), (7, 4), (7,))
    W, b, skip = _leaves(device, (2, 7, 4), (4,), (5, 4))
    y, weights, scale = (torch.rand(s, dtype=F64, device=device) for s in ((5, 4), (5,), ()))
    csr = ops.feature_csr(values, indices, 7).tensors()
    first = [tensor[:1] for tensor in csr]
    settings = ops.RowAdam(learning_rate=0.01, beta1=0.5)
    state, state_enc = ops.RowAdamState.zeros(W.detach(), settings), ops.RowAdamState.zeros(W_enc.detach(), settings)
    moments, moments_enc = (state.tensors(), 0), (state_enc.tensors(), 0)
    hyper = settings.hyper(3, device, F64)
    live = values.clone().requires_grad_()
    plain, plain_enc = W.detach().clone(), W_enc.detach().clone()
    touched = torch.ones(2, 7, dtype=torch.bool, device=device)
    return [
        (library.feature_csr, (values, indices, 7)),
        (library.select_topk, (torch.randn(4, 9, device=device), 3)),
        (library.encode_topk, (x, W_enc, b_enc, 2)),
        (library.encode_selected, (x, W_enc, b_enc, values[0], indices[0])),
        (library.encoder_grad, (values[0], values[0], indices[0], x.detach(), 7, first)),
        (library.decode, (live, indices, W, b, None, [])),
        (library.decode, (live, indices, W, b, skip, csr)),
        (library.decode_loss, (live, indices, W, b, y, weights, skip, csr)),
        (library.decode_loss, (live, indices, W, b, y, None, None, [])),
        (library.decoder_grad, (y, values, indices, plain, csr, weights, scale, True)),
        (library.decoder_grad, (y, values, indices, plain, csr, None, None, False)),
        (library.row_adam_, (plain, torch.randn_like(plain), *moments, hyper, touched)),
        (library.decoder_step_, (y, values, indices, plain, csr, weights, scale, *moments, hyper)),
        (library.encoder_step_, (values[0], values[0], indices[0], y, plain_enc, first, *moments_enc, hyper)),
    ]


def test_operators_pass_opcheck(chosen: str) -> None:
    for operator, arguments in _operator_calls(chosen):
        torch.library.opcheck(operator, arguments)


def test_a_training_step_compiles_without_a_graph_break_and_equals_eager(chosen: str) -> None:
    x, W_enc, b_enc, W, b = _leaves(chosen, (5, 4), (7, 4), (7,), (1, 7, 4), (4,))
    y = torch.randn(5, 4, dtype=F64, device=chosen)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        values, indices = ops.encode_topk(*leaves[:3], 3)
        csr = ops.feature_csr(values[None], indices[None], 7)
        return ops.decode_loss(values[None], indices[None], *leaves[3:], y, csr=csr)[0]

    leaves = (x, W_enc, b_enc, W, b)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_without_positive_preactivation_are_empty_and_get_no_gradient(chosen: str) -> None:
    x, W = torch.ones(3, 2, device=chosen), torch.ones(5, 2, device=chosen)
    b = torch.full((5,), -10.0, device=chosen, requires_grad=True)
    values, indices = ops.encode_topk(x, W, b, 4)
    assert values.eq(0).all() and indices.eq(0).all()
    values.sum().backward()
    assert b.grad is not None and b.grad.eq(0).all()


def test_a_bias_of_minus_infinity_excludes_a_feature(chosen: str) -> None:
    bias = torch.zeros(6, device=chosen)
    bias[:3] = -torch.inf
    _, indices = ops.encode_topk(torch.ones(2, 4, device=chosen), torch.ones(6, 4, device=chosen), bias, 2)
    assert indices.tolist() == [[3, 4], [3, 4]]


def test_repeated_runs_are_bitwise_equal(chosen: str) -> None:
    x, W, b = (torch.randn(s, device=chosen) for s in ((12, 16), (40, 16), (40,)))
    W.requires_grad_()
    runs = []
    for _ in range(2):
        values, _ = ops.encode_topk(x, W, b, 4)
        runs.append((values.detach(), torch.autograd.grad(values.square().sum(), W)[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_bfloat16_on_the_cpu_takes_the_reference_and_rounds_preactivations_once() -> None:
    x, W, b = torch.randn(6, 8).bfloat16(), torch.randn(32, 8).bfloat16(), torch.zeros(32).bfloat16()
    assert ops.backend_of(x) == "reference"
    values, indices = ops.encode_topk(x, W, b, 4)
    pre = (x.float() @ W.float().T).bfloat16()
    expected, filled = reference.rank_topk(pre, 4)
    assert torch.equal(indices.long(), expected)
    assert torch.equal(values[filled], pre.gather(1, expected)[filled])


def test_the_backend_is_logged_once_per_kind_of_tensor(caplog: pytest.LogCaptureFixture) -> None:
    backend._backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="clt.kernels.backend"):
        for _ in range(3):
            ops.backend_of(torch.ones(2))
            ops.backend_of(torch.ones(2).bfloat16())
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "kernel_backend=cpu dtype=float32" in caplog.text
    assert "kernel_backend=reference (slow) dtype=bfloat16" in caplog.text


def test_a_chosen_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this machine")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ops.use_backend("triton")
    with pytest.raises(ValueError, match="nonsense"):
        ops.use_backend("nonsense")  # type: ignore[arg-type]
    ops.use_backend("cpu")
    try:
        with pytest.raises(RuntimeError, match="bfloat16"):
            ops.select_topk(torch.ones(2, 3).bfloat16(), 1)
    finally:
        ops.use_backend("auto")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ops.encode_topk(torch.ones(2, 3), torch.ones(4, 5), torch.ones(4), 1), "W_enc"),
        (lambda: ops.encode_topk(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), 5), "k=5"),
        (
            lambda: ops.decode(torch.ones(1, 2, 3), torch.ones(1, 2, 4).int(), torch.ones(1, 5, 6), torch.ones(6)),
            r"values \(1, 2, 3\)",
        ),
        (lambda: ops.batch_threshold(torch.ones(2, 3), 0), "n=0"),
        (lambda: ops.token_threshold(torch.ones(2, 3), 0), "n=0"),
        (
            lambda: ops.encode_selected(
                torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.ones(2, 2), torch.ones(3, 2).int()
            ),
            r"indices \(3, 2\)",
        ),
        (lambda: ops.select_above(torch.ones(2, 3), torch.ones(()), torch.ones(()).long(), 4), "k=4"),
    ],
)
def test_wrong_arguments_are_refused_with_their_shapes(call: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
