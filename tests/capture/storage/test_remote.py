"""A store behind a URL has the same keys, bytes, batches and guarantees as a store in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.capture.planning import CaptureConfig
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.loader import ActivationLoader
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings
from clt.capture.storage.base import Storage
from clt.capture.storage.open_storage import open_storage
from clt.capture.upkeep.verify_store import verify_store
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.errors import StoreError

from ..stores import LENGTHS, make_plan, make_spec, make_store, unit_data
from .s3_server import s3_server

pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("moto")
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield f"s3://{server.bucket}"


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "s3":
        yield f"{request.getfixturevalue('s3')}/{name}"
        return
    from clt.capture.storage.object_store import forget_memory

    yield f"memory://{name}"
    forget_memory(name)


def tree(storage: Storage) -> dict[str, bytes]:
    return {entry.key: storage.read(entry.key) for entry in storage.list("")}


@pytest.mark.parametrize(("dtype", "compression"), [("bfloat16", "none"), ("int8", "zstd")])
def test_url_holds_the_bytes_of_a_folder(url: str, tmp_path: Path, dtype: str, compression: str) -> None:
    kinds = {"store_dtype": dtype, "compression": compression}
    local = make_store(tmp_path / "store", LENGTHS, **kinds)
    remote = make_store(url, LENGTHS, **kinds)
    assert remote.id == local.id
    assert tree(remote.storage) == tree(local.storage)
    assert verify_store(url, "full").problems == ()


def test_url_gives_the_batches_of_a_folder(url: str, tmp_path: Path) -> None:
    def batches(store: ActivationStore) -> list[torch.Tensor]:
        loader = ActivationLoader(
            store, x_sites=store.sites[:2], y_sites=store.sites[2:], batch_tokens=32, window_tokens=64, seed=1
        )
        return [torch.cat([batch.x, batch.y]) for batch in islice(loader, 6)]

    local, remote = (batches(make_store(place, LENGTHS)) for place in (tmp_path / "store", url))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(local, remote, strict=True))


def test_zarr_python_opens_the_url(url: str) -> None:
    store = make_store(url, LENGTHS, store_dtype="bfloat16")
    acts = store.zarr["acts/lm"]
    n = store.units[0].n_tokens
    assert np.array_equal(acts[:n], store.read(0, 0, n, store.sites).view(torch.uint16).numpy())


def test_second_owner_adopts_files_of_the_first(url: str) -> None:
    spec, plan = make_spec(), make_plan(LENGTHS)
    first, second = StoreWriter(url, spec, plan), StoreWriter(url, spec, plan)
    mine = unit_data(LENGTHS, plan.samples(0), spec)
    other = UnitData(**{**vars(mine), "acts": {"lm": mine.acts["lm"] + 1}})
    assert first.commit(0, mine)
    assert not second.commit(0, other), "the second commit must be refused"
    for unit in (1, 2):
        second.commit(unit, unit_data(LENGTHS, plan.samples(unit), spec))
    second.finalize()
    assert first.finalize() == open_store(url).id
    assert torch.equal(open_store(url).read_unit(0, spec.sites), mine.acts["lm"])


def test_damage_behind_a_url_is_named(url: str) -> None:
    store = make_store(url, LENGTHS)
    key = "data.zarr/acts/lm/c/1/0/0"
    contents = bytearray(store.storage.read(key))
    contents[100] ^= 1
    store.storage.replace(key, bytes(contents))
    with pytest.raises(StoreError, match=f"{url}/{key}: chunk 0 does not match its checksum"):
        open_store(url).read_unit(1, store.sites)
    store.storage.delete(key)
    with pytest.raises(StoreError, match=f"{url}/{key}: missing from the store"):
        open_store(url)


def test_model_is_captured_to_a_url(url: str, tmp_path: Path, llama_folder: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": f"t{i}", "prompt": "the cat sat"}) + "\n" for i in range(20)))
    settings = {"source": SourceSettings(jsonl=JsonlSource(file=file)), "rows_per_unit": 32, "chunk_tokens": 32}
    ids = {
        capture_store(CaptureConfig(model=str(llama_folder), output=output, **settings))
        for output in (url, str(tmp_path / "store"))
    }
    assert ids == {open_store(url).id}


def test_place_that_cannot_be_reached_is_one_line(s3: str) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket") as error:
        make_store("s3://no-such-bucket/x", LENGTHS)
    assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="unknown kind of location"):
        open_storage("ftp://x/y")
