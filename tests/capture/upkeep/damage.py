"""Helpers of corruption tests: damage files of a store, and compare all its contents."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.store.schema import SiteGroup
from clt.capture.writing.writer import StoreWriter

from ..stores import make_plan, make_spec, unit_data

#: Two units of two blocks at most, two sites: the fewest bytes that hold every kind of file.
TINY = (2, 1, 2)
TINY_GROUP = SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.0.mlp_out"), width=4)
TINY_SPEC: dict[str, Any] = {"groups": (TINY_GROUP,), "rows_per_unit": 4, "chunk_tokens": 2}


def tree(root: Path | str) -> dict[str, bytes]:
    """Contents of all files below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def flip(file: Path, position: int, bits: int = 16) -> None:
    """Changes one byte of a file; a negative position counts from the end."""
    contents = bytearray(file.read_bytes())
    contents[position] ^= bits
    file.write_bytes(contents)


def rewrite(file: Path, change: Callable[[str], str]) -> None:
    """Changes the text of a file."""
    file.write_text(change(file.read_text()))


def put_all(root: Path, files: dict[str, bytes]) -> None:
    """Replaces the contents of a folder by these files."""
    shutil.rmtree(root, ignore_errors=True)
    for key, contents in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(contents)


def capture_rest(root: Path | str, lengths: list[int] | tuple[int, ...], **changes: Any) -> str | None:
    """Runs the capture of a store again; returns the id if it is complete."""
    spec = make_spec(**changes)
    plan = make_plan(lengths, spec.rows_per_unit)
    writer = StoreWriter(root, spec, plan)
    for unit in writer.pending():
        writer.commit(unit, unit_data(lengths, plan.samples(unit), spec))
    return writer.finalize()


def everything(store: ActivationStore) -> str:
    """Hash of the results of every read method of a store."""
    digest = hashlib.sha256(repr((store.id, store.spec, store.units, store.manifest)).encode())

    def add(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    for group in store.spec.groups:
        for unit in store.units:
            add(store.read(unit.unit, 0, unit.n_tokens, group.sites), store.norms(unit.unit, group.name))
            for view in store.samples(unit.unit, group.sites):
                digest.update(repr((view.sample, view.example_id)).encode())
                add(view.acts, *vars(view.tokens).values())
        moments = store.moments(group.name)
        add(*(getattr(moments, f.name) for f in fields(moments)), store.mean_norms(group.name))
        stats = store.stats(group.sites)
        add(stats.mean, stats.rms)
    for unit in store.units:
        digest.update(repr(store.commit(unit.unit)).encode())
        add(store.natural_index(unit.unit), *vars(store.tokens(unit.unit)).values())
        for column in store.token_block(unit.unit, 0).values():
            digest.update(column.tobytes())
    return digest.hexdigest()
