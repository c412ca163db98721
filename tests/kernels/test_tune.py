"""The tuner's search, checks and bookkeeping, with a fake clock; real timing needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from benchmarks import tune_kernels as tune
from benchmarks.tune_kernels import TunedCall, TunedCalls
from clt.kernels.gpu import configs
from clt.kernels.gpu.config_table import OPS, GatherConfig, GemmConfig, SelectConfig, Settings, read_table, write_table
from clt.launch.bench.kernels.data import SIZES, KernelSize

SIZE = SIZES["A"]
DEFAULT, FAST, WRONG = (GatherConfig(block_d=block, unroll=8, num_warps=1) for block in (256, 512, 1024))


def clock(microseconds: dict[Settings, float], calls: list[Settings]) -> tuple[TunedCall, tune.Measure]:
    """A problem that adds its settings to `calls`, and a clock with the duration of the last of them."""

    def run(settings: Settings) -> Sequence[Tensor]:
        calls.append(settings)
        return (torch.tensor([1.0, 2.0 if settings == WRONG else 3.0]),)

    def measure(call: Callable[[], object]) -> float:
        call()
        return microseconds[calls[-1]]

    return TunedCall(run=run), measure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_space_begins_with_the_rule_and_repeats_nothing(op: str, dtype: torch.dtype) -> None:
    space = tune.candidates(op, dtype, SIZE)
    assert space[0] == configs.settings_of(op, dtype, 4096, 32768, 64, 4096)
    assert len(set(space)) == len(space) <= 30
    assert len({type(settings) for settings in space}) == 1


def test_gather_space_loads_16_or_32_bytes_a_lane() -> None:
    for config in tune.candidates("decode", torch.bfloat16, SIZE):
        assert isinstance(config, GatherConfig)
        assert config.block_d * 2 / (32 * config.num_warps) in (8, 16, 32)


def test_gather_space_is_no_wider_than_the_row() -> None:
    narrow = replace(SIZE, d_model=200, n_features=1024, k=8, n_tokens=64)
    assert {c.block_d for c in tune.candidates("decode", torch.bfloat16, narrow) if isinstance(c, GatherConfig)} == {
        128,
        256,
    }


def test_gemm_space_fits_in_shared_memory() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for c in tune.candidates("gemm", dtype, SIZE):
            assert isinstance(c, GemmConfig)
            assert (c.block_m + c.block_n) * c.block_k * dtype.itemsize * c.num_stages <= tune.SHARED_MEMORY


def test_fastest_wins_and_every_candidate_is_run_before_it_is_timed() -> None:
    calls: list[Settings] = []
    problem, measure = clock({DEFAULT: 100.0, FAST: 90.0}, calls)
    assert tune.fastest([DEFAULT, FAST], problem, measure, print) == (FAST, 90.0)
    assert calls == [DEFAULT, DEFAULT, FAST, FAST]


def test_rule_stays_where_the_gain_is_noise() -> None:
    problem, measure = clock({DEFAULT: 100.0, FAST: 98.5}, [])
    assert tune.fastest([DEFAULT, FAST], problem, measure, print) == (DEFAULT, 100.0)


def test_candidate_with_another_result_stops_the_tuning_untimed() -> None:
    calls: list[Settings] = []
    problem, measure = clock({DEFAULT: 100.0, WRONG: 1.0}, calls)
    with pytest.raises(ValueError, match=r"block_d=1024.* gives another result than .*block_d=256"):
        tune.fastest([DEFAULT, WRONG], problem, measure, print)
    assert calls[-1] == WRONG and calls.count(WRONG) == 1


def test_candidate_that_does_not_fit_is_reported_and_loses() -> None:
    def run(settings: Settings) -> Sequence[Tensor]:
        if settings == FAST:
            raise OutOfResources(300000, 232448, "shared memory")
        return (torch.ones(1),)

    lines: list[str] = []
    best = tune.fastest([DEFAULT, FAST], TunedCall(run=run), lambda call: 5.0, lines.append)
    assert best == (DEFAULT, 5.0)
    assert "does not fit" in lines[1]


def test_in_place_problem_is_put_back_before_each_check() -> None:
    state = torch.zeros(1)

    def run(settings: Settings) -> Sequence[Tensor]:
        return (state.add_(1),)

    problem = TunedCall(run=run, reset=lambda: state.zero_() and None)
    tune.fastest([DEFAULT, FAST], problem, lambda call: float(bool(call())), print)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_candidates_of_every_real_problem_agree(op: str, dtype: torch.dtype, device: str) -> None:
    small = KernelSize(name="small", d_model=40, n_features=48, k=3, n_tokens=4, n_sources=4)
    problem = TunedCalls(small, torch.device(device), dtype).call_of(op)
    space = tune.candidates(op, dtype, small)
    best = tune.fastest([space[0], space[-1]], problem, lambda call: 1.0, lambda line: None)
    assert best == (space[0], 1.0)


def test_agreement_is_exact_for_integers_and_to_rounding_for_numbers() -> None:
    big = torch.tensor([1.0, 100.0])
    assert tune.agree([big + 5e-4], [big])
    assert not tune.agree([big + 2e-3], [big])
    assert tune.agree([big + 1.0], [big], torch.bfloat16)
    assert not tune.agree([big * torch.nan], [big])
    assert not tune.agree([torch.tensor([3])], [torch.tensor([4])])


def test_found_settings_carry_this_device_and_go_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    monkeypatch.setattr(configs, "triton_version", lambda: "3.6.0")
    call, file = TunedCall(run=lambda settings: (torch.ones(1),)), tmp_path / "t.json"

    def run(op: str, microseconds: float) -> None:
        times = iter([microseconds] + [1.0] * 99)
        found = tune.tune([op], torch.bfloat16, SIZE, lambda op: call, lambda call: next(times))
        write_table(file, found, "2026-11-20 made up")

    run("select", 9.0)
    run("producer", 9.0)
    key, entry = read_table(file).select.popitem()
    assert key == "select sm_90 bfloat16 triton-3.6 n_features=32768 k=64"
    assert entry.settings == SelectConfig(group=16, num_warps=1) and entry.measured == "2026-11-20 made up"
    key, producer = read_table(file).producer.popitem()
    assert key == "producer sm_90 bfloat16 triton-3.6 d_model=4096 n_features=32768 k=64 tokens=4096"
    assert producer.settings == "fused"
    run("producer", 1.0)
    assert read_table(file).producer[key].settings == "gemm"


@pytest.mark.parametrize("size", ["4096x32768", "4096x32768x0", "axbxc"])
def test_command_refuses_a_size_in_one_line(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--out", "x", "--size", size])
    assert f"'{size}' must be DxFxK, for example 4096x32768x64" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_command_refuses_to_run_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^benchmarks.tune_kernels: needs a CUDA device, and there is none$"):
        tune.main(["--out", str(tmp_path / "t.json"), "--size", "4096x32768x64"])
    assert not (tmp_path / "t.json").exists()


@pytest.mark.gpu
def test_command_writes_entries_that_are_found(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    tune.main(["--out", str(out), "--size", "512x4096x32", "--tokens", "512"])
    sections = read_table(out).model_dump().values()
    assert {key.split()[0] for section in sections for key in section} == set(OPS)
