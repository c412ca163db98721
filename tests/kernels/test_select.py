"""The Triton selection gives the bits of `reference.select_topk`, for all kinds of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clt.kernels.gpu.configs import SelectConfig
from clt.kernels.pytorch import reference

pytest.importorskip("triton")

from clt.kernels.gpu.select import group_max, select_topk

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
BITS = {BF16: torch.int16, F32: torch.int32, F64: torch.int64}
INF, NAN = float("inf"), float("nan")
# No shrinking: in the interpreter an example takes a tenth of a second.
SETTINGS = partial(
    settings,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
SPECIAL = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38]


def _config(group: int, num_warps: int = 1) -> SelectConfig:
    return SelectConfig(group=group, num_warps=num_warps)


def assert_selects_as_reference(pre_BF: torch.Tensor, k: int, config: SelectConfig | None = None) -> None:
    """Same bits; all NaN are equal."""
    values_BK, indices_BK = select_topk(pre_BF, k, config=config)
    expected_BK, expected_indices_BK = reference.select_topk(pre_BF, k)
    assert indices_BK.dtype == torch.int32 and values_BK.dtype == pre_BF.dtype
    assert torch.equal(indices_BK, expected_indices_BK)
    assert torch.equal(values_BK.isnan(), expected_BK.isnan())
    bits = [values.nan_to_num(nan=1.0, posinf=INF).view(BITS[pre_BF.dtype]) for values in (values_BK, expected_BK)]
    assert torch.equal(*bits)


@pytest.mark.parametrize(("dtype", "examples"), [(BF16, 60), (F32, 40), (F64, 10)])
def test_select_topk_equals_reference_on_any_rows(dtype: torch.dtype, examples: int, device: str) -> None:
    number = st.sampled_from([*SPECIAL, -1.0, 0.5, 1.0, 1.0, 1.0078125, 2.0]) | st.floats(-4, 4, width=32)

    @SETTINGS(max_examples=examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        n_features = data.draw(st.integers(1, 70))
        k = data.draw(st.integers(1, n_features))
        group = data.draw(st.sampled_from([1, 2, 8, 32]))
        # Few distinct values per row: ties everywhere.
        pool = data.draw(st.lists(number, min_size=1, max_size=12))
        seed = data.draw(st.integers(0, 2**31 - 1))
        pick = torch.randint(len(pool), (2, n_features), generator=torch.Generator().manual_seed(seed))
        assert_selects_as_reference(torch.tensor(pool)[pick].to(device, dtype), k, _config(group))

    check()


def _adversarial(name: str) -> tuple[torch.Tensor, int]:
    torch.manual_seed(0)
    match name:
        case "normal":
            return torch.randn(4, 2048), 32
        case "quantised to massive ties":
            return torch.randn(4, 1024).mul(2).round(), 32
        case "few positives":
            return -torch.rand(4, 1024) + (torch.rand(4, 1024) < 0.005) * 2, 32
        case "all equal":
            return torch.ones(2, 512), 16
        case "clustered in two groups":
            return torch.cat([torch.rand(2, 64) + 5, torch.randn(2, 1984)], dim=1), 32
        case "F not a multiple of the group":
            return torch.randn(3, 1000), 24
        case "k not a power of two, heavy tail":
            return torch.randn(2, 4096).exp(), 50
        case "all negative":
            return -torch.rand(3, 512), 16
        case "size A":
            return torch.randn(1, 32768), 64
        case "k = 1":
            return torch.randn(4, 1024), 1
    raise AssertionError(name)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "quantised to massive ties",
        "few positives",
        "all equal",
        "clustered in two groups",
        "F not a multiple of the group",
        "k not a power of two, heavy tail",
        "all negative",
        "size A",
        "k = 1",
    ],
)
def test_select_topk_equals_reference_on_adversarial_rows(name: str, dtype: torch.dtype, device: str) -> None:
    pre_BF, k = _adversarial(name)
    assert_selects_as_reference(pre_BF.to(device, dtype), k, _config(32))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_select_topk_keeps_nan_and_infinity(dtype: torch.dtype, device: str) -> None:
    pre_BF = torch.randn(5, 200)
    pre_BF[0, 7:190:30] = NAN
    pre_BF[1, ::5] = -NAN
    pre_BF[2, 3::40] = INF
    pre_BF[2, 100] = NAN
    pre_BF[3] = -INF
    pre_BF[3, 199] = INF
    pre_BF[4] = NAN
    assert_selects_as_reference(pre_BF.to(device, dtype), 6, _config(8))


@pytest.mark.parametrize(
    ("n_features", "k", "group"),
    [
        (96, 96, 32),  # k = F, fewer groups than k
        (100, 37, 32),  # four groups, the last one ragged
        (65, 64, 1),  # every column a group
        (1, 1, 1),
        (700, 300, 2),  # more winners than a block of candidates
    ],
)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_select_topk_equals_reference_for_many_slots(
    n_features: int, k: int, group: int, dtype: torch.dtype, device: str
) -> None:
    assert_selects_as_reference(torch.randn(2, n_features).to(device, dtype), k, _config(group))


def test_select_topk_does_not_depend_on_its_settings(device: str) -> None:
    pre_BF = torch.randn(2, 1536).to(device, BF16)
    for config in (_config(32), _config(16, 2), _config(64, 4), None):
        assert_selects_as_reference(pre_BF, 24, config)


def test_select_topk_accepts_strided_rows_and_given_maxima(device: str) -> None:
    pre_BF = torch.randn(256, 3).to(device, F32).T
    keys_BG = group_max(pre_BF, _config(8))
    values_BK, indices_BK = select_topk(pre_BF, 5, keys_BG, _config(8))
    expected = reference.select_topk(pre_BF.contiguous(), 5)
    assert torch.equal(values_BK, expected[0]) and torch.equal(indices_BK, expected[1])


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize(("n_features", "group"), [(96, 32), (100, 8), (3, 4), (5, 1)])
def test_group_max_orders_groups_by_their_largest_positive_entry(
    n_features: int, group: int, dtype: torch.dtype, device: str
) -> None:
    pre_BF = torch.randn(3, n_features).to(device, dtype)
    pre_BF[1, -1] = -NAN
    pre_BF[2] = -pre_BF[2].abs()
    keys_BG = group_max(pre_BF, _config(group))
    padded_BF = torch.nn.functional.pad(pre_BF, (0, -n_features % group))
    # amax keeps NaN; the bits of a positive number are its key, and those of NaN are the largest integer.
    maxima_BG = padded_BF.view(3, -1, group).amax(dim=2).clamp(min=0).add(0.0)
    expected_BG = torch.where(maxima_BG.isnan(), torch.iinfo(BITS[dtype]).max, maxima_BG.view(BITS[dtype]))
    assert keys_BG.dtype == BITS[dtype] and torch.equal(keys_BG, expected_BG)
