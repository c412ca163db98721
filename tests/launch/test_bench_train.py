"""Training benchmark: it runs the real trainer, its counts agree, user errors are one line. Speed is not tested here.

Measured speeds are in benchmarks/train.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from clt.config import load_config
from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers
from clt.launch.bench.common.ceilings import memory_ceilings
from clt.launch.bench.training.dense import DenseTranscoder
from clt.launch.bench.training.lone_mesh import LoneMesh
from clt.launch.bench.training.measure import VariantRow, can_isolate, measure_traffic
from clt.launch.bench.training.meters import PHASES, PeakMemory, PhaseClock
from clt.launch.bench.training.projection import Pieces, project
from clt.launch.bench.training.report import TrainReport
from clt.launch.bench.training.roofline import least_time, measured_machine, size_ceilings
from clt.launch.bench.training.run import TrainBenchSettings, bench_train
from clt.launch.bench.training.sizes import DEFAULT, PLAIN, SIZES, planned_job, train_config
from clt.launch.commands.main import app
from clt.planning.speed import MachineModel
from clt.step_phases import observed_by, phase
from clt.training.deepspeed_engine import joined_job
from clt.training.objective import Objective
from clt.training.settings import AuxKSettings, TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
TOY, SLICE = SIZES["toy"], SIZES["toy-slice"]


@pytest.fixture(scope="module")
def report() -> TrainReport:
    return bench_train(TrainBenchSettings(quick=True))


@pytest.fixture(scope="module")
def alone() -> Iterator[Mesh]:
    """A world of one process."""
    with joined_job():
        yield Mesh.create(1)


def clt_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "train", *map(str, words)])


def transcoder(config: CLTConfig, rank: int = 0, ranks: int = 1) -> CrossLayerTranscoder:
    """One with random decoders."""
    share = deal_layers(config, ranks)[rank]
    made = CrossLayerTranscoder(config, Scaling.identity(config.n_layers, config.d_model), share)
    for parameter in made.W_dec.values():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize(("name", "size"), [("gpt2", "gpt2"), ("llava_7b", "llava-slice")])
def test_large_sizes_are_those_of_the_configurations(name: str, size: str) -> None:
    config, own = load_config(TrainConfig, CONFIGS / f"{name}.yaml"), SIZES[size]
    settings = config.clt
    assert (settings.n_features, settings.k, settings.n_targets) == (own.n_features, own.k, own.n_targets)
    assert config.data.batch_tokens == own.batch_tokens and config.mesh.layer == own.ranks
    model = {"gpt2": (12, 768), "llava_7b": (32, 4096)}[name]
    assert (own.n_layers, own.d_model) == model


def test_variants_without_auxk_differ_only_in_it(tmp_path: Path) -> None:
    for size in SIZES.values():
        default, plain = (train_config(size, variant, tmp_path) for variant in size.variants[:2])
        assert size.variants[:2] == (DEFAULT, PLAIN)
        assert default.auxk.coefficient > 0 == plain.auxk.coefficient
        assert (default.optimizer, default.clt, default.data) == (plain.optimizer, plain.clt, plain.data)


def test_dense_baseline_has_the_loss_of_the_transcoder() -> None:
    torch.manual_seed(0)
    made = transcoder(TOY.architecture)
    x_LBD, y_LBD = torch.randn(2, TOY.n_layers, 16, TOY.d_model)
    error = (made.decode(made.encode(x_LBD)) - y_LBD).square().mean()
    dense = DenseTranscoder(made, TOY)
    # Sums of a few hundred float32 numbers in another order.
    torch.testing.assert_close(dense.loss(x_LBD, y_LBD), error, rtol=1e-5, atol=0)
    before = made.W_dec["0"].clone()
    assert dense.step(x_LBD, y_LBD) == pytest.approx(float(error.detach()), rel=1e-5)
    assert not torch.equal(made.W_dec["0"], before)


def test_rank_by_itself_decodes_the_codes_it_is_given(alone: Mesh) -> None:
    torch.manual_seed(0)
    config = SLICE.architecture
    shares = deal_layers(config, SLICE.ranks)
    mesh = LoneMesh.of(alone, SLICE.ranks, SLICE.n_features)
    made = transcoder(config, 0, SLICE.ranks)
    exchange = CodeExchange(mesh, shares)
    objective = Objective(made, exchange, AuxKSettings(coefficient=0))
    x, y = torch.randn(len(made.share.sources), 16, 32), torch.randn(len(made.share.targets), 16, 32)
    loss, _ = objective(x, y, SLICE.k, None)
    loss.backward()
    own = made.encode(x)
    pairs = zip(own.values, own.indices, strict=True)
    values, indices, _ = exchange.send(pairs, own.values.shape[1:], SLICE.n_features, x).all_rows()
    assert torch.equal(values[list(made.share.sources)], own.values)
    others = [layer for layer in range(config.n_layers) if layer not in made.share.sources]
    assert (values[others] > 0).all() and (indices[others].diff(dim=2) > 0).all()
    grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    values = values.detach().clone()
    values[list(made.share.sources)] = made.encode(x).values
    errors = []
    for layer, y_BD in zip(made.share.targets, y, strict=True):
        rows = made.source_rows(layer)
        errors.append((made.decode_layer(layer, values[rows], indices[rows]) - y_BD).square().mean())
    expected = torch.stack(errors).sum() / config.n_layers
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, parameter in made.named_parameters():
        # Float32 sums in another order, against the largest entry.
        assert (grads[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


def test_clock_counts_nested_phases_once() -> None:
    clock = PhaseClock(CPU)
    clock.begin_step()
    started = time.perf_counter()
    with clock.phase("backward"):
        time.sleep(0.02)
        with clock.phase("exchange"):
            time.sleep(0.03)
    time.sleep(0.01)
    clock.begin_step()
    elapsed = time.perf_counter() - started
    (step,) = clock.steps()
    assert step["backward"] >= 0.02 and step["exchange"] >= 0.03 and step["optimizer"] >= 0.01
    assert 0.06 <= sum(step.values()) <= elapsed + 1e-3


def test_phases_are_reported_to_an_observer_while_it_is_installed() -> None:
    clock = PhaseClock(CPU)

    @phase("decode")
    def work() -> None:
        time.sleep(0.01)

    clock.begin_step()
    with observed_by(clock):
        work()
    work()
    clock.begin_step()
    (step,) = clock.steps()
    assert 0.01 <= step["decode"] and 0.01 <= step["other"] and step["encode"] == 0


def test_peak_memory_is_the_largest_resident_memory() -> None:
    memory = PeakMemory(CPU)
    torch.ones(2**24)
    torch.ones(2**24)
    peak = memory.peak()
    if peak is None:
        pytest.skip("the system does not report it")
    # 64 MiB twice, one after the other; other memory of the process varies.
    assert 0.9 * 2**26 <= peak < 1.5 * 2**26


@pytest.fixture(scope="module")
def machine() -> MachineModel:
    """This one, by ceilings that mean little."""
    return measured_machine(memory_ceilings(CPU, 2**22, 1), size_ceilings(TOY, CPU, 1))


def test_least_time_of_a_rank_leaves_links_out_and_divides_by_measured_rates(machine: MachineModel) -> None:
    least = least_time(planned_job(SLICE, PLAIN), machine)
    assert least.model_axis == least.data_axis == least.auxk == 0
    products = 2 * SLICE.batch_tokens * SLICE.d_model * SLICE.n_features * 2 / machine.rates.product_float32
    assert products <= least.encode <= least.total
    assert least_time(planned_job(SLICE, DEFAULT), machine).auxk > 0


def test_projection_to_the_device_that_was_measured_is_the_measurement(machine: MachineModel) -> None:
    size = SIZES["cpu"]
    step = {phase: 0.1 * number for number, phase in enumerate(PHASES, start=1)}
    row = VariantRow(name="default", tokens=size.batch_tokens, steps=(step,))
    pieces = Pieces(size=size, row=row, machine=machine)
    (same,) = project(pieces, size, devices=(1,))
    assert same.seconds == pytest.approx(step) and same.links_s == same.model_bytes == 0
    assert same.tokens_per_s == pytest.approx(size.batch_tokens / 2.1)
    # Two devices have the same tokens, or twice as many.
    _, fixed, grown = project(pieces, size, devices=(1, 2))
    assert (fixed.tokens, grown.tokens) == (size.batch_tokens, 2 * size.batch_tokens)
    for two in (fixed, grown):
        assert two.mesh.world == 2 and two.model_bytes + two.data_bytes > 0 and two.links_s > 0
    assert sum(fixed.seconds.values()) < sum(same.seconds.values()) < sum(grown.seconds.values()) * 2


def test_everything_is_measured_and_bytes_are_those_of_the_formula(report: TrainReport) -> None:
    (table,) = report.tables
    assert [row.name for row in table.rows[:2]] == [DEFAULT.name, PLAIN.name] and len(table.rows) == 3
    for row in table.rows:
        assert row.absent is None and len(row.steps) == 2 and 0 < row.best_s <= row.median_s
        assert row.peak_bytes is None or row.peak_bytes > 0
    for row in table.rows[:2]:
        assert row.least_s is not None and row.planned_bytes and all(row.phases[phase] > 0 for phase in PHASES)
    for moved in report.traffic:
        assert moved.counted == moved.formula > 0 and moved.auxk > 0
        assert moved.loopback is None or moved.loopback >= moved.counted
    assert {row.job for row in report.projections} == {"gpt2", "llava-slice"}
    assert {row.mesh.world for row in report.projections} == {8, 16, 32, 64}
    assert report.link is not None and all(ceiling.rate > 0 for ceiling in report.ceilings)


def test_report_is_json_and_separates_measured_from_assumed(report: TrainReport) -> None:
    tree, text = json.loads(report.to_json()), report.to_text()
    assert tree["machine"]["packages"] and len(tree["tables"][0]["rows"][0]["steps"]) == 2
    exact, over = report.claims
    assert exact.ok and exact.measured == 0 and over.measured is None
    assert "Measured: the pieces of a step" in text and "Assumed: 360 GB/s" in text and "| ranks | mesh |" in text


@pytest.mark.slow
@pytest.mark.skipif(not can_isolate(), reason="no network namespace here")
def test_loopback_carries_the_counted_bytes_and_headers() -> None:
    rows, _ = measure_traffic(SIZES["cpu"], [(1, 2, 1, 0), (2, 1, 1, 0), (2, 1, 1, 1)], 2, private=True)
    for row in rows:
        assert row.counted == row.formula
        assert row.loopback is not None and 1 <= row.loopback / row.counted <= 1.05


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "huge"), "--size huge: unknown size"),
        (("--ranks", "3"), "--ranks 3: not supported"),
        (("--json", "/proc/report.json"), "/proc/report.json: cannot be written"),
    ],
)
def test_user_errors_are_one_line(words: tuple[str, ...], message: str) -> None:
    result = clt_command("--quick", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_size_that_does_not_fit_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("it may fit")
    result = clt_command("--size", "llava-slice")
    assert result.exit_code == 2 and "needs about" in result.stderr and result.stderr.count("\n") == 1
