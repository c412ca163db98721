"""The plan: formulas against hand-computed numbers, real transcoders, and measured memory."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.config import load_config, parse_config
from clt.distributed.code_exchange import exchange_bytes
from clt.distributed.mesh import deal_layers
from clt.errors import ConfigError
from clt.planning.counts import all_reduce, dense_flops, flops, memory, store_bytes_per_token, traffic
from clt.planning.job import NUMERICS, Job, MeshShape, pairs, parameters
from clt.planning.plan import MeasuredRun, Plan, alternatives, measured_run, plan, smallest
from clt.planning.speed import MACHINES, step_time
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

ROOT = Path(__file__).resolve().parents[3]
KINDS = ["topk", "joint_topk", "batch_topk", "jumprelu", "relu"]
H200 = MACHINES["h200"]


def config(**keys: Any) -> TrainConfig:
    """A LLaVA-7B-scale job of 4,096 tokens per step; keys replace whole sections."""
    tree = {
        "store": "s",
        "output": "o",
        "steps": 100,
        "clt": {"n_features": 8192, "k": 32, "n_targets": 16},
        "data": {"batch_tokens": 4096},
        "auxk": {"coefficient": 0},
        "mesh": {"layer": 8, "zero_stage": 0},
    }
    return parse_config(TrainConfig, tree | keys, "test")


def job(train: TrainConfig, n_layers: int = 32, d_model: int = 4096, data: int = 1, numerics: str = "float32") -> Job:
    architecture = CLTConfig.resolve(train.clt, n_layers, d_model)
    zero = train.zero_stage(data)
    mesh = MeshShape(data=data, layer=train.mesh.layer, column=train.mesh.column, zero=zero)
    return Job(config=train, architecture=architecture, mesh=mesh, numerics=NUMERICS[numerics])


def llava(n_targets: int | None = 16, **keys: Any) -> Job:
    return job(config(clt={"n_features": 8192, "k": 32, "n_targets": n_targets}, **keys))


@pytest.mark.parametrize(
    ("n_targets", "n_pairs", "decoders", "total"),
    # 16 of 32 layers: 16 + 15 + ... + 1 at the end, 16 x 16 before; all: 32 x 33 / 2; each 8192 x 4096.
    [(16, 392, 13_153_337_344, 14.23e9), (None, 528, 17_716_740_096, 18.79e9)],
)
def test_parameters_of_llava_are_those_of_the_note(
    n_targets: int | None, n_pairs: int, decoders: int, total: float
) -> None:
    architecture = llava(n_targets).architecture
    counted = parameters(architecture)
    assert pairs(architecture) == n_pairs
    assert counted.encoders == 32 * 8192 * 4096 and counted.decoders == decoders
    assert counted.encoder_biases == 32 * 8192 and counted.decoder_biases == 32 * 4096
    assert counted.total == pytest.approx(total, rel=5e-4)


@pytest.mark.parametrize(
    ("form", "decoders", "scales", "biases"),
    # 32 targets; 32 sources with 392 scales of 8,192 features; 392 pairs.
    [
        ({"tied_decoders": "target"}, 32, 0, 32),
        ({"tied_decoders": "source"}, 32, 392, 32),
        ({"independent": "mean"}, 392, 0, 392),
    ],
)
def test_parameters_of_other_forms_of_decoders_by_hand(
    form: dict[str, str], decoders: int, scales: int, biases: int
) -> None:
    architecture = job(config(clt={"n_features": 8192, "k": 32, "n_targets": 16, **form})).architecture
    counted = parameters(architecture)
    assert counted.decoders == decoders * 8192 * 4096
    assert counted.decoder_scales == scales * 8192 and counted.decoder_biases == biases * 4096


def test_decoders_of_sources_travel_whole_and_their_gradients_back() -> None:
    planned = job(config(clt={"n_features": 8192, "k": 32, "n_targets": 16, "tied_decoders": "source"}))
    # Of 32 sources a rank of eight lacks 28: 4,096 columns and 16 scales of each feature, 4 bytes there and 4 back.
    assert traffic(planned).shared_decoders == 28 * 8192 * (4096 + 16) * 8
    split = replace(planned, mesh=replace(planned.mesh, layer=4, column=2))
    assert traffic(split).shared_decoders == 28 * 8192 * (2048 + 16) * 8
    # As received, and gradients added up, packed and received.
    assert memory(planned, planned.shares()[0]).shared_decoders == 32 * 8192 * (4096 + 16) * 16


def test_largest_published_transcoder_has_its_94_billion_parameters() -> None:
    train = load_config(TrainConfig, ROOT / "configs" / "train" / "qwen3_8b_largest.yaml")
    counted = parameters(CLTConfig.resolve(train.clt, 36, 4096))
    # 36 encoders and 36 x 37 / 2 decoders of 32,768 x 4,096; theirs has no encoder bias, ours adds a 1e-5th.
    assert counted.encoders + counted.decoders == (36 + 666) * 32_768 * 4096
    assert counted.total == pytest.approx(94.2e9, rel=5e-4)


@pytest.mark.parametrize(
    ("numerics", "per_parameter", "t16", "full"),
    [
        ("bf16-master", 16, 227.6e9, 300.6e9),
        ("row-bf16-momentum", 6, 85.4e9, 112.7e9),
    ],
)
def test_bytes_per_parameter_are_those_of_the_note(numerics: str, per_parameter: int, t16: float, full: float) -> None:
    kind = NUMERICS[numerics]
    assert kind.bytes_per_parameter == per_parameter
    for n_targets, whole in ((16, t16), (None, full)):
        assert parameters(llava(n_targets).architecture).total * per_parameter == pytest.approx(whole, rel=1e-3)


def test_adam_moves_28_bytes_per_parameter() -> None:
    assert NUMERICS["float32"].optimizer_traffic == NUMERICS["bf16-master"].optimizer_traffic == 28
    # Weight and second moment in bfloat16, each read and written inside the backward pass.
    assert NUMERICS["row-bf16"].optimizer_traffic == 8


@pytest.mark.parametrize(("n_targets", "sparse", "dense"), [(16, 0.42e12, 340.8e12), (None, 0.57e12, 453e12)])
def test_flops_are_those_of_the_note(n_targets: int | None, sparse: float, dense: float) -> None:
    counted = flops(llava(n_targets))
    assert counted.encode == pytest.approx(8.8e12, rel=1e-3)
    assert counted.decode == pytest.approx(sparse, rel=0.01)
    assert counted.decoder_gradients == 2 * counted.decode
    assert counted.auxk == 0 and counted.skip == 0
    assert dense_flops(llava(n_targets)) == pytest.approx(dense, rel=1e-3)


def test_codes_on_the_wire_by_hand() -> None:
    # N L k = 4096 x 32 x 32 slots; of these a rank of eight lacks seven eighths. The note counts 6 bytes for value and
    # index, 25 MB, and 4 for the gradient, 17 MB; since F fits into 16 bits an index takes 2.
    slots = 4096 * 32 * 32
    moved = traffic(job(config(), numerics="bf16-master"))
    assert moved.values == moved.indices == slots * 2 * 7 / 8
    assert moved.code_gradients == slots * 4 * 7 / 8 and slots * 4 == pytest.approx(17e6, rel=0.02)
    many = traffic(job(config(clt={"n_features": 40_000, "k": 32, "n_targets": 16}), numerics="bf16-master"))
    assert many.values + many.indices == slots * 6 * 7 / 8 and slots * 6 == pytest.approx(25e6, rel=0.01)
    assert traffic(job(config())).values == slots * 4 * 7 / 8


def test_auxk_of_every_eighth_token_adds_an_eighth_of_the_codes() -> None:
    with_auxk = traffic(llava(auxk={"token_fraction": 0.125}))
    plain = with_auxk.values + with_auxk.indices + with_auxk.code_gradients
    assert with_auxk.auxk == plain / 8
    assert traffic(llava(auxk={"token_fraction": 0.125, "k": 64})).auxk == plain / 4


def test_replicas_send_gradients_twice_and_under_zero_weights_once() -> None:
    # Three replicas of one process: 14.23 G float32 gradients, 2 x 2/3 of them; weights 2/3 of them.
    gradient_bytes = parameters(llava().architecture).total * 4
    for zero, weights in ((0, 0), (1, gradient_bytes * 2 / 3), (2, gradient_bytes * 2 / 3)):
        moved = traffic(job(config(data={"batch_tokens": 4098}, mesh={"zero_stage": zero}), data=3))
        assert moved.gradients == pytest.approx(gradient_bytes * 4 / 3)
        assert moved.weights == pytest.approx(weights)
        assert moved.model_axis == 0
        # One byte per feature and source, four numbers of eight bytes.
        assert moved.bookkeeping == pytest.approx((32 * 8192 + 32) * 4 / 3)


def test_rules_that_compare_send_counts() -> None:
    def selection(kind: str, numerics: str = "float32") -> float:
        train = config(clt={"n_features": 64, "k": 4, "sparsity": {"kind": kind}}, mesh={"layer": 2, "zero_stage": 0})
        return traffic(job(train, 8, 16, data=2, numerics=numerics)).selection

    assert selection("topk") == 0
    # Two ranks share a model group, four a world: an all-reduce moves 1 and 1.5 times its bytes.
    norms, one = 8 * 64, 1
    assert selection("joint_topk") == (norms + one + (256 * 4 + 8) * 2048) * 8
    assert selection("joint_topk", "bf16-master") == (norms + one + (256 * 2 + 8) * 2048) * 8
    assert selection("batch_topk") == one * 8 + (256 * 4 + 2 * 9) * 8 * 1.5
    assert selection("relu") == (2 * norms + one) * 8


def test_store_bytes_of_llava_are_52_terabytes_for_100_million_tokens() -> None:
    assert store_bytes_per_token(llava().architecture) == 524_288
    assert store_bytes_per_token(llava().architecture, itemsize=1) == 262_144


@pytest.mark.parametrize(
    ("zero", "data", "resident", "most"),
    # Bytes per parameter that were alive after the backward pass, and at most, of DeepSpeed 0.19.8 on gloo with buckets
    # of a fifth of the parameters (stage 0: one bucket): 16.01/20.01, 20.01/23.6, 12.02/15.6, 20.01/21.7, 12.02/13.1.
    [(0, 1, 16, 20), (0, 2, 16, 20), (1, 1, 20, 24), (1, 2, 12, 16), (2, 1, 20, 20), (2, 2, 12, 12)],
)
def test_memory_of_zero_stages_equals_the_measured_one(zero: int, data: int, resident: int, most: int) -> None:
    planned = job(config(mesh={"zero_stage": zero}), 4, 128, data=data)
    (share,) = planned.shares()
    own = parameters(planned.architecture, share).total
    need = memory(planned, share)
    assert (need.weights + need.optimizer + need.gradients) / own == pytest.approx(resident)
    # The bucket, which takes all gradients of this small model, is on top of what each stage keeps.
    bucket = 0 if zero == 0 else 4
    assert (need.weights + need.optimizer + need.gradients + need.buffers) / own == pytest.approx(most + bucket)


def test_activations_in_memory_by_hand() -> None:
    train = config(clt={"n_features": 64, "k": 4}, data={"batch_tokens": 10}, mesh={"zero_stage": 0})
    planned = job(train, 3, 8)
    need = memory(planned, planned.shares()[0])
    assert need.inputs == 2 * 10 * (3 + 3) * 8 * 4
    assert need.pre_activations == 10 * 64 * 4
    assert need.residuals == 10 * 3 * 8 * 4
    # 40 slots: 3 own layers of 8 bytes; 3 layers of 8 bytes, 2 on the wire, 4 of gradient, 2 x 4 of grouping.
    assert need.codes == 40 * (3 * 8 + 3 * 22)
    joint = job(config(clt={"n_features": 64, "k": 4, "sparsity": {"kind": "joint_topk"}}, mesh={}), 3, 8)
    assert memory(joint, joint.shares()[0]).pre_activations == 4 * 3 * 4096 * 64 * 4


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    n_layers, column = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4]))
    first_offset = draw(st.sampled_from([0, 1])) if n_layers > 1 else 0
    layer, data = draw(st.integers(1, n_layers - first_offset)), draw(st.integers(1, 3))
    n_features = draw(st.integers(1, 12))
    keys = {
        "clt": {
            "n_features": n_features,
            "k": draw(st.integers(1, n_features)),
            "n_targets": draw(st.none() | st.integers(1, n_layers)),
            "first_offset": first_offset,
            **draw(
                st.fixed_dictionaries(
                    {
                        "skip": st.booleans(),
                        "sparsity": st.fixed_dictionaries({"kind": st.sampled_from(KINDS)}),
                        "tied_decoders": st.sampled_from([None, "target", "source"]),
                    }
                )
                | st.fixed_dictionaries({"independent": st.sampled_from(["sum", "mean", "nearest"])})
            ),
        },
        "data": {"batch_tokens": data * draw(st.integers(1, 50))},
        "auxk": {"coefficient": draw(st.sampled_from([0, 0.03]))},
        "mesh": {"layer": layer, "column": column, "zero_stage": draw(st.sampled_from([0, 1, 2]))},
    }
    return job(config(**keys), n_layers, 4 * draw(st.integers(1, 3)), data, draw(st.sampled_from(list(NUMERICS))))


def numbers(transcoder: CrossLayerTranscoder) -> int:
    return sum(parameter.numel() for parameter in transcoder.parameters())


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_parameters_are_those_of_real_transcoders_whole_and_by_share(planned: Job) -> None:
    scaling = Scaling.identity(planned.architecture.n_layers, planned.architecture.d_model)
    whole = parameters(planned.architecture)
    assert whole.total == numbers(CrossLayerTranscoder(planned.architecture, scaling))
    shares = deal_layers(planned.architecture, planned.mesh.layer, planned.mesh.column)
    counted = [parameters(planned.architecture, share) for share in shares]
    for share, own in zip(shares, counted, strict=True):
        assert own.total == numbers(CrossLayerTranscoder(planned.architecture, scaling, share))
    for field in fields(whole):
        assert sum(getattr(own, field.name) for own in counted) == getattr(whole, field.name)


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_weights_in_memory_of_all_ranks_are_the_whole(planned: Job) -> None:
    needs = [memory(planned, share) for share in planned.shares()]
    assert sum(need.weights for need in needs) == parameters(planned.architecture).total * planned.numerics.weight
    for need in needs:
        assert all(value >= 0 for value in vars(need).values()) and need.total == sum(vars(need).values())


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_axes_of_size_one_have_no_traffic(planned: Job) -> None:
    moved = traffic(planned)
    if planned.mesh.model == 1:
        assert moved.model_axis == (moved.selection if planned.mesh.world > 1 else 0)
    if planned.mesh.data == 1:
        assert moved.data_axis == 0
    if planned.mesh.world == 1:
        assert moved.total == 0


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_bytes_of_codes_are_those_that_the_exchange_promises(planned: Job) -> None:
    moved, shares = traffic(planned), planned.shares()
    dtype = torch.float32 if planned.numerics.weight == 4 else torch.bfloat16
    sent = exchange_bytes(shares, planned.architecture.n_features, planned.batch, planned.slots, dtype)
    dead = exchange_bytes(shares, planned.architecture.n_features, planned.auxk_batch, planned.auxk_slots, dtype)
    assert moved.values + moved.indices + moved.code_gradients == sent and moved.auxk == dead


@given(jobs(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_everything_grows_with_k_and_tokens(planned: Job, more: int) -> None:
    train = planned.config
    wider = replace(planned.architecture, k=min(planned.architecture.k + more, planned.architecture.n_features))
    tokens = replace(train.data, batch_tokens=train.data.batch_tokens + more * planned.mesh.data)
    for larger in (replace(planned, architecture=wider), replace(planned, config=replace(train, data=tokens))):
        assert traffic(larger).total >= traffic(planned).total
        assert flops(larger).total >= flops(planned).total
        assert step_time(larger, H200).total >= step_time(planned, H200).total
        for share in planned.shares():
            assert memory(larger, share).total >= memory(planned, share).total


def test_an_all_reduce_of_one_rank_is_free() -> None:
    assert [all_reduce(100, ranks) for ranks in (1, 2, 4)] == [0, 100, 150]


def llava_plan(**keys: Any) -> Plan:
    train = config(**keys)
    return plan(train, CLTConfig.resolve(train.clt, 32, 4096), H200)


def test_step_of_llava_on_eight_gpus_by_hand() -> None:
    found = llava_plan().step
    # Four encoders of a rank, 4096 x 4096 x 8192 products in float32 at 0.8 x 67 TFLOP/s, and pre-activations twice.
    pre_activations = (2 * 4096 * 8192 * 4 + 4096 * 32 * 8) / 4.32e12
    assert found.encode == pytest.approx(4 * (2 * 4096 * 4096 * 8192 / 53.6e12 + pre_activations))
    # 49 decoders of a rank: 4096 x 32 rows of 16 KiB at 7.3 TB/s; residuals of four targets.
    gather = 4096 * 32 * 16_384 / 7.3e12
    assert found.decode == pytest.approx(49 * gather + 2 * 4 * 4096 * 16_384 / 4.32e12)
    assert found.decoder_gradients == pytest.approx(49 * (gather + 2 * 8192 * 16_384 / 4.32e12))
    # 28 bytes of Adam, 4 of the norm, 8 of clipping.
    assert found.optimizer == pytest.approx(parameters(llava().architecture).total / 8 * 40 / 4.32e12, rel=1e-3)
    assert found.data_axis == found.auxk == 0


def test_dense_products_win_where_k_is_a_large_share_of_the_features() -> None:
    many = llava_plan(clt={"n_features": 8192, "k": 4096, "n_targets": 16}).step
    product = 2 * 4096 * 8192 * 4096 / (67e12 * 0.8)
    assert many.decode == pytest.approx(49 * product + 2 * 4 * 4096 * 16_384 / 4.32e12)


def test_llava_fits_one_gpu_without_stored_gradients_and_needs_more_with_them() -> None:
    found = llava_plan()
    needed = {}
    for name, kind in NUMERICS.items():
        fewest = smallest(found, kind)
        needed[name] = fewest.job.mesh.world if fewest else 0
    # 14.23 G parameters at 16 bytes are 228 GB, at 8 bytes 114 of the 127 GB that can be used.
    assert all(needed[name] == 1 for name in NUMERICS if name.startswith("row"))
    assert needed["bf16-master"] in (2, 4) and needed["float32"] in (2, 4)


def test_alternatives_fit_and_come_fastest_first() -> None:
    found = alternatives(llava_plan())
    assert found and all(each.fits and each.job.mesh.world == 8 for each in found)
    rates = [float(f"{each.tokens_per_second:.3g}") for each in found]
    assert rates == sorted(rates, reverse=True)
    assert alternatives(llava_plan(), world=1) == []


@pytest.mark.parametrize(
    ("keys", "world", "words"),
    [
        ({"mesh": {"layer": 33}}, None, "mesh.layer=33"),
        ({"mesh": {"column": 3}}, None, "mesh.column=3"),
        ({"mesh": {"layer": 8}}, 12, "mesh.layer=8"),
        ({"mesh": {"layer": 8}, "data": {"batch_tokens": 4097}}, 16, "data.batch_tokens=4097"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(keys: dict[str, Any], world: int | None, words: str) -> None:
    train = config(**keys)
    with pytest.raises(ConfigError, match=words) as error:
        plan(train, CLTConfig.resolve(train.clt, 32, 4096), H200, world=world)
    assert "\n" not in str(error.value)


def test_zero_is_refused_where_the_optimizer_cannot() -> None:
    train = config(mesh={"zero_stage": 1})
    with pytest.raises(ConfigError, match=r"mesh\.zero_stage=1"):
        plan(train, CLTConfig.resolve(train.clt, 32, 4096), H200, numerics=NUMERICS["row-bf16"])


def test_speed_and_traffic_of_a_run_are_the_medians_of_its_second_half(tmp_path: Path) -> None:
    assert measured_run(tmp_path) is None
    rates = [1, 2, 900, 100, 300, 200]
    lines = [
        f'{{"step": {step}, "tokens_per_second": {rate}, "bytes_per_step/model": {rate}, "bytes_per_step/data": 5}}\n'
        for step, rate in enumerate(rates)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert measured_run(tmp_path) == MeasuredRun(tokens_per_second=200, bytes_per_step=205)


def test_reduced_numbers_of_the_engine_are_the_plans() -> None:
    from clt.planning import counts as plan_counts
    from clt.training import deepspeed_engine as engine

    assert plan_counts.BUCKET == engine._LARGEST_BUCKET
    assert torch.float64.itemsize == plan_counts.SCALAR
