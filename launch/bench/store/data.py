"""Random activations of the store benchmark, and a store that holds them.

The values are random bits of finite bfloat16, which no layer on the way can compress; speeds do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clt.capture.models.sites import decoder_sites
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.storage.local import LocalStorage
from clt.capture.store.arrays import ArraySpec
from clt.capture.store.layout import StoreArrays
from clt.capture.store.row_order import unit_permutation
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreSpec
from clt.capture.store.shard import ShardReader
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import ModelIdentity, TokenTable

Bits = NDArray[np.uint16]
#: Reads the block of a number into an array [S,C,d].
ReadBlock = Callable[[int, Bits], None]

GROUP = "lm"
_SEED = 20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape of the activations, their chunks and shards.

    Attributes:
        tokens: T, a multiple of `shard_tokens`.
        sites: S.
        width: d.
        chunk_tokens: C, tokens of a chunk, which holds one site, and of a block, which holds all sites.
        shard_tokens: R, tokens of a shard, a multiple of `chunk_tokens`.
    """

    tokens: int
    sites: int
    width: int
    chunk_tokens: int
    shard_tokens: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.tokens // self.chunk_tokens

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """(S, C, d)."""
        return self.sites, self.chunk_tokens, self.width

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token at all sites."""
        return self.sites * self.width * 2

    @property
    def nbytes(self) -> int:
        """Bytes of all activations."""
        return self.tokens * self.bytes_per_token


def random_bits(layout: Layout) -> Bits:
    """[T,S,d] uint16, bits of finite bfloat16 from a fixed seed."""
    words = np.random.Philox(_SEED).random_raw(layout.nbytes // 8).view(np.uint16)
    # With the highest bit of the exponent cleared, no value is infinite or NaN.
    words &= 0xBFFF
    return words.reshape(layout.tokens, layout.sites, layout.width)


def in_blocks(tokens: Bits, layout: Layout) -> Bits:
    """[T,S,d] as blocks [T/C,S,C,d]."""
    cut = tokens.reshape(layout.blocks, layout.chunk_tokens, layout.sites, layout.width)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3))


def store_spec(layout: Layout) -> StoreSpec:
    """Specification of a store with one group of sites, inputs of all layers first, as in a capture."""
    n_layers = max(1, layout.sites // 2)
    names = decoder_sites(range(n_layers), "mlp_in") + decoder_sites(range(n_layers), "mlp_out")
    sites = tuple(names[: layout.sites])
    model = ModelIdentity(
        name="bench",
        revision="local",
        architecture="none",
        n_layers=n_layers,
        d_model=layout.width,
        fingerprint="0" * 64,
    )
    return StoreSpec(
        schema_version=SCHEMA_VERSION,
        created_by="clt store bench",
        model=model,
        model_dtype="bfloat16",
        groups=(SiteGroup(name=GROUP, sites=sites, width=layout.width),),
        store_dtype="bfloat16",
        compression="none",
        rows_per_unit=layout.shard_tokens,
        chunk_tokens=layout.chunk_tokens,
        batch_size=1,
        seed=_SEED,
        source="0" * 64,
    )


def arrays_of(layout: Layout) -> StoreArrays:
    """Arrays of that store."""
    return StoreArrays(store_spec(layout), layout.tokens // layout.shard_tokens)


@dataclass(frozen=True)
class BenchStore:
    """A store of random activations.

    Attributes:
        folder: path of the store.
        layout: shape of its activations.
    """

    folder: Path
    layout: Layout

    @classmethod
    def make(cls, folder: Path, layout: Layout) -> BenchStore:
        """Writes the store, one unit per shard and one sample per unit."""
        bits, size = random_bits(layout), layout.shard_tokens
        n_units = layout.tokens // size
        plan = CapturePlan(sample_starts=tuple(range(n_units + 1)), unit_tokens=(size,) * n_units)
        writer = StoreWriter(LocalStorage(folder, durable=False), store_spec(layout), plan)
        for unit in range(n_units):
            acts = torch.from_numpy(bits[unit * size : (unit + 1) * size]).view(torch.bfloat16)
            tokens = _token_table(unit, size)
            data = UnitData(acts={GROUP: acts}, tokens=tokens, sample_ids=(str(unit),), sample_tokens=(size,))
            writer.commit(unit, data)
        writer.finalize()
        return cls(folder, layout)

    @property
    def array(self) -> Path:
        """Folder of the Zarr array of activations."""
        return self.folder / _acts(self.layout).key

    @cached_property
    def expected(self) -> Bits:
        """[T,S,d] contents in storage order, computed from the seed without reading the store."""
        bits, size = random_bits(self.layout), self.layout.shard_tokens
        for unit in range(self.layout.tokens // size):
            part = bits[unit * size : (unit + 1) * size]
            part[...] = part[unit_permutation(size, _SEED, unit)]
        return bits

    def open(self) -> ActivationStore:
        """Opens the store."""
        return open_store(LocalStorage(self.folder))

    def shard_reader(self) -> ReadBlock:
        """Reads blocks with `ShardReader`, one per unit."""
        storage = LocalStorage(self.folder)
        array = _acts(self.layout)
        sizes = [storage.size(array.shard(unit)) or 0 for unit in range(array.units)]
        readers = [ShardReader(storage, array, unit, size) for unit, size in enumerate(sizes)]
        per_unit = self.layout.shard_tokens // self.layout.chunk_tokens

        def read(block: int, out: Bits) -> None:
            unit, within = divmod(block, per_unit)
            readers[unit].read_into(within * self.layout.sites, [site[:, None] for site in out])

        return read

    def store_reader(self) -> ReadBlock:
        """Reads blocks with `ActivationStore`, as the loader does."""
        store, sites = self.open(), list(range(self.layout.sites))
        per_unit = self.layout.shard_tokens // self.layout.chunk_tokens

        def read(block: int, out: Bits) -> None:
            unit, within = divmod(block, per_unit)
            store.read_block_into(unit, within, GROUP, sites, out)

        return read


def _acts(layout: Layout) -> ArraySpec:
    arrays = arrays_of(layout)
    return arrays.acts(arrays.spec.groups[0])


def _token_table(sample: int, n: int) -> TokenTable:
    none = torch.full((n,), -1, dtype=torch.int16)
    return TokenTable(
        sample=torch.full((n,), sample, dtype=torch.int64),
        position=torch.arange(n, dtype=torch.int32),
        token_id=torch.zeros(n, dtype=torch.int32),
        modality=torch.zeros(n, dtype=torch.uint8),
        patch_row=none,
        patch_col=none,
        image=none,
    )
