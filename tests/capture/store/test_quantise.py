"""int8 stores: the rounding error is measured on the stored values, and small channels and tokens keep precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.store.quantise import Standardiser
from clt.capture.store.schema import SiteGroup
from clt.capture.writing.writer import StoreWriter
from clt.records import Modality

from ..stores import make_plan, make_spec, unit_data

LENGTHS = [40, 24, 64, 50]
GROUP = SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.0.mlp_out"), width=32)


def channels(kind: str, n: int, seed: int) -> Tensor:
    """[n, 2, 32] activations: well-behaved, with outlier channels and offsets, or of heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 2, 32, generator=generator)
    if kind == "outlier channels":
        # Orders of magnitude between channels, and means far from zero, as residual streams have them.
        values = values * torch.logspace(-1.5, 1.5, 32) + torch.linspace(-5, 5, 32)
    if kind == "heavy tails":
        # Student's t with 3 degrees of freedom.
        chi = torch.randn(n, 2, 32, 3, generator=generator).square().mean(-1).sqrt()
        values = values / chi
    return values


def quantised_store(path: Path, kind: str) -> tuple[ActivationStore, Tensor, Tensor]:
    """A store, the values captured [n, 2, 32] in natural order of all units, and the class of each."""
    spec = make_spec(store_dtype="int8", groups=(GROUP,), compression="zstd")
    plan = make_plan(LENGTHS)
    writer = StoreWriter(path, spec, plan)
    assert not writer.calibrated
    parts, classes = [], []
    for unit in range(plan.n_units):
        data = unit_data(LENGTHS, plan.samples(unit), spec)
        acts = {"lm": channels(kind, plan.unit_tokens[unit], unit)}
        if unit == 0:
            writer.calibrate(acts)
        writer.commit(unit, type(data)(**{**vars(data), "acts": acts}))
        parts.append(acts["lm"])
        classes.append(data.tokens.modality)
    writer.finalize()
    return open_store(path), torch.cat(parts), torch.cat(classes)


#: Largest FVU that a uniform step of `largest / 127` allows: the step is uniform over [-1/2, 1/2], so its variance is
#: 1/12, and the largest of 32 standard normal values is below 4.5, that of heavy tails below 40.
LIMITS = {"normal": 4.5, "outlier channels": 4.5, "heavy tails": 40.0}


@pytest.mark.parametrize("kind", list(LIMITS))
def test_recorded_fvu_is_that_of_the_stored_values(tmp_path: Path, kind: str) -> None:
    store, captured, classes = quantised_store(tmp_path / "store", kind)
    found = torch.cat([store.read_unit(unit.unit, store.sites) for unit in store.units])
    keep = classes != Modality.BOS
    stored, error = found[keep].double(), (found[keep].double() - captured[keep].double()).square().sum(0)
    m2 = (stored - stored.mean(0)).square().sum(0)
    for number, site in enumerate(store.sites):
        recorded = store.manifest.quantisation[site]
        # 1e-9: float64 rounding of two orders of summation
        assert recorded.fvu == pytest.approx(float(error[number].sum() / m2[number].sum()), rel=1e-9)
        by_channel = (error[number] / m2[number]).numpy()
        assert recorded.fvu_p99 == pytest.approx(float(np.quantile(by_channel, 0.99)), rel=1e-9)
        assert 0 < recorded.fvu < (LIMITS[kind] / 127) ** 2 / 12 * 2
        assert recorded.fvu <= recorded.fvu_p99 * 32


def test_small_channels_survive_beside_outlier_channels(tmp_path: Path) -> None:
    """A single scale per token, as plain int8 has it, loses them entirely."""
    store, captured, classes = quantised_store(tmp_path / "store", "outlier channels")
    assert all(error.fvu_p99 < 1e-3 for error in store.manifest.quantisation.values())
    values = captured[classes != Modality.BOS]
    plain = values.abs().amax(-1, keepdim=True) / 127
    error = ((values / plain).round() * plain - values).square().sum(0) / (values - values.mean(0)).square().sum(0)
    assert float(error.max()) > 0.5


def test_scales_use_the_whole_range_and_clip_nothing() -> None:
    values = channels("heavy tails", 200, 0)
    standardiser = Standardiser.of(values[:50])
    scales = standardiser.scales(values)
    quantised = standardiser.quantise(values, scales)
    assert quantised.dtype == torch.int8
    assert torch.equal(quantised.int().abs().amax(-1), torch.full((200, 2), 127, dtype=torch.int32))
    step = scales[..., None] * standardiser.std
    # Half a step, and float32 rounding of the largest value of 127 steps.
    assert ((standardiser.restore(quantised, scales) - values).abs() <= step * 0.501 + 1e-6 * values.abs()).all()


def test_constant_channels_and_tokens_at_the_mean_are_exact() -> None:
    values = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    values[..., 3] = 7.25
    standardiser = Standardiser.of(values)
    scales = standardiser.scales(standardiser.mean[None])
    assert torch.equal(scales, torch.ones(1, 1))
    assert torch.equal(
        standardiser.restore(standardiser.quantise(standardiser.mean[None], scales), scales)[0], standardiser.mean
    )
    mine = standardiser.scales(values)
    restored = standardiser.restore(standardiser.quantise(values, mine), mine)
    assert torch.equal(restored[..., 3], values[..., 3])


def test_first_calibration_counts(tmp_path: Path) -> None:
    spec, plan = make_spec(store_dtype="int8", groups=(GROUP,)), make_plan(LENGTHS)
    one, other = (StoreWriter(tmp_path / "store", spec, plan) for _ in range(2))
    one.calibrate({"lm": channels("normal", 64, 0)})
    before = (tmp_path / "store/quantisation.safetensors").read_bytes()
    other.calibrate({"lm": channels("normal", 64, 1)})
    assert (tmp_path / "store/quantisation.safetensors").read_bytes() == before
    assert one.calibrated and other.calibrated
