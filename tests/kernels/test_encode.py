"""Fused encoder product equals the reference; codes are the exact selection from its pre-activations."""

from __future__ import annotations

import pytest
import torch

from clt.kernels.gpu import configs
from clt.kernels.gpu.configs import GemmConfig, SelectConfig
from clt.kernels.pytorch import reference

pytest.importorskip("triton")

from clt.kernels.gpu import encode
from clt.kernels.gpu.select import group_max

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SMALL = GemmConfig(block_m=16, block_n=32, block_k=16, group_m=2, num_warps=4, num_stages=2)


def _operands(tokens: int, n_features: int, d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens + n_features)
    shapes = ((tokens, d), (n_features, d), (n_features,))
    return tuple(torch.randn(*shape).to(device, dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize(
    ("tokens", "n_features", "d", "group"),
    [(32, 64, 32, 8), (19, 45, 21, 4), (7, 33, 5, 32), (1, 1, 1, 1), (50, 96, 48, 16)],
)
def test_gemm_group_max_equals_reference_and_its_maxima_those_of_the_stored_values(
    tokens: int, n_features: int, d: int, group: int, dtype: torch.dtype, device: str
) -> None:
    if dtype == F64 and device == "cuda":
        pytest.skip("float64 is for tests in the interpreter")
    x, W, b = _operands(tokens, n_features, d, dtype, device)
    pre_BF, keys_BG = encode.gemm_group_max(x, W, b, group, SMALL)
    exact_BF = torch.addmm(b.double(), x.double(), W.double().T)
    # One rounding of a float32 sum to bfloat16 is off by half an ulp, 2**-9 of the value; 2**-8 allows for the
    # sum, whose error counts against the summands' size where they cancel.
    tolerance = {F64: (1e-12, 1e-12), F32: (1e-5, 1e-5), BF16: (2**-8, 1e-5 * d)}[dtype]
    torch.testing.assert_close(pre_BF.double(), exact_BF, rtol=tolerance[0], atol=tolerance[1])
    assert torch.equal(keys_BG, group_max(pre_BF, SelectConfig(group=group, num_warps=1)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_gemm_group_max_keeps_nan_and_infinity(device: str) -> None:
    x, W, b = _operands(20, 45, 16, BF16, device)
    x[3, 2], x[7, 0], W[44, 5], b[10], b[12] = float("nan"), float("inf"), float("inf"), float("inf"), -float("inf")
    pre_BF, keys_BG = encode.gemm_group_max(x, W, b, 8, SMALL)
    expected_BF = reference.preactivations(x, W, b)
    assert torch.equal(pre_BF.isnan(), expected_BF.isnan())
    assert torch.equal(pre_BF.isinf(), expected_BF.isinf())
    assert torch.equal(keys_BG, group_max(pre_BF, SelectConfig(group=8, num_warps=1)))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize(("tokens", "n_features", "d", "k"), [(18, 80, 24, 5), (3, 33, 7, 33), (2, 64, 16, 1)])
def test_encode_topk_of_the_fused_product_selects_exactly(
    tokens: int, n_features: int, d: int, k: int, dtype: torch.dtype, device: str
) -> None:
    if dtype == F64 and device == "cuda":
        pytest.skip("float64 is for tests in the interpreter")
    x, W, b = _operands(tokens, n_features, d, dtype, device)
    config = SelectConfig(group=8, num_warps=1)
    values_BK, indices_BK = encode.encode_topk(x, W, b, k, config, SMALL)
    expected = reference.select_topk(encode.gemm_group_max(x, W, b, 8, SMALL)[0], k)
    assert torch.equal(values_BK, expected[0]) and torch.equal(indices_BK, expected[1])


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_encode_topk_of_the_library_product_selects_exactly(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "producer", lambda *_: "gemm")
    x, W, b = _operands(9, 80, 24, dtype, device)
    values_BK, indices_BK = encode.encode_topk(x, W, b, 5)
    expected = reference.select_topk(torch.addmm(b, x, W.T), 5)
    assert torch.equal(values_BK, expected[0]) and torch.equal(indices_BK, expected[1])


def test_encode_topk_in_chunks_of_rows_gives_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = _operands(21, 64, 16, BF16, device)
    config = SelectConfig(group=8, num_warps=1)
    whole = encode.encode_topk(x, W, b, 4, config, SMALL)
    # Eight rows fit: three chunks of seven.
    monkeypatch.setattr(encode, "_CHUNK_BYTES", 8 * 64 * 2)
    chunks = []
    original = encode.gemm_group_max

    def watched(x_CD: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        chunks.append(len(x_CD))
        return original(x_CD, *rest)

    monkeypatch.setattr(encode, "gemm_group_max", watched)
    parts = encode.encode_topk(x, W, b, 4, config, SMALL)
    assert chunks == [7, 7, 7]
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_encode_topk_never_selects_a_feature_with_bias_minus_infinity(device: str) -> None:
    x, W, b = _operands(6, 40, 16, BF16, device)
    b[::2] = -float("inf")
    values_BK, indices_BK = encode.encode_topk(x, W, b, 20, SelectConfig(group=4, num_warps=1), SMALL)
    assert bool((indices_BK[values_BK > 0] % 2 == 1).all())
    assert bool((values_BK >= 0).all())
