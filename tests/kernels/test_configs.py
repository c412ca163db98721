"""Launch settings: rules, measured settings that replace them, and errors of a damaged table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from clt.kernels.gpu import configs
from clt.kernels.gpu.config_table import (
    OPS,
    GatherConfig,
    GemmConfig,
    SelectConfig,
    Settings,
    key_of,
    read_table,
    write_table,
)

WIDE = GatherConfig(block_d=1024, unroll=16, num_warps=4)
SHAPE = {"d_model": 4096, "n_features": 32768, "k": 64, "tokens": 3000}
DECODE = key_of("decode", "sm_90", "bfloat16", "3.6.0", SHAPE)
SMALL_PATH = key_of(
    "decode_path", "sm_90", "bfloat16", "3.6", {"d_model": 512, "n_features": 8192, "k": 96, "tokens": 4096}
)

SETTINGS: dict[str, Settings] = {
    DECODE: WIDE,
    key_of("select", "sm_90", "float32", "3.6.1", {"n_features": 16384, "k": 32}): SelectConfig(group=16, num_warps=2),
    key_of("gemm", "sm_90", "bfloat16", "3.6", {"d_model": 768, "n_features": 16384, "tokens": 8192}): GemmConfig(
        block_m=64, block_n=128, block_k=64, group_m=6, num_warps=4, num_stages=3
    ),
    SMALL_PATH: "dense",
}


@pytest.fixture
def on_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table with `SETTINGS`, read as if on an H200 under Triton 3.6.2."""
    table = tmp_path / "configs.json"
    write_table(table, SETTINGS, "2026-11-20 NVIDIA H200")
    monkeypatch.setattr(configs, "TABLE", table)
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    monkeypatch.setattr(configs, "triton_version", lambda: "3.6.2")
    configs._table.cache_clear()
    yield table
    configs._table.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d_model", [256, 768, 2048, 4096, 5120])
@pytest.mark.parametrize("op", ["decode", "decoder_grad", "encoder_grad", "row_adam"])
def test_rule_loads_16_bytes_a_lane_and_masks_nothing(op: str, d_model: int, dtype: torch.dtype) -> None:
    config = configs.gather_config(op, dtype, d_model, n_features=16384, k=32, tokens=4096)
    assert config.block_d * dtype.itemsize % (512 * config.num_warps) == 0
    assert d_model % config.block_d == 0


def test_rule_gives_decode_256_columns_and_the_gradients_512_to_one_warp() -> None:
    shape = (torch.bfloat16, 4096, 32768, 64, 4096)
    assert configs.gather_config("decode", *shape) == GatherConfig(block_d=256, unroll=8, num_warps=1)
    for op in ("decoder_grad", "encoder_grad", "row_adam"):
        assert configs.gather_config(op, *shape) == GatherConfig(block_d=512, unroll=8, num_warps=1)


@pytest.mark.parametrize("n_features", [1024, 32768, 65536, 131072, 1 << 22])
def test_rule_keeps_the_live_slab_in_l2_but_reads_whole_cache_lines(n_features: int) -> None:
    block = configs.gather_config("decode", torch.bfloat16, 4096, n_features).block_d
    assert block * 2 >= 128
    assert n_features * block * 2 <= configs.LIVE_SLAB or block * 2 == 128
    # Twice as wide would not fit, or is more than a warp loads at once.
    assert block == 256 or 2 * n_features * block * 2 > configs.LIVE_SLAB


def test_rule_fits_tiny_and_ragged_rows() -> None:
    assert configs.gather_config("decode", torch.float64, 5).block_d == 16
    assert configs.gather_config("decoder_grad", torch.float32, 70).block_d == 128
    assert configs.gather_config("decode", torch.bfloat16, 900).block_d == 256


@pytest.mark.parametrize(("n_features", "k", "group"), [(32768, 64, 32), (1000, 40, 16), (7, 7, 1), (64, 1, 32)])
def test_rule_leaves_at_least_k_groups(n_features: int, k: int, group: int) -> None:
    assert configs.select_config(torch.bfloat16, n_features, k).group == group
    assert n_features // group >= k


def test_rule_of_the_producer_is_fused_for_short_bfloat16_rows_only() -> None:
    assert configs.producer(torch.bfloat16, 768) == "fused"
    assert configs.producer(torch.bfloat16, 4096) == "gemm"
    assert configs.producer(torch.float32, 768) == "gemm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_the_encoder_product_fit_in_shared_memory(dtype: torch.dtype) -> None:
    config = configs.gemm_config(dtype, 4096)
    used = (config.block_m + config.block_n) * config.block_k * dtype.itemsize * config.num_stages
    assert used <= 227 * 1024


@pytest.mark.parametrize(
    ("op", "ratio", "dtype", "path"),
    [
        ("decode", 64, torch.bfloat16, "dense"),
        ("decode", 65, torch.bfloat16, "sparse"),
        ("decode", 128, torch.bfloat16, "sparse"),
        ("encoder_grad", 64, torch.bfloat16, "dense"),
        ("decoder_grad", 54, torch.bfloat16, "dense"),
        ("decoder_grad", 55, torch.bfloat16, "sparse"),
        ("decode", 8, torch.float32, "dense"),
        ("decode", 9, torch.float32, "sparse"),
    ],
)
def test_path_is_dense_up_to_the_threshold(op: str, ratio: int, dtype: torch.dtype, path: str) -> None:
    assert configs.path(op, ratio * 32, 32, dtype) == path


def test_table_goes_before_the_rule_for_exactly_its_shape(on_h200: Path) -> None:
    exact = (torch.bfloat16, 4096, 32768, 64)
    by_rule = GatherConfig(block_d=256, unroll=8, num_warps=1)
    assert configs.gather_config("decode", *exact, 4096) == WIDE
    assert configs.gather_config("decode", *exact, 2049) == WIDE, "tokens are rounded up to a power of two"
    assert configs.gather_config("decode", *exact, 2048) == by_rule
    assert configs.gather_config("decode", *exact) == by_rule
    assert configs.gather_config("decode", torch.bfloat16, 4096, 32768, 65, 4096) == by_rule
    assert configs.select_config(torch.float32, 16384, 32) == SelectConfig(group=16, num_warps=2)
    assert configs.gemm_config(torch.bfloat16, 768, 16384, 8192).group_m == 6
    assert configs.path("decode", 8192, 96) == "sparse"
    assert configs.path("decode", 8192, 96, torch.bfloat16, 512, 4096) == "dense"


@pytest.mark.parametrize(("name", "value"), [("triton_version", "3.9.0"), ("architecture", "sm_100")])
def test_entries_for_another_triton_or_device_do_not_count(
    on_h200: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(configs, name, lambda: value)
    assert configs.select_config(torch.float32, 16384, 32).group == 32


def test_settings_of_every_operation_and_their_source(on_h200: Path) -> None:
    settings = {op: configs.settings_of(op, torch.bfloat16, 4096, 32768, 64, 4096) for op in OPS}
    assert settings["decode"] == WIDE and settings["decode_path"] == "sparse" and settings["producer"] == "gemm"
    assert settings["select"] == SelectConfig(group=32, num_warps=1)
    before = configs.fingerprint()
    assert re.fullmatch(r"configs.json sha256:[0-9a-f]{64}, triton 3.6.2, sm_90", before)
    on_h200.write_text("{}")
    assert configs.fingerprint() != before


def test_table_has_the_same_bytes_in_every_order_of_writing(on_h200: Path, tmp_path: Path) -> None:
    for key in reversed(SETTINGS):
        write_table(tmp_path / "t.json", {key: SETTINGS[key]}, "2026-11-20 NVIDIA H200")
    assert (tmp_path / "t.json").read_text() == on_h200.read_text()
    assert read_table(on_h200).gather[DECODE].settings == WIDE


def test_new_settings_replace_the_old_ones_of_their_key(on_h200: Path) -> None:
    write_table(on_h200, {SMALL_PATH: "sparse"}, "later")
    assert {key: entry.settings for key, entry in read_table(on_h200).path.items()} == {SMALL_PATH: "sparse"}


def test_shipped_table_is_valid_and_as_it_is_written() -> None:
    assert read_table(configs.TABLE).render() == configs.TABLE.read_text()


@pytest.mark.parametrize(
    ("section", "key", "settings", "complaint"),
    [
        ("gather", "encode" + DECODE[6:], asdict(WIDE), "String should match pattern"),
        ("gather", DECODE.replace("bfloat16", "float16"), asdict(WIDE), "String should match pattern"),
        ("gather", DECODE, {"block_d": 256, "unroll": 8}, "[num_warps] Field required"),
        ("gather", DECODE, asdict(WIDE) | {"speed": 1}, "[speed] Unexpected keyword argument, got '1'"),
        ("gather", DECODE, asdict(WIDE) | {"block_d": 100}, "[block_d] Value error, must be a power of two, got '100'"),
        ("gather", DECODE, asdict(WIDE) | {"unroll": 0}, "[unroll] Input should be greater than 0, got '0'"),
        ("gather", DECODE, asdict(WIDE) | {"unroll": True}, "[unroll] Input should be a valid integer, got 'True'"),
        ("gather", DECODE, 3, "[settings] Input should be an object, got '3'"),
        ("path", SMALL_PATH, "fused", "[settings] Input should be 'sparse' or 'dense', got 'fused'"),
        ("speed", DECODE, 3, "[speed] Extra inputs are not permitted"),
    ],
)
def test_damaged_entry_is_named_in_one_line_with_file_and_key(
    tmp_path: Path, section: str, key: str, settings: object, complaint: str
) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps({section: {key: {"settings": settings, "measured": "today"}}}))
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        read_table(file)
    assert str(caught.value).startswith(f"{file}: [{section}]") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "complaint"), [("{", "Invalid JSON"), ("[]", "Input should be an object")])
def test_damaged_table_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=f"t.json: {complaint}"):
        read_table(tmp_path / "t.json")


def test_settings_and_public_operations_work_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, clt.kernels.ops\n"
        "from clt.kernels.gpu import configs\n"
        "print(configs.settings_of('decode', torch.bfloat16, 768, 16384, 32, 8192), configs.fingerprint())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "triton absent" in result.stdout, result.stderr
