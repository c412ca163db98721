"""Types of launch settings, and the JSON table of measured ones: reading, checking and writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Generic, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        raise ValueError("must be a power of two")
    return number


PowerOfTwo = Annotated[PositiveInt, AfterValidator(_power_of_two)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GatherConfig:
    """Launch of a kernel that gathers rows: decode, decoder_grad, encoder_grad, row_adam.

    Attributes:
        block_d: columns per program.
        unroll: rows loaded per loop step.
        num_warps: warps per program; block_d * itemsize / 512 makes every load 16 bytes a lane.
    """

    block_d: PowerOfTwo
    unroll: PowerOfTwo
    num_warps: PowerOfTwo


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SelectConfig:
    """Launch of the exact TopK selection.

    Attributes:
        group: columns whose maximum bounds the selection.
        num_warps: warps per row.
    """

    group: PowerOfTwo
    num_warps: PowerOfTwo


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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

    block_m: PowerOfTwo
    block_n: PowerOfTwo
    block_k: PowerOfTwo
    group_m: PositiveInt
    num_warps: PowerOfTwo
    num_stages: PositiveInt


Producer = Literal["gemm", "fused"]
CodePath = Literal["sparse", "dense"]
Settings = GatherConfig | SelectConfig | GemmConfig | Producer | CodePath


class TunedOp(NamedTuple):
    """An operation with measured settings: its section of the table, and the sizes that its settings depend on."""

    section: str
    sizes: tuple[str, ...]


_ALL = ("d_model", "n_features", "k", "tokens")

OPS = {
    "decode": TunedOp("gather", _ALL),
    "decoder_grad": TunedOp("gather", _ALL),
    "encoder_grad": TunedOp("gather", _ALL),
    "row_adam": TunedOp("gather", ("d_model",)),
    "select": TunedOp("select", ("n_features", "k")),
    "gemm": TunedOp("gemm", ("d_model", "n_features", "tokens")),
    "producer": TunedOp("producer", _ALL),
    "decode_path": TunedOp("path", _ALL),
    "decoder_grad_path": TunedOp("path", _ALL),
    "encoder_grad_path": TunedOp("path", _ALL),
}

#: Operation, architecture, dtype, Triton version (another one compiles other code) and sizes, as `key_of` joins them.
Key = Annotated[str, Field(pattern=rf"^({'|'.join(OPS)}) sm_\d+ (bfloat16|float32) triton-\d+\.\d+( [a-z_]+=\d+)+$")]

S = TypeVar("S")


class Measured(BaseModel, Generic[S]):
    """Settings of one key.

    Attributes:
        settings: the fastest.
        measured: date and device.
    """

    model_config = _STRICT

    settings: S
    measured: Annotated[str, Field(min_length=1)]


class ConfigTable(BaseModel):
    """Measured settings by their `Key`, one section per type of settings."""

    model_config = _STRICT

    gather: dict[Key, Measured[GatherConfig]] = {}
    select: dict[Key, Measured[SelectConfig]] = {}
    gemm: dict[Key, Measured[GemmConfig]] = {}
    producer: dict[Key, Measured[Producer]] = {}
    path: dict[Key, Measured[CodePath]] = {}

    def render(self) -> str:
        """The text of the file; equal tables give the same bytes."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"


def key_of(op: str, architecture: str, dtype: str, triton: str, sizes: Mapping[str, int]) -> str:
    """The key of a call.

    Args:
        op: key of `OPS`.
        architecture: for example "sm_90".
        dtype: for example "bfloat16".
        triton: version, of which major and minor number count.
        sizes: by the names in `OPS`; others are ignored, tokens are rounded up to a power of two.

    Returns:
        For example "row_adam sm_90 bfloat16 triton-3.6 d_model=4096".
    """
    rounded = {**sizes, "tokens": 1 << (sizes.get("tokens", 1) - 1).bit_length()}
    shape = " ".join(f"{name}={rounded[name]}" for name in OPS[op].sizes)
    return f"{op} {architecture} {dtype} triton-{'.'.join(triton.split('.')[:2])} {shape}"


def read_table(file: Path) -> ConfigTable:
    """Reads and checks a table.

    Raises:
        ValueError: something in it is wrong; one line with file and key.
    """
    try:
        return ConfigTable.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f" [{part}]" for part in first["loc"])
        raise ValueError(f"{file}:{where} {first['msg']}, got {str(first['input'])[:60]!r}") from error


def write_table(file: Path, found: Mapping[str, Settings], measured: str) -> None:
    """Adds settings to a table, which is created where there is none; of two with one key the new one stays.

    Args:
        file: of the table.
        found: settings by their key.
        measured: date and device.
    """
    table = read_table(file) if file.exists() else ConfigTable()
    for key, settings in found.items():
        getattr(table, OPS[key.split()[0]].section)[key] = Measured(settings=settings, measured=measured)
    file.write_text(table.render(), encoding="utf-8")
