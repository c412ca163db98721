"""Export of a store as `.pt` files in the two layouts of the vlm-clt-training format.

`export_activations` writes the files of its transcoder training, `export_samples` those of its feature analysis;
`docs/store.md` describes both. Files hold plain tensors, lists and dicts, so that `torch.load(weights_only=True)` reads
them. Each file is written atomically, and an interrupted export continues where it stopped; `export.json` records its
settings. Only one process at a time may write a folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from clt.capture.capacity import GIB, free_bytes
from clt.capture.models.sites import SiteKind, decoder_sites
from clt.capture.reading.activation_store import ActivationStore, SampleView
from clt.capture.storage.base import PARTIAL_SUFFIX, Storage
from clt.capture.storage.open_storage import open_storage
from clt.checksum import crc32c
from clt.errors import CheckpointError, ConfigError, NonFiniteError, StoreError
from clt.records import Modality
from clt.transcoder.layers import source_layers
from clt.transcoder.model import CrossLayerTranscoder

PtDtype = Literal["float16", "bfloat16", "float32"]

SETTINGS_FILE = "export.json"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Files of an export.

    Attributes:
        samples: number of samples exported.
        files: number of `.pt` files in the folder.
        written: number of files written by this run.
        bytes: size of all files.
    """

    samples: int
    files: int
    written: int
    bytes: int


def export_activations(
    store: ActivationStore,
    out: str | Path,
    *,
    n_targets: int = 16,
    batch_samples: int = 1,
    dtype: PtDtype | None = None,
    read_site: str | None = None,
) -> ExportReport:
    """Writes encoder inputs and MLP outputs by layer and batch, with one unit of the store in memory at a time.

        OUT/L3/batch_7_x.pt   {"x": [B,T,D], "mask": [B,T] bool, "sample_ids": [B]}
        OUT/L3/batch_7_y.pt   {"y": [B,T,D], "targets": [[B,T,D], ...], "n_targets": 2}; only "y" for one target

    `x` is the encoder input at layer 3, the targets are the MLP outputs of layers 4, 5, ... and `y` is the first of
    them. Targets beyond the last layer are left out. Samples are padded on the right with zeros where `mask` is false.

    Args:
        store: a complete store.
        out: folder, empty or with an unfinished export with the same settings.
        n_targets: largest number of target layers of a source layer.
        batch_samples: B, samples of a file; the reader of that format ignores the mask and trains on padding if B > 1.
        dtype: type of the tensors; default: the stored type, float32 for int8 stores.
        read_site: site that the encoders read; default: the only such site of the store.

    Returns:
        The files of the export.

    Raises:
        ConfigError: a number is not positive, or the model has a single layer.
        StoreError: a site is not stored, a file is missing or damaged, or the folder is in use or its disk full.
        NonFiniteError: a value does not fit into float16.
    """
    for name, value in (("n_targets", n_targets), ("batch_samples", batch_samples)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    layers = range(store.n_layers)
    if len(layers) < 2:
        raise ConfigError(f"{store.location}: a model of one layer has no targets; export the layout 'samples'")
    site, kind = _read_site(store, read_site), _dtype(store, dtype)
    goals = {layer: layers[layer + 1 : layer + 1 + n_targets] for layer in layers[:-1]}
    tensors = sum(1 + len(targets) for targets in goals.values())
    export = _Export(
        out,
        {
            "layout": "activations",
            "store": store.id,
            "read_site": site,
            "dtype": str(kind),
            "n_targets": n_targets,
            "batch_samples": batch_samples,
        },
        needed=store.num_tokens * store.d_model * kind.itemsize * tensors,
    )

    def names(number: int) -> list[str]:
        return [f"L{layer}/batch_{number}_{part}.pt" for layer in goals for part in "xy"]

    sites = decoder_sites(goals, site) + decoder_sites(layers[1:], "mlp_out")
    for number, views in _batches(store, sites, batch_samples, lambda number: export.has(names(number))):
        tensors_BTD, mask_BT = _padded(views, kind)
        x_files = {"mask": mask_BT, "sample_ids": [view.example_id for view in views]}
        for layer, targets in goals.items():
            ys = [tensors_BTD[len(goals) + target - 1] for target in targets]
            export.write(f"L{layer}/batch_{number}_x.pt", {"x": tensors_BTD[layer], **x_files})
            several = {"targets": ys, "n_targets": len(ys)} if n_targets > 1 else {}
            export.write(f"L{layer}/batch_{number}_y.pt", {"y": ys[0], **several})
    return export.report(store)


def export_samples(
    store: ActivationStore,
    out: str | Path,
    *,
    transcoder: str | Path | None = None,
    dtype: PtDtype | None = None,
    read_site: str | None = None,
) -> ExportReport:
    """Writes one file per sample, pooled over its tokens, with one unit of the store in memory at a time.

        OUT/sample_0007.pt    {"activations": {layer: [D]}, "mean": {layer: [D]}, "meta": {...}}

    "activations" is the maximum over the sample's tokens, "mean" their mean, both without the beginning-of-sequence
    token; zeros if there is no other token. With a transcoder they are those of its features, [F] by source layer.

    Args:
        store: a complete store.
        out: folder, empty or with an unfinished export with the same settings.
        transcoder: folder or hub name of the transcoder whose features are pooled; default: pool the encoder inputs.
        dtype: type of the tensors; default: the stored type, float32 for int8 stores and for features.
        read_site: site that the encoders read; default: the transcoder's, or the only such site of the store.

    Returns:
        The files of the export.

    Raises:
        ConfigError: the transcoder reads another site.
        CheckpointError: the transcoder cannot be read, or belongs to another model.
        StoreError: a site is not stored, a file is missing or damaged, or the folder is in use or its disk full.
        NonFiniteError: a value does not fit into float16.
    """
    features = None if transcoder is None else _Features(store, transcoder)
    if features is not None and read_site not in (None, features.read_site):
        raise ConfigError(f"read_site={read_site}: {transcoder} reads {features.read_site}; leave read_site out")
    site = _read_site(store, read_site if features is None else features.read_site)
    kind = torch.float32 if features is not None and dtype is None else _dtype(store, dtype)
    layers, width = (range(store.n_layers), store.d_model) if features is None else (features.layers, features.width)
    origin = {"read_site": site, "store": store.id, **({} if features is None else features.origin)}
    n_samples = sum(unit.n_samples for unit in store.units)
    export = _Export(
        out,
        {"layout": "samples", "dtype": str(kind), **origin},
        needed=2 * n_samples * len(layers) * width * kind.itemsize,
    )
    sites = decoder_sites(layers, site)
    for number, (view,) in _batches(store, sites, 1, lambda number: export.has([_sample_file(number)])):
        x_LBD = view.acts[:, view.tokens.modality != Modality.BOS].float()
        pooled = _pool(x_LBD) if features is None else features.pool(x_LBD)
        rows = [[_cast(row, kind, view) for row in part] for part in pooled]
        most, mean = (dict(zip(layers, part, strict=True)) for part in rows)
        meta = {"sample": view.sample, "id": view.example_id, "tokens": x_LBD.shape[1], "model": store.model.name}
        export.write(_sample_file(number), {"activations": most, "mean": mean, "meta": {**meta, **origin}})
    return export.report(store)


class _Export:
    """A folder of `.pt` files, new or begun with the same settings."""

    def __init__(self, out: str | Path, settings: dict[str, Any], needed: int) -> None:
        self._storage: Storage = open_storage(out)
        entries = self._storage.list("")
        there = [entry for entry in entries if not entry.key.endswith(PARTIAL_SUFFIX)]
        contents = (json.dumps(settings, indent=1) + "\n").encode()
        if there and self._storage.size(SETTINGS_FILE) is None:
            raise StoreError(f"{out}: is not empty and holds no export; choose another folder")
        if there and self._storage.read(SETTINGS_FILE) != contents:
            raise StoreError(f"{out}: holds another export, see {SETTINGS_FILE}; choose another folder")
        needed, free = needed - sum(entry.bytes for entry in there), free_bytes(out)
        if free is not None and needed > free:
            raise StoreError(
                f"{out}: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; choose another folder"
            )
        for entry in entries:
            if entry.key.endswith(PARTIAL_SUFFIX):
                self._storage.delete(entry.key)
        self._storage.put(SETTINGS_FILE, contents)
        self._done = {entry.key for entry in there}
        self._written = 0

    def has(self, names: Sequence[str]) -> bool:
        return self._done.issuperset(names)

    def write(self, name: str, contents: dict[str, Any]) -> None:
        if name not in self._done:
            buffer = io.BytesIO()
            torch.save(contents, buffer)
            self._storage.put(name, buffer.getvalue())
            self._done.add(name)
            self._written += 1

    def report(self, store: ActivationStore) -> ExportReport:
        files = [entry.bytes for entry in self._storage.list("") if entry.key.endswith(".pt")]
        n_samples = sum(unit.n_samples for unit in store.units)
        return ExportReport(samples=n_samples, files=len(files), written=self._written, bytes=sum(files))


class _Features:
    """The features of a transcoder of the store's model."""

    def __init__(self, store: ActivationStore, name: str | Path) -> None:
        self._transcoder = CrossLayerTranscoder.from_pretrained(name)
        trained_on = self._transcoder.provenance.model
        if trained_on is not None and trained_on.fingerprint != store.model.fingerprint:
            raise CheckpointError(
                f"{name}: trained on {trained_on.name} (weights {trained_on.fingerprint[:12]}), {store.location} "
                f"holds {store.model.name} (weights {store.model.fingerprint[:12]}); use a transcoder of that model"
            )
        self.layers = source_layers(self._transcoder.config)
        self.width, self.read_site = self._transcoder.config.n_features, self._transcoder.config.read_site
        checksum = 0
        for parameter in self._transcoder.parameters():
            checksum = crc32c(parameter.detach().numpy().tobytes(), checksum)
        self.origin = {"clt": str(name), "clt_crc32c": checksum}

    @torch.no_grad()
    def pool(self, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum and mean [L,F] of every feature over the tokens of unscaled encoder inputs [L,B,D]."""
        most = torch.zeros(len(self.layers), self.width)
        if x_LBD.shape[1] == 0:
            return most, most.clone()
        codes = self._transcoder.encode(self._transcoder.scaling.standardise_x(x_LBD, self.layers))
        values, indices = codes.values.flatten(1), codes.indices.flatten(1).long()
        # Empty code slots have value 0 and index 0, which changes neither.
        total = torch.zeros_like(most).scatter_add_(1, indices, values)
        return most.scatter_reduce_(1, indices, values, "amax"), total / x_LBD.shape[1]


def _pool(x_LBD: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and mean [L,D] of every channel over tokens."""
    if x_LBD.shape[1] == 0:
        zeros = torch.zeros(x_LBD.shape[0], x_LBD.shape[2])
        return zeros, zeros.clone()
    return x_LBD.amax(1), x_LBD.mean(1)


def _batches(
    store: ActivationStore, sites: Sequence[str], size: int, done: Callable[[int], bool]
) -> Iterator[tuple[int, list[SampleView]]]:
    """Batches of samples in order, without the finished ones; units without missing batches are not read."""
    n_samples = sum(unit.n_samples for unit in store.units)
    held: list[SampleView] = []
    for unit in store.units:
        stop = unit.sample_start + unit.n_samples
        missing = {number for number in range(unit.sample_start // size, -(-stop // size)) if not done(number)}
        for view in store.samples(unit.unit, sites) if missing else ():
            number = view.sample // size
            if number not in missing:
                continue
            held.append(view)
            if view.sample + 1 == min((number + 1) * size, n_samples):
                yield number, held
                held = []
        # Copies, so that samples of an incomplete batch do not keep this whole unit in memory.
        held = [replace(view, acts=view.acts.clone()) for view in held]


def _padded(views: Sequence[SampleView], kind: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Padded samples as one tensor [B,T,D] per site, and the mask [B,T] of their tokens."""
    n_sites, _, width = views[0].acts.shape
    longest = max(view.acts.shape[1] for view in views)
    # One tensor per site, because torch.save writes the whole storage of a view.
    tensors = [torch.zeros(len(views), longest, width, dtype=kind) for _ in range(n_sites)]
    mask = torch.zeros(len(views), longest, dtype=torch.bool)
    for row, view in enumerate(views):
        length = view.acts.shape[1]
        mask[row, :length] = True
        for tensor, values in zip(tensors, view.acts, strict=True):
            tensor[row, :length] = _cast(values, kind, view)
    return tensors, mask


def _cast(values: Tensor, kind: torch.dtype, view: SampleView) -> Tensor:
    """A copy of the values in another type."""
    result = values.to(kind, copy=True)
    if kind == torch.float16 and not bool(result.isfinite().all()):
        raise NonFiniteError(
            f"sample {view.sample} ('{view.example_id}'): a value does not fit into float16; use bfloat16 or float32"
        )
    return result


def _read_site(store: ActivationStore, chosen: str | None) -> SiteKind:
    stored = sorted({site.rpartition(".")[2] for site in store.sites if site.startswith("lm.")} - {"mlp_out"})
    if chosen is None and len(stored) != 1:
        raise StoreError(f"{store.location}: holds the sites {', '.join(stored)}; set read_site to one of them")
    if chosen is not None and chosen not in stored:
        raise StoreError(f"{store.location}: site '{chosen}' is not stored; it holds {', '.join(stored)}")
    return cast(SiteKind, chosen or stored[0])


def _dtype(store: ActivationStore, chosen: PtDtype | None) -> torch.dtype:
    if chosen is not None:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[chosen]
    return torch.float32 if store.stored_dtype == torch.int8 else store.stored_dtype


def _sample_file(number: int) -> str:
    return f"sample_{number:04d}.pt"
