"""Conversion to thresholds per feature keeps the activation counts and reports FVU and L0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clt.convert.thresholds import _log_thresholds, calibrate_threshold, to_jumprelu
from clt.errors import ConfigError
from clt.records import ActivationBatch, TokenTable
from clt.transcoder.dead_features import firing_counts
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.sparsity import Peers

from ..transcoder.sparse_cases import KINDS, D, F, K, L, dense, make_clt


def _batches(dtype: torch.dtype, n: int = 3) -> list[ActivationBatch]:
    names = ("sample", "position", "token_id", "modality", "patch_row", "patch_col", "image")
    zeros = torch.zeros(50, dtype=torch.int64)
    table = TokenTable(**dict.fromkeys(names, zeros))
    return [
        ActivationBatch(x=torch.randn(L, 50, D, dtype=dtype), y=torch.randn(L, 50, D, dtype=dtype), tokens=table)
        for _ in range(n)
    ]


def _counts(transcoder: CrossLayerTranscoder, batches: list[ActivationBatch]) -> Tensor:
    return sum(firing_counts(transcoder.encode(batch.x)) for batch in batches)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "jumprelu"])
def test_conversion_keeps_every_firing_count(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transcoder = make_clt(kind, dtype)
    with torch.no_grad():
        transcoder.b_enc["1"][3] = -100
    batches = _batches(dtype)
    transcoder.encode(batches[0].x, peers=Peers())
    converted, report = to_jumprelu(transcoder, batches)
    counts = _counts(transcoder, batches)
    assert torch.equal(_counts(converted, batches), counts) and report.changed_counts == 0
    assert report.never_fired == (counts == 0).sum() and counts[1, 3] == 0
    assert converted.log_threshold["1"][3] == torch.inf
    assert report.after.l0 == report.before.l0
    assert report.after.mean_fvu > 0 and report.before.num_tokens == 150
    converted.save_pretrained(tmp_path)
    if dtype == torch.float32:
        again = CrossLayerTranscoder.from_pretrained(tmp_path)
        assert torch.equal(dense(again.encode(batches[0].x)), dense(converted.encode(batches[0].x)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_thresholds_lie_between_neighbours_however_close(data: st.DataObject) -> None:
    numbers = st.floats(0.015625, 1e4, width=32)
    pre = torch.tensor(data.draw(st.lists(numbers, min_size=2, max_size=20, unique=True)), dtype=torch.float64)
    count = data.draw(st.integers(0, len(pre)))
    log = _log_thresholds(pre[:, None], torch.tensor([count]))
    assert (pre > log.exp()).sum() == count


def test_converting_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="already"):
        to_jumprelu(make_clt("jumprelu"), _batches(torch.float64))


def test_a_layer_by_itself_fires_as_often_after_calibration() -> None:
    transcoder, batches = make_clt("joint_topk"), _batches(torch.float64)
    threshold = calibrate_threshold(transcoder, batches)
    assert threshold > 0
    alone = sum(int((transcoder.encode_layer(layer, b.x[layer])[0] > 0).sum()) for b in batches for layer in range(L))
    assert alone == _counts(transcoder, batches).sum()
    assert alone <= K * L * 150
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        calibrate_threshold(make_clt("topk"), batches)


def test_calibrated_batch_topk_has_k_features_per_token_and_layer() -> None:
    transcoder, batches = make_clt("batch_topk"), _batches(torch.float64)
    calibrate_threshold(transcoder, batches)
    assert _counts(transcoder, batches).sum() == K * L * 150 < F * L * 150
