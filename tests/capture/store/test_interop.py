"""Stores are standard Zarr: other readers read the same arrays, and missing chunks as zeros."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from clt.capture.reading.activation_store import ActivationStore
from clt.capture.store.arrays import TOKEN_DTYPES
from clt.capture.store.shard_rows import bits_of

from ..stores import LENGTHS, TWO_GROUPS, make_plan, make_store, unit_data

FORMATS: dict[str, dict[str, Any]] = {
    "raw": {"store_dtype": "bfloat16"},
    "float32": {"store_dtype": "float32"},
    "zstd": {"store_dtype": "bfloat16", "compression": "zstd"},
    "int8": {"store_dtype": "int8"},
    "int8 zstd": {"store_dtype": "int8", "compression": "zstd"},
    "two groups": {"store_dtype": "bfloat16", "groups": TWO_GROUPS},
}


def read_zarr(path: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(path, mode="r")[...])


def read_zarrs(path: Path) -> NDArray[Any]:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(path, mode="r")[...])


def read_tensorstore(path: Path) -> NDArray[Any]:
    tensorstore = pytest.importorskip("tensorstore")
    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(where, read=True).result().read().result())


@pytest.mark.parametrize("read", [read_zarr, read_zarrs, read_tensorstore])
@pytest.mark.parametrize("kind", list(FORMATS))
def test_other_readers_find_every_array(tmp_path: Path, kind: str, read: Callable[[Path], NDArray[Any]]) -> None:
    store = make_store(tmp_path / "store", LENGTHS, **FORMATS[kind])
    data, rows = tmp_path / "store/data.zarr", store.spec.rows_per_unit
    found = {path.parent: read(path.parent) for path in data.rglob("zarr.json") if is_array(path)}
    for unit in store.units:
        filled = slice(unit.unit * rows, unit.unit * rows + unit.n_tokens)
        for path, values in expected_arrays(store, unit.unit).items():
            array = found[data / path]
            assert array.shape == (3 * rows, *values.shape[1:]) and array.dtype == values.dtype
            assert np.array_equal(array[filled], values)
            assert not array[filled.stop : (unit.unit + 1) * rows].any(), "unwritten rows"
    for group in store.spec.groups:
        for field, values in vars(store.moments(group.name)).items():
            assert np.array_equal(found.pop(data / "stats" / group.name / field), values.numpy())
    assert found.keys() == {data / path for path in expected_arrays(store, 0)}


def is_array(path: Path) -> bool:
    return bool(json.loads(path.read_text())["node_type"] == "array")


def expected_arrays(store: ActivationStore, unit: int) -> dict[str, NDArray[Any]]:
    """Rows of a unit in all arrays that units share, by path."""
    order = store.natural_index(unit)
    data = unit_data(LENGTHS, make_plan(LENGTHS, store.spec.rows_per_unit).samples(unit), store.spec)
    arrays = {"tokens/natural_index": order.numpy().astype(np.uint32)}
    for name in TOKEN_DTYPES.keys() - {"natural_index"}:
        arrays[f"tokens/{name}"] = getattr(store.tokens(unit), name).numpy()
    for group in store.spec.groups:
        arrays[f"norms/{group.name}"] = store.norms(unit, group.name).numpy()
        acts = data.acts[group.name]
        if store.spec.store_dtype == "int8":
            standardiser = store.standardiser(group.name)
            scales = standardiser.scales(acts)
            arrays[f"scales/{group.name}"] = scales[order].numpy()
            arrays[f"acts/{group.name}"] = standardiser.quantise(acts, scales)[order].numpy()
        else:
            arrays[f"acts/{group.name}"] = bits_of(acts.to(store.stored_dtype)[order])
    return arrays


def test_metadata_describes_the_arrays(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="bfloat16")
    group = store.zarr
    acts = group["acts/lm"]
    assert isinstance(acts, zarr.Array)
    assert (acts.shape, acts.shards, acts.chunks) == ((3 * 64, 4, 4), (64, 4, 4), (16, 1, 4))
    assert (acts.dtype, acts.attrs["logical_dtype"]) == (np.uint16, "bfloat16")
    assert acts.attrs["sites"] == list(store.sites)
    metadata = json.loads((tmp_path / "store/data.zarr/acts/lm/zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert metadata["dimension_names"] == ["token", "site", "channel"]
    assert set(group["tokens"].array_keys()) == set(TOKEN_DTYPES)  # type: ignore[union-attr]
    # The last unit has 5 of 64 rows: three of its four chunks per site are left out.
    sizes = [(tmp_path / f"store/data.zarr/acts/lm/c/{unit}/0/0").stat().st_size for unit in range(3)]
    assert sizes[2] < sizes[1] / 2


def test_zarr_view_gives_the_values_of_the_reader(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", LENGTHS, store_dtype="bfloat16")
    acts = store.zarr["acts/lm"]
    assert isinstance(acts, zarr.Array)
    bits = torch.from_numpy(np.asarray(acts[64:128])).view(torch.bfloat16)
    assert torch.equal(bits, store.read(1, 0, 64, store.sites))
