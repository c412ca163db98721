"""The file format of measured launch settings: types, checks, reading, merging and writing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Launch of a kernel that gathers rows: decode, decoder_grad, encoder_grad, row_adam.

    Attributes:
        block_d: columns per program, a power of two.
        unroll: rows in flight per loop step, a power of two.
        num_warps: warps per program; block_d * itemsize / 512 makes every load 16 bytes a lane.
    """

    block_d: int
    unroll: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Launch of the exact TopK selection.

    Attributes:
        group: columns whose maximum bounds the selection, a power of two.
        num_warps: warps per row.
    """

    group: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """Launch of the encoder product with group maxima in its epilogue.

    Attributes:
        block_m: tokens per tile.
        block_n: features per tile.
        block_k: channels per step.
        group_m: row tiles that share a column tile in L2.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several implementations."""

    choice: str


Settings = GatherConfig | SelectConfig | GemmConfig | Choice


@dataclass(frozen=True, kw_only=True)
class Op:
    """What an entry of one operation holds.

    Attributes:
        settings: their type.
        sizes: what they depend on.
        choices: what a `Choice` may be.
    """

    settings: type[GatherConfig] | type[SelectConfig] | type[GemmConfig] | type[Choice]
    sizes: tuple[str, ...]
    choices: tuple[str, ...] = ()


_ALL = ("d_model", "n_features", "k", "tokens")

OPS = {
    "decode": Op(settings=GatherConfig, sizes=_ALL),
    "decoder_grad": Op(settings=GatherConfig, sizes=_ALL),
    "encoder_grad": Op(settings=GatherConfig, sizes=_ALL),
    "row_adam": Op(settings=GatherConfig, sizes=("d_model",)),
    "select": Op(settings=SelectConfig, sizes=("n_features", "k")),
    "gemm": Op(settings=GemmConfig, sizes=("d_model", "n_features", "tokens")),
    "producer": Op(settings=Choice, sizes=_ALL, choices=("gemm", "fused")),
    "decode_path": Op(settings=Choice, sizes=_ALL, choices=("sparse", "dense")),
    "decoder_grad_path": Op(settings=Choice, sizes=_ALL, choices=("sparse", "dense")),
    "encoder_grad_path": Op(settings=Choice, sizes=_ALL, choices=("sparse", "dense")),
}

DTYPES = ("bfloat16", "float32")
BASES = ("timed", "machine code")


@dataclass(frozen=True, kw_only=True)
class Key:
    """What an entry holds for; sizes that its operation does not depend on are None.

    Attributes:
        op: a key of `OPS`.
        architecture: for example "sm_90".
        dtype: for example "bfloat16".
        d_model: D.
        n_features: F.
        k: slots per token.
        tokens: B rounded up to a power of two.
        triton: major and minor version, for example "3.6": another version compiles other code.
    """

    op: str
    architecture: str
    dtype: str
    d_model: int | None
    n_features: int | None
    k: int | None
    tokens: int | None
    triton: str


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What settings rest on.

    Attributes:
        kind: "timed", or "machine code" where only the compiler's output decided.
        date: day of it, as 2026-11-20.
        machine: name of the device or of the compiler.
    """

    kind: str
    date: str
    machine: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table."""

    key: Key
    settings: Settings
    basis: Basis


def key_of(
    op: str,
    architecture: str,
    dtype: torch.dtype,
    triton: str,
    *,
    d_model: int | None = None,
    n_features: int | None = None,
    k: int | None = None,
    tokens: int | None = None,
) -> Key:
    """The key of a call: sizes that do not matter left out, tokens rounded up to a power of two."""
    sizes = OPS[op].sizes
    bucket = None if tokens is None else 1 << (tokens - 1).bit_length()
    return Key(
        op=op,
        architecture=architecture,
        dtype=str(dtype).removeprefix("torch."),
        d_model=d_model if "d_model" in sizes else None,
        n_features=n_features if "n_features" in sizes else None,
        k=k if "k" in sizes else None,
        tokens=bucket if "tokens" in sizes else None,
        triton=".".join(triton.split(".")[:2]),
    )


def read_table(file: Path) -> list[Entry]:
    """Reads and checks a table.

    Args:
        file: JSON as written by `render`.

    Returns:
        Its entries.

    Raises:
        ValueError: something in it is wrong; one line with file, entry and key.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(table, dict) or set(table) != {"format", "entries"} or not isinstance(table["entries"], list):
        raise ValueError(f"{file}: must be an object with the keys 'format' and 'entries' (a list)")
    if table["format"] != FORMAT:
        raise ValueError(f"{file}: key 'format': is {table['format']!r}, this version reads {FORMAT}")
    entries: dict[Key, Entry] = {}
    for number, raw in enumerate(table["entries"]):
        reader = _Reader(f"{file}: entry {number}")
        entry = reader.entry(raw)
        if entry.key in entries:
            reader.fail("op", "same op and shape as an earlier entry")
        entries[entry.key] = entry
    return list(entries.values())


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """All entries, sorted; of two with one key the new one."""
    entries = {entry.key: entry for entry in (*old, *new)}
    return sorted(entries.values(), key=lambda entry: tuple(str(x).zfill(12) for x in asdict(entry.key).values()))


def render(entries: Iterable[Entry]) -> str:
    """The text of a table, one entry a line; the same entries give the same bytes."""
    lines = []
    for entry in entries:
        flat = {name: value for name, value in asdict(entry.key).items() if value is not None}
        lines.append(json.dumps(flat | {"settings": asdict(entry.settings), "basis": asdict(entry.basis)}))
    body = "[\n" + ",\n".join(f"    {line}" for line in lines) + "\n  ]" if lines else "[]"
    return f'{{\n  "format": {FORMAT},\n  "entries": {body}\n}}\n'


class _Reader:
    """Checks one entry; every complaint begins with where it is."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, key: str, complaint: str) -> NoReturn:
        raise ValueError(f"{self.where}: key '{key}': {complaint}")

    def entry(self, raw: Any) -> Entry:
        if not isinstance(raw, dict) or raw.get("op") not in OPS:
            self.fail("op", f"must be one of {', '.join(OPS)}")
        self.where += f" ({raw['op']})"
        op = OPS[raw["op"]]
        self.names(raw, {"op", "architecture", "dtype", "triton", "settings", "basis", *op.sizes})
        self.member(raw, "dtype", DTYPES)
        self.text(raw, "architecture")
        self.text(raw, "triton")
        for name in op.sizes:
            self.count(raw, name, power=name == "tokens")
        key = Key(
            op=raw["op"],
            architecture=raw["architecture"],
            dtype=raw["dtype"],
            d_model=raw.get("d_model"),
            n_features=raw.get("n_features"),
            k=raw.get("k"),
            tokens=raw.get("tokens"),
            triton=raw["triton"],
        )
        return Entry(key=key, settings=self.settings(op, raw["settings"]), basis=self.basis(raw["basis"]))

    def settings(self, op: Op, raw: Any) -> Settings:
        names = {field.name for field in fields(op.settings)}
        self.names(raw, names, inside="settings")
        if op.settings is Choice:
            self.member(raw, "choice", op.choices)
            return Choice(choice=raw["choice"])
        for name in names:
            self.count(raw, name, power=name not in ("group_m", "num_stages"))
        return op.settings(**raw)

    def basis(self, raw: Any) -> Basis:
        self.names(raw, {field.name for field in fields(Basis)}, inside="basis")
        self.member(raw, "kind", BASES)
        self.text(raw, "date")
        self.text(raw, "machine")
        return Basis(**raw)

    def names(self, raw: Any, expected: set[str], inside: str | None = None) -> None:
        if not isinstance(raw, dict):
            self.fail(inside or "op", "must be an object")
        for name in sorted(expected - set(raw)):
            self.fail(name, "missing")
        for name in sorted(set(raw) - expected):
            self.fail(name, f"unknown; {inside or 'an entry of this op'} has {', '.join(sorted(expected))}")

    def member(self, raw: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
        if raw[name] not in allowed:
            self.fail(name, f"is {raw[name]!r}, must be one of {', '.join(allowed)}")

    def text(self, raw: dict[str, Any], name: str) -> None:
        if not isinstance(raw[name], str) or not raw[name]:
            self.fail(name, f"is {raw[name]!r}, must be a text")

    def count(self, raw: dict[str, Any], name: str, power: bool) -> None:
        value = raw[name]
        if type(value) is not int or value < 1:
            self.fail(name, f"is {value!r}, must be a positive whole number")
        if power and value & (value - 1):
            self.fail(name, f"is {value}, must be a power of two")
