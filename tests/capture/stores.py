"""Small stores whose values encode their position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.store.row_order import pack_units
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreSpec
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import Modality, ModelIdentity, TokenTable

SITES = ("lm.0.resid_mid", "lm.1.resid_mid", "lm.0.mlp_out", "lm.1.mlp_out")
#: Tokens per sample of most stores in these tests.
LENGTHS = [20, 30, 13, 40, 24, 5]
TWO_GROUPS = (
    SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.0.mlp_out"), width=4),
    SiteGroup(name="vision", sites=("vision.0.resid_mid", "vision.1.resid_mid", "vision.2.resid_mid"), width=7),
)


def identity(n_layers: int = 2, d_model: int = 4, fingerprint: str = "f" * 64) -> ModelIdentity:
    return ModelIdentity(
        name="random",
        revision="local",
        architecture="LlamaForCausalLM",
        n_layers=n_layers,
        d_model=d_model,
        fingerprint=fingerprint,
    )


def make_spec(**changes: Any) -> StoreSpec:
    """Two layers of width 4, units of 64 rows in chunks of 16, float32."""
    settings: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created_by": "tests",
        "model": identity(),
        "model_dtype": "float32",
        "groups": (SiteGroup(name="lm", sites=SITES, width=4),),
        "store_dtype": "float32",
        "compression": "none",
        "rows_per_unit": 64,
        "chunk_tokens": 16,
        "batch_size": 1,
        "seed": 0,
        "source": "synthetic",
    }
    return StoreSpec(**{**settings, **changes})


def make_plan(lengths: Sequence[int], rows_per_unit: int = 64) -> CapturePlan:
    starts = pack_units(lengths, rows_per_unit)
    return CapturePlan(
        sample_starts=starts, unit_tokens=tuple(sum(lengths[a:b]) for a, b in itertools.pairwise(starts))
    )


def unit_data(lengths: Sequence[int], samples: range, spec: StoreSpec) -> UnitData:
    """Activations that say where they come from: channels hold sample + 1, position, site and a random number."""
    sample = torch.cat([torch.full((lengths[s],), s) for s in samples])
    position = torch.cat([torch.arange(lengths[s]) for s in samples])
    n = len(sample)
    acts = {}
    for group in spec.groups:
        values = torch.empty(n, len(group.sites), group.width)
        values[..., 0], values[..., 1] = sample[:, None] + 1, position[:, None]
        values[..., 2] = torch.arange(len(group.sites))
        values[..., 3:] = torch.randn(n, len(group.sites), 1, generator=torch.Generator().manual_seed(int(sample[0])))
        acts[group.name] = values
    bos = position == 0
    tokens = TokenTable(
        sample=sample,
        position=position.int(),
        token_id=(sample * 7 + position).int(),
        modality=torch.where(bos, int(Modality.BOS), int(Modality.TEXT)).to(torch.uint8),
        patch_row=torch.full((n,), -1, dtype=torch.int16),
        patch_col=torch.full((n,), -1, dtype=torch.int16),
        image=torch.full((n,), -1, dtype=torch.int16),
    )
    return UnitData(
        acts=acts,
        tokens=tokens,
        sample_ids=tuple(f"sample-{s}" for s in samples),
        sample_tokens=tuple(lengths[s] for s in samples),
    )


def make_store(path: Path | str, lengths: Sequence[int], **changes: Any) -> ActivationStore:
    """A complete store of samples of the given lengths; see `unit_data` for what it holds."""
    spec = make_spec(**changes)
    plan = make_plan(lengths, spec.rows_per_unit)
    writer = StoreWriter(path, spec, plan)
    if not writer.calibrated:
        writer.calibrate(unit_data(lengths, plan.samples(0), spec).acts)
    for unit in writer.pending():
        writer.commit(unit, unit_data(lengths, plan.samples(unit), spec))
    writer.finalize()
    return open_store(path)
