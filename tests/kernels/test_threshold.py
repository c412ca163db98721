"""BatchTopK's threshold and selection give the bits of the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clt.kernels.pytorch import reference

pytest.importorskip("triton")

from clt.kernels.gpu.threshold import batch_threshold, select_above

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
# No shrinking: in the interpreter an example takes a tenth of a second.
SETTINGS = partial(
    settings,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def _assert_equal(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def _check(pre_BF: torch.Tensor, n: int, capacity: int) -> None:
    ours, theirs = batch_threshold(pre_BF, n), reference.batch_threshold(pre_BF, n)
    _assert_equal(ours, theirs)
    codes = select_above(pre_BF, *ours, capacity)
    _assert_equal(codes, reference.select_above(pre_BF, *theirs, capacity))
    # Exactly n, or all that are positive; a NaN counts as one.
    assert int(codes[2].sum()) == min(n, int((~(pre_BF <= 0)).sum()))


@pytest.mark.parametrize(("dtype", "examples"), [(BF16, 40), (F32, 40), (F64, 20)])
def test_batch_topk_equals_reference_on_any_batch(dtype: torch.dtype, examples: int, device: str) -> None:
    special = [NAN, INF, -INF, 0.0, -0.0, 1e-40, -1.0, 0.5, 1.0, 1.0, 1.0078125, 2.0]
    number = st.sampled_from(special) | st.floats(-4, 4, width=32)

    @SETTINGS(max_examples=examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        tokens, n_features = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
        pool = data.draw(st.lists(number, min_size=1, max_size=12))
        seed = data.draw(st.integers(0, 2**31 - 1))
        pick = torch.randint(len(pool), (tokens, n_features), generator=torch.Generator().manual_seed(seed))
        n = data.draw(st.integers(1, tokens * n_features))
        capacity = data.draw(st.integers(1, n_features))
        _check(torch.tensor(pool)[pick].to(device, dtype), n, capacity)

    check()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_batch_topk_equals_reference_on_rows_of_several_blocks(dtype: torch.dtype, device: str) -> None:
    pre_BF = torch.randn(6, 3000).mul(4).round().to(device, dtype)
    pre_BF[2] = 9.0
    pre_BF[3] = -1.0
    _check(pre_BF, 3500, 600)


@pytest.mark.parametrize(("dtype", "passes"), [(BF16, 2), (F32, 4), (F64, 8)])
def test_batch_threshold_of_two_processes_is_that_of_their_joint_batch(
    dtype: torch.dtype, passes: int, device: str
) -> None:
    pre_BF = torch.randn(4, 90).to(device, dtype)
    calls = []

    def with_a_twin(counts_V: torch.Tensor) -> torch.Tensor:
        """The sum over this process and one that holds the same rows."""
        assert counts_V.shape == (256,) and counts_V.dtype == torch.int64
        calls.append(counts_V)
        return 2 * counts_V

    ours = batch_threshold(pre_BF, 101, with_a_twin)
    _assert_equal(ours, reference.batch_threshold(torch.cat([pre_BF, pre_BF]), 101))
    assert len(calls) == passes


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("threshold", "quota"), [(0.7, 0), (0.0, 0), (0.0, 5), (-1.0, 3), (NAN, 2), (INF, 1)])
def test_select_above_equals_reference_for_any_threshold(
    threshold: float, quota: int, dtype: torch.dtype, device: str
) -> None:
    pre_BF = torch.randn(5, 130).to(device, dtype)
    pre_BF[1, 5], pre_BF[2, 7], pre_BF[2, 8], pre_BF[0, :4] = NAN, INF, NAN, -1.0
    arguments = torch.tensor(threshold).to(device, dtype), torch.tensor(quota, device=device), 12
    _assert_equal(select_above(pre_BF, *arguments), reference.select_above(pre_BF, *arguments))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_threshold_of_a_token_is_that_of_a_batch_of_one(data: st.DataObject) -> None:
    tokens, width = (data.draw(st.integers(1, most)) for most in (4, 12))
    levels = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.0, 3.0, float("nan")])
    numbers = data.draw(st.lists(levels, min_size=tokens * width, max_size=tokens * width))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    pre = torch.tensor(numbers, dtype=dtype).view(tokens, width)
    n = data.draw(st.integers(1, width + 2))
    thresholds, quotas = reference.token_threshold(pre, n)
    for token in range(tokens):
        threshold, quota = reference.batch_threshold(pre[token : token + 1], n)
        assert torch.equal(thresholds[token].nan_to_num(), threshold.nan_to_num()) and quotas[token] == quota
