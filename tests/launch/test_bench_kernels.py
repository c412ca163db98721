"""Kernel benchmark: counts of operations, all results checked, only correct ones timed. Speed is not tested here.

Measured speeds are in benchmarks/kernels.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks import kernel_peers
from clt.errors import ConfigError
from clt.launch.bench.kernels.data import DISTRIBUTIONS, SIZES, KernelInputs, KernelSize, firing_rates
from clt.launch.bench.kernels.measure import Case, Implementation, Runner, measure
from clt.launch.bench.kernels.report import KernelReport, KernelRow, KernelTable, kernel_claims
from clt.launch.bench.kernels.roofline import Roofline, Shape, Workload, total_floor_s
from clt.launch.bench.kernels.run import KernelBenchSettings, bench_kernels
from clt.launch.commands.main import app

CPU = torch.device("cpu")
OPS = {
    "encode_topk",
    "select_topk",
    "batch_topk",
    "feature_csr",
    "decode",
    "decode_loss",
    "decoder_grad",
    "encoder_grad",
    "row_adam",
    "decoder_step",
    "forward_backward",
    "step",
}

#: N*k = 6 slots per layer, rows of 8 bytes, seven features that fire.
SMALL = Shape(d_model=4, n_features=10, n_tokens=3, k=2, n_sources=2, itemsize=2, touched=(3, 4))


@pytest.fixture(scope="module")
def report() -> KernelReport:
    return bench_kernels(KernelBenchSettings(quick=True))


def clt_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "kernels", *map(str, words)])


def test_work_of_every_operation_equals_hand_counts() -> None:
    assert SMALL.encode() == Workload(flops=2 * 3 * 4 * 10, once_bytes=(12 + 40 + 10) * 2 + 6 * (2 + 4))
    assert SMALL.select() == Workload(once_bytes=3 * 10 * 2 + 6 * 6)
    assert SMALL.threshold(5) == Workload(once_bytes=3 * 10 * 2 + 5 * 6)
    rows = {"gather_bytes": 2 * 6 * 8, "table_bytes": 7 * 8, "table_rows": 10}
    assert SMALL.decode() == Workload(flops=2 * 12 * 4, once_bytes=12 * 6 + 3 * 8, **rows)
    assert SMALL.decode_loss() == Workload(flops=2 * 12 * 4, once_bytes=12 * 6 + 2 * 3 * 8, **rows)
    assert SMALL.csr(2) == Workload(once_bytes=2 * (6 * 6 + 6 * 8 + 11 * 8))
    rows = {"flops": 4 * 12 * 4, "gather_bytes": 12 * 8, "table_bytes": 3 * 8, "table_rows": 3}
    # Slots, the seven rows of weights that are read, and all twenty rows of gradients that are written.
    assert SMALL.decoder_grad() == Workload(once_bytes=12 * (2 + 8 + 4) + 7 * 8 + 20 * 8, **rows)
    # Instead of gradients: seven rows of weights written, and moments of 4 bytes read and written.
    assert SMALL.decoder_step(4) == Workload(once_bytes=12 * 14 + 7 * 8 + 7 * 4 * (2 + 8), **rows)
    rows = {"flops": 2 * 6 * 4, "gather_bytes": 6 * 8, "table_bytes": 3 * 8, "table_rows": 3}
    assert SMALL.encoder_grad() == Workload(once_bytes=6 * (4 + 2 + 8) + 10 * 2 + 10 * 8, **rows)
    assert SMALL.encoder_step(4) == Workload(once_bytes=6 * 14 + 10 * 2 + 4 * 4 * (4 + 8), **rows)
    assert SMALL.adam(4) == Workload(once_bytes=7 * 4 * (6 + 8))


def test_work_of_the_large_sizes_is_as_expected() -> None:
    def shape(name: str) -> Shape:
        size = SIZES[name]
        numbers = {key: value for key, value in vars(size).items() if key != "name"}
        return Shape(**numbers, itemsize=2, touched=(size.n_features,) * size.n_sources)

    a, b = shape("A"), shape("B")
    assert a.encode().flops == pytest.approx(1.10e12, rel=0.01)
    assert a.decode().gather_bytes / 16 == pytest.approx(2.147e9, rel=1e-3)
    assert a.adam(4).once_bytes / 16 == pytest.approx(14 * 134.2e6, rel=1e-3)
    assert b.encode().flops / 790e12 == pytest.approx(0.261e-3, rel=0.01)
    # One pair of layers at B, from a cache that reads 9.7 TB/s.
    assert b.decode().gather_bytes / 12 / 9.7e12 == pytest.approx(0.0415e-3, rel=0.01)


def test_floor_is_the_longest_of_memory_gather_and_product() -> None:
    roof = Roofline(memory_bytes_per_s=100.0, cache_bytes_per_s=400.0, cache_bytes=2560, flops_per_s=1000.0)
    assert roof.floor_s(Workload(once_bytes=200, table_bytes=100)) == 3
    assert roof.floor_s(Workload(once_bytes=200, flops=4000)) == 4
    # Ten rows of 256 bytes fit into the cache, eleven do not.
    assert roof.floor_s(Workload(gather_bytes=2000, table_rows=10)) == 5
    assert roof.floor_s(Workload(gather_bytes=2000, table_rows=11)) == 20
    assert replace(roof, cache_bytes_per_s=None).floor_s(Workload(gather_bytes=2000, table_rows=10)) == 20
    assert total_floor_s(roof, [Workload(once_bytes=200), Workload(flops=4000)]) == 6


def test_features_fire_evenly_or_by_rank_and_k_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    assert firing_rates(100, 7, "uniform", generator).tolist() == [0.07] * 100
    rates = firing_rates(1000, 20, "zipf", generator).sort(descending=True).values
    assert rates.sum() == pytest.approx(20)
    assert rates[0] == 0.99 and rates[99] / rates[199] == pytest.approx(2)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_codes_are_canonical_and_fire_as_often_as_they_should(distribution: str) -> None:
    size = KernelSize(name="test", d_model=16, n_features=200, n_tokens=4000, k=6, n_sources=1)
    inputs = KernelInputs.make(size, distribution, CPU, torch.float32)  # type: ignore[arg-type]
    assert (inputs.values_SBK > 0).all() and (inputs.indices_SBK.diff(dim=2) > 0).all()
    count = inputs.csr.bounds[0].diff()
    wanted = firing_rates(200, 6, distribution, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    found, wanted = (count / 4000).sort(descending=True).values, wanted.sort(descending=True).values
    # TopK keeps exactly k per token and the rates give k on average, which evens them out a little.
    assert torch.allclose(found.double(), wanted, rtol=0.35, atol=0.01)
    # The encoder, whose bias is made for these rates, chooses as the codes do.
    pre_BF = torch.addmm(inputs.b_enc_F, inputs.x_BD, inputs.W_enc_FD.T)
    chosen = torch.zeros(200).index_add_(0, pre_BF.topk(6).indices.flatten(), torch.ones(24000)) / 4000
    assert torch.corrcoef(torch.stack([chosen, count / 4000]))[0, 1] > 0.95 or distribution == "uniform"


def test_everything_is_measured_right_and_ours_repeats_its_bits(report: KernelReport) -> None:
    assert {(table.op, table.distribution) for table in report.tables} == {
        (op, distribution) for op in OPS for distribution in DISTRIBUTIONS
    }
    cuda = torch.cuda.is_available()
    for table in report.tables:
        assert table.floor_ms > 0 and table.moved_bytes > 0 and len(table.rows) > 1
        for row in table.rows:
            assert row.absent is None, f"{table.key}: {row.name}: {row.absent}"
            assert row.ms is not None and row.median_ms is not None and 0 < row.ms <= row.median_ms
            assert row.roofline == pytest.approx(table.floor_ms / row.ms)
            # Sums of a few dozen numbers in float32.
            assert row.error is None or row.error < (0.05 if cuda else 1e-6), f"{table.key}: {row.name}"
            assert (row.peak_mib is not None) == cuda
            assert row.repeats or not row.name.startswith("clt")
    assert all(ceiling.rate > 0 for ceiling in report.ceilings)
    assert [ceiling.unit for ceiling in report.ceilings] == ["B/s"] * (3 if cuda else 2) + ["FLOP/s"]


def test_report_is_json_and_every_claim_has_a_verdict_or_was_not_measured(report: KernelReport) -> None:
    tree, text = json.loads(report.to_json()), report.to_text()
    assert len(tree["tables"]) == 2 * len(OPS) and tree["machine"]["packages"]
    assert {entry["bound"] for entry in tree["claims"]} == {1.6, 1.15, 1, 2, 1.5, 3}
    for entry in tree["claims"]:
        # There are no claims for the toy size.
        assert entry["measured"] is None and entry["ok"] is None
        assert f"| {entry['text']} | >= {entry['bound']:g} | not measured | - |" in text
    for table in report.tables:
        assert f"**{table.key}**" in text and all(f"| {row.name} |" in text for row in table.rows)


def _table(op: str, size: str, floor_ms: float = 1.0, gather_bytes: float = 0.0, **ms: float | None) -> KernelTable:
    names = {"two": "clt dz, then clt dW", "eleuther": "EleutherAI clt-training", "topk": "product, torch.topk"}
    rows = [
        KernelRow(name=names.get(name, name), ms=value, roofline=None if value is None else floor_ms / value)
        for name, value in ms.items()
    ]
    return KernelTable(
        size=size,
        distribution="zipf",
        op=op,
        title="",
        moved_bytes=gather_bytes,
        gather_bytes=gather_bytes,
        flops=0,
        floor_ms=floor_ms,
        rows=tuple(rows),
    )


def test_claims_are_ratios_of_best_rounds_at_the_sizes_they_are_made_for() -> None:
    tables = [
        _table("encode_topk", "A", clt=2.0, topk=2.4),
        _table("encode_topk", "B", clt=2.0, topk=3.0),
        _table("encode_topk", "toy", clt=1.0, topk=9.0),
        # 12e9 bytes in 2.5 ms are 4.8 TB/s, 0.8 of 6, but the floor is 2 ms: 0.8 of the roofline, above 0.75.
        _table("decode", "A", floor_ms=2.0, gather_bytes=12e9, clt=2.5),
        _table("decoder_grad", "B", clt=1.0, two=2.5, **{"embedding_bag dz, then clt dW": 1.8, "dense": 1.1}),
        _table("forward_backward", "A", clt=1.0, dense=5.0, eleuther=1.6),
        _table("step", "A", clt=None, eleuther=3.0),
    ]
    found = {entry.text: (entry.measured, entry.ok) for entry in kernel_claims(tables, "cuda")}
    assert found.pop("A/zipf: GPU, D=4096: encode, against product and torch.topk") == (pytest.approx(1.2), True)
    assert found.pop("B/zipf: GPU, D=768: encode, against product and torch.topk") == (1.5, False)
    gather = found.pop("A/zipf: GPU: gather of decode, the better of TB/s / 6 and roofline / 0.75")
    assert gather == (pytest.approx(0.8 / 0.75), True)
    # The better of the two ways to do it in two passes.
    assert found.pop("B/zipf: GPU: fused backward, against two passes") == (1.8, False)
    assert found.pop("A/zipf: GPU: forward and backward, against EleutherAI's kernels") == (1.6, True)
    assert set(found.values()) == {(None, None)} and len(found) == 3
    cpu = [_table("step", "cpu", clt=2.0, dense=3.0), _table("forward_backward", "cpu", clt=2.0, dense=1.0)]
    verdicts = [entry.ok for entry in kernel_claims(cpu, "cpu") if entry.measured is not None]
    assert verdicts == [False, True]


def _case(*implementations: Implementation) -> Case:
    return Case(
        op="test",
        title="",
        works=(Workload(),),
        implementations=implementations,
        error=lambda out: float((out - 1).abs().max()),
    )


def test_wrong_results_and_failures_of_others_are_reported_and_not_timed() -> None:
    def broken() -> Runner:
        raise RuntimeError("their kernel\nneeds another GPU")

    good = Implementation(name="good", make=lambda: Runner(run=lambda: torch.ones(3)))
    wrong = Implementation(name="wrong", make=lambda: Runner(run=lambda: torch.full((3,), 1.5)))
    nan = Implementation(name="nan", make=lambda: Runner(run=lambda: torch.full((3,), torch.nan)))
    theirs = Implementation(name="theirs", make=broken, may_fail=True)
    samples = measure(_case(good, wrong, nan, theirs), CPU, 2, 0.1)
    assert [sample.timing is None for sample in samples] == [False, True, True, True]
    assert samples[0].error == 0 and len(samples[0].timing.wall_s) == 2  # type: ignore[union-attr]
    assert [sample.absent for sample in samples[1:]] == [
        "wrong: relative error 5.0e-01",
        "wrong: relative error nan",
        "RuntimeError: their kernel",
    ]
    with pytest.raises(RuntimeError, match="their kernel"):
        measure(_case(replace(theirs, may_fail=False)), CPU, 1, 0.1)


def test_runs_that_differ_in_one_bit_do_not_repeat() -> None:
    outcomes = [torch.ones(3), torch.ones(3), torch.ones(3)]
    outcomes[1][2] += 1e-7
    take = iter(outcomes)
    moving = Implementation(name="moving", make=lambda: Runner(run=lambda: next(take)))
    (sample,) = measure(_case(moving), CPU, 1, 0.1)
    assert sample.repeats is False
    total = torch.zeros(1)
    adds = Implementation(name="adds", make=lambda: Runner(run=lambda: total.add_(1), start=total.zero_))
    (sample,) = measure(_case(adds), CPU, 1, 0.1)
    assert sample.repeats is True


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    cases = [
        (("--size", "C"), "--size C: unknown size; choose from A, A32k, B, few, many, cpu, toy"),
        (("--quick", "--eleuther", tmp_path / "none"), "no such folder"),
        (("--quick", "--openai", tmp_path / "none"), "no such folder"),
        # Found out before anything is measured: a log line would be a second one.
        (("--quick", "--json", "/proc/none/report.json"), "/proc/none/report.json: cannot be written"),
    ]
    if not torch.cuda.is_available():
        cases += [
            (("--quick", "--eleuther", tmp_path), "need a CUDA device"),
            (("--size", "A32k"), "--size A32k: needs about"),
        ]
    for words, message in cases:
        result = clt_command(*words)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


def test_folder_that_is_no_checkout_of_a_peer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--eleuther .*: has no sparsify/xformers.py"):
        kernel_peers.eleuther(tmp_path)
    with pytest.raises(ConfigError, match=r"--openai .*: has no sparse_autoencoder/kernels.py"):
        kernel_peers.openai(tmp_path)


def test_command_prints_the_report_and_writes_it(tmp_path: Path) -> None:
    result = clt_command("--quick", "--rounds", "1", "--json", tmp_path / "new" / "report.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| claim |") and "**toy/zipf/step**" in result.stdout
    tree = json.loads((tmp_path / "new" / "report.json").read_text())
    assert all(len(row["wall_s"]) == 1 for table in tree["tables"] for row in table["rows"])
