"""Peak memory of processes stays within the documented bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Memory that the interpreter, torch's workspaces and the allocator may add to the budget.
SLACK = 64 << 20

_COMMON = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.capture.stores import make_plan, make_spec
from clt.capture.reading.loader import ActivationLoader
from clt.capture.store.schema import SiteGroup
from clt.capture.reading.open_store import open_store
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import TokenTable

SITES = tuple(f"lm.{{l}}.{{k}}" for k in ("resid_mid", "mlp_out") for l in range(4))
ROWS, UNITS, WIDTH = 8192, {units}, 512

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def spec():
    group = SiteGroup(name="lm", sites=SITES, width=WIDTH)
    return make_spec(groups=(group,), store_dtype={dtype!r}, rows_per_unit=ROWS, chunk_tokens=64)
"""

_WRITE = """
plan = make_plan([64] * (ROWS // 64 * UNITS), ROWS)
writer = StoreWriter(Path({store!r}), spec(), plan)
short = torch.zeros(ROWS, dtype=torch.int16)
tokens = TokenTable(sample=short.long(), position=short.int(), token_id=short.int(), modality=short.to(torch.uint8),
                    patch_row=short, patch_col=short, image=short)
acts = torch.empty(ROWS, len(SITES), WIDTH, dtype=torch.{captured})
for row in range(ROWS):
    acts[row] = torch.randn(len(SITES), WIDTH)
if not writer.calibrated:
    writer.calibrate({{"lm": acts[:512]}})
before = peak()
for unit in range(UNITS):
    ids = tuple(str(s) for s in plan.samples(unit))
    writer.commit(unit, UnitData(acts={{"lm": acts}}, tokens=tokens, sample_ids=ids, sample_tokens=(64,) * len(ids)))
writer.finalize()
print(json.dumps({{"grown": peak() - before, "captured": acts.nbytes}}))
"""

_READ = """
store = open_store({store!r})
before = peak()
loader = ActivationLoader(store, x_sites=SITES[:4], y_sites=SITES[4:], batch_tokens=512, window_tokens=8192, seed=0)
kept = None
for step, batch in enumerate(loader):
    kept = batch
    if step == 3 * loader.steps_per_epoch:
        break
print(json.dumps({{"grown": peak() - before, "budget": loader.memory_bytes, "store": sum(
    file.bytes for unit in store.units for file in unit.files)}}))
"""


def _measured(body: str, store: Path, dtype: str, captured: str = "float32", units: int = 4) -> dict[str, int]:
    values = {"store": str(store), "dtype": dtype, "captured": captured, "units": units}
    code = (_COMMON + body).format(root=str(Path(__file__).parents[2]), **values)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "captured", "stored_share"),
    [("bfloat16", "bfloat16", 0.0), ("bfloat16", "float32", 0.5), ("int8", "float32", 0.25)],
)
def test_committing_a_unit_adds_its_stored_copy_and_no_more(
    tmp_path: Path, dtype: str, captured: str, stored_share: float
) -> None:
    found = _measured(_WRITE, tmp_path / "store", dtype, captured)
    assert found["grown"] <= stored_share * found["captured"] + SLACK


def test_loading_stays_within_its_budget_for_every_store(tmp_path: Path) -> None:
    _measured(_WRITE, tmp_path / "store", "bfloat16", "bfloat16", units=8)
    found = _measured(_READ, tmp_path / "store", "bfloat16", "bfloat16", units=8)
    assert found["budget"] + SLACK < found["store"], "the store is larger than what may be held"
    assert found["grown"] <= found["budget"] + SLACK
