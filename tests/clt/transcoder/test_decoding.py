"""Tied and independent decoders: definitions, gradients, loss, files, and their untied and joined forms."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from clt.checkpoint.join import join_transcoders
from clt.config import parse_config
from clt.convert.thresholds import to_jumprelu
from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers
from clt.errors import CheckpointError, ConfigError
from clt.launch.commands.main import app
from clt.records import ActivationBatch, TokenTable
from clt.training.deepspeed_engine import joined_job
from clt.training.objective import Objective
from clt.training.settings import AuxKSettings, TrainConfig
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.encoding import decoder_squares, update_decoder_norms
from clt.transcoder.layers import source_layers, target_layers
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling
from clt.transcoder.sparsity import Peers

from ...distributed.toy_job import N_LAYERS, toy_config, toy_trainer

L, D, F, K, B = 4, 6, 20, 3, 9

FORMS: dict[str, dict[str, Any]] = {
    "target": {"tied_decoders": "target", "skip": True},
    "target_norm": {"tied_decoders": "target", "sparsity": SparsitySettings(kind="joint_topk")},
    "source": {"tied_decoders": "source", "n_targets": 2},
    "source_norm": {"tied_decoders": "source", "sparsity": SparsitySettings(kind="topk", decoder_norm=True)},
    "source_later": {"tied_decoders": "source", "first_offset": 1, "skip": True},
    "sum": {"independent": "sum"},
    "mean": {"independent": "mean", "n_targets": 3, "sparsity": SparsitySettings(kind="relu")},
    "nearest": {"independent": "nearest", "first_offset": 1},
    "offset": {"feature_offset": True, "n_targets": 2, "skip": True},
    "layer_norm": {"independent": "sum", "first_offset": 1, "layer_norm": True},
}


def make(form: dict[str, Any], seed: int = 0) -> CrossLayerTranscoder:
    """A float64 transcoder in which every number matters."""
    draw = torch.Generator().manual_seed(seed)
    config = CLTConfig(**({"n_layers": L, "d_model": D, "n_features": F, "k": K} | form))
    mean, rms = torch.randn(2, L, D, generator=draw), torch.rand(2, L, generator=draw) + 0.5
    transcoder = CrossLayerTranscoder(
        config, Scaling(mean_x=mean[0], rms_x=rms[0], mean_y=mean[1], rms_y=rms[1])
    ).double()
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if transcoder.config.sparsity.uses_decoder_norm:
            update_decoder_norms(transcoder)
    return transcoder.eval()


def activations(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> dict[int, Tensor]:
    """Dense activations [B,F] of every source, as the rule gives them."""
    sources = source_layers(transcoder.config)
    codes = transcoder.encode(transcoder.scaling.standardise_x(x_LBD[list(sources)], sources))
    zeros = torch.zeros(len(sources), x_LBD.shape[1], transcoder.config.n_features, dtype=x_LBD.dtype)
    return dict(zip(sources, zeros.scatter_add(2, codes.indices.long(), codes.values), strict=True))


def pair_output(transcoder: CrossLayerTranscoder, source: int, target: int, z_BF: Tensor) -> Tensor:
    """Reconstruction of a target by a single source, from the definitions, without bias."""
    match transcoder.config.tied_decoders:
        case "target":
            return z_BF @ transcoder.W_dec[str(target)][0]
        case "source":
            scale_F = transcoder.target_scale[str(source)][target - source - transcoder.config.first_offset]
            return (z_BF * scale_F) @ transcoder.W_shared[str(source)]
    row = source - transcoder.sources_of(target)[0]
    if transcoder.config.feature_offset:
        z_BF = z_BF + transcoder.offset[str(target)][row] * (z_BF > 0)
    return z_BF @ transcoder.W_dec[str(target)][row]


def outputs(transcoder: CrossLayerTranscoder, x_LBD: Tensor) -> Tensor:
    """Raw MLP outputs of all targets, by the definitions."""
    z, layers, found = activations(transcoder, x_LBD), target_layers(transcoder.config), []
    for target in layers:
        sources = transcoder.sources_of(target)
        parts = torch.stack([pair_output(transcoder, source, target, z[source]) for source in sources])
        bias = transcoder.b_dec[str(target)]
        match transcoder.config.independent:
            case None:
                y_BD = parts.sum(dim=0) + bias
            case "sum":
                y_BD = (parts + bias[:, None]).sum(dim=0)
            case "mean":
                y_BD = (parts + bias[:, None]).mean(dim=0)
            case _:
                y_BD = parts[-1] + bias[-1]
        if transcoder.config.skip:
            y_BD = (
                y_BD
                + transcoder.scaling.standardise_x(x_LBD[[target]], (target,))[0] @ transcoder.W_skip[str(target)].T
            )
        found.append(y_BD)
    return transcoder.scaling.restore_y(torch.stack(found), layers)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forward_is_the_definition_and_survives_untying_folding_and_saving(
    form: dict[str, Any], tmp_path: Path
) -> None:
    transcoder, x = make(form), torch.randn(L, B, D, dtype=torch.float64)
    expected = outputs(transcoder, x)
    plain = transcoder.untied()
    assert plain.config == replace(transcoder.config, tied_decoders=None, independent=None)
    for found in (transcoder, plain, transcoder.folded(), plain.folded()):
        torch.testing.assert_close(found(x), expected, rtol=1e-9, atol=1e-9)
    for source in source_layers(transcoder.config):
        for target in transcoder.targets_of(source):
            assert torch.equal(transcoder.decoder(source, target), plain.decoder(source, target))
    transcoder.float().save_pretrained(tmp_path)
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert loaded.config == transcoder.config and torch.equal(loaded(x.float()), transcoder(x.float()))


@pytest.mark.parametrize("name", ["target", "source", "source_norm"])
def test_squared_norms_of_tied_decoders_are_those_of_the_untied(name: str) -> None:
    transcoder = make(FORMS[name])
    torch.testing.assert_close(decoder_squares(transcoder, Peers()), decoder_squares(transcoder.untied(), Peers()))


def loss_by_definition(transcoder: CrossLayerTranscoder, x_LBD: Tensor, y_MBD: Tensor) -> Tensor:
    """Mean over targets of the squared error; of independent sources, mean over pairs."""
    layers, z = target_layers(transcoder.config), activations(transcoder, x_LBD)
    y = dict(zip(layers, transcoder.scaling.standardise_y(y_MBD, layers), strict=True))
    errors = []
    for target in layers:
        parts = [pair_output(transcoder, source, target, z[source]) for source in transcoder.sources_of(target)]
        bias = transcoder.b_dec[str(target)]
        if transcoder.config.independent is None:
            skip_BD = torch.zeros_like(y[target])
            if transcoder.config.skip:
                skip_BD = (
                    transcoder.scaling.standardise_x(x_LBD[[target]], (target,))[0] @ transcoder.W_skip[str(target)].T
                )
            errors.append((sum(parts) + bias + skip_BD - y[target]).square().mean())
        else:
            errors += [(part + own - y[target]).square().mean() for part, own in zip(parts, bias, strict=True)]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("name", ["target", "source", "source_later", "sum", "nearest", "layer_norm"])
def test_loss_and_gradients_are_those_of_the_definition(name: str) -> None:
    transcoder = make(FORMS[name])
    x, y = torch.randn(2, L, B, D, dtype=torch.float64)
    sources, y = source_layers(transcoder.config), y[list(target_layers(transcoder.config))]
    read = x if transcoder.config.skip else x[list(sources)]
    with joined_job():
        exchange = CodeExchange(Mesh.create(1), deal_layers(transcoder.config, 1))
        loss, _ = Objective(transcoder, exchange, AuxKSettings())(read, y, K, None)
        loss.backward()
    found = {key: parameter.grad for key, parameter in transcoder.named_parameters()}
    transcoder.zero_grad()
    expected = loss_by_definition(transcoder, x, y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for key, parameter in transcoder.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-9, atol=1e-12, msg=key)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())


def test_loss_of_independent_sources_by_hand() -> None:
    transcoder = CrossLayerTranscoder(
        CLTConfig(n_layers=2, d_model=1, n_features=1, k=1, independent="sum"), Scaling.identity(2, 1)
    )
    with torch.no_grad():
        for layer in ("0", "1"):
            transcoder.W_enc[layer].fill_(1)
        transcoder.W_dec["0"].fill_(2)
        transcoder.W_dec["1"].copy_(torch.tensor([[[1.0]], [[3.0]]]))
        transcoder.b_dec["1"].copy_(torch.tensor([[0.5], [0.0]]))
    x, y = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[4.0]]])
    with joined_job():
        exchange = CodeExchange(Mesh.create(1), deal_layers(transcoder.config, 1))
        loss, seen = Objective(transcoder, exchange, AuxKSettings())(x, y, 1, None)
    # Layer 0 predicts 2 for 1; for 4, layer 0 predicts 1.5 and layer 1 predicts 6.
    assert seen.error_M.tolist() == [1, (2.5**2 + 2**2) / 2]
    assert loss.item() == pytest.approx((1 + 2.5**2 + 2**2) / 3)
    assert transcoder(x).flatten().tolist() == [2, 7.5]


@pytest.mark.parametrize("sparsity", [{}, {"kind": "jumprelu"}, {"decoder_norm": True}], ids=["topk", "jump", "norm"])
def test_sources_trained_alone_and_joined_are_those_trained_together(sparsity: dict[str, Any], tmp_path: Path) -> None:
    settings = {"n_features": 64, "k": 4, "independent": "mean", "n_targets": 3, "sparsity": sparsity}

    def fit(name: str, **more: Any) -> CrossLayerTranscoder:
        optimizer = {"learning_rate": 0.01, "warmup_steps": 2, "gradient_clip": 0}
        job = toy_config(tmp_path / name, clt={**settings, **more}, optimizer=optimizer)
        return CrossLayerTranscoder.from_pretrained(toy_trainer(job, mesh).fit())

    with joined_job():
        mesh = Mesh.create(1)
        together = fit("together").state_dict()
        parts = [fit(f"layer_{source}", source=source) for source in range(N_LAYERS)]
    joined = join_transcoders(parts).state_dict()
    assert joined.keys() == together.keys()
    for key, value in together.items():
        # Adam's vector instructions end elsewhere in smaller tensors: the last bit may differ.
        torch.testing.assert_close(joined[key], value, rtol=1e-5, atol=1e-7, equal_nan=True, msg=key)
    folders = [str(tmp_path / f"layer_{source}") for source in reversed(range(N_LAYERS))]
    result = CliRunner().invoke(app, ["join", str(tmp_path / "joined"), *folders])
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'joined'}\n"
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "joined").state_dict()
    assert all(torch.equal(loaded[key].nan_to_num(), value.nan_to_num()) for key, value in joined.items())


@pytest.mark.parametrize("name", ["target", "source", "sum"])
def test_conversion_to_thresholds_keeps_the_form_of_decoders(name: str) -> None:
    transcoder = make(FORMS[name])
    x, y = torch.randn(2, L, 40, D, dtype=torch.float64)
    zeros = torch.zeros(40, dtype=torch.int64)
    table = TokenTable(**dict.fromkeys((field.name for field in fields(TokenTable)), zeros))
    converted, report = to_jumprelu(transcoder, [ActivationBatch(x=x, y=y, tokens=table)])
    assert report.changed_counts == 0 and report.after.l0 == report.before.l0
    torch.testing.assert_close(converted(x), outputs(converted, x), rtol=1e-9, atol=1e-9)


def test_parts_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    def part(source: int | None, **more: Any) -> CrossLayerTranscoder:
        config = CLTConfig(n_layers=2, d_model=D, n_features=F, k=K, independent="sum", source=source, **more)
        return CrossLayerTranscoder(config, Scaling.identity(2, D))

    scaled = CrossLayerTranscoder(part(1).config, replace(Scaling.identity(2, D), rms_x=torch.full((2,), 2.0)))
    for parts, words in (
        ([], "nothing to join"),
        ([part(0)], "missing source layers 1;"),
        ([part(0), part(0)], "source 0 is given twice"),
        ([part(0), part(None)], "cannot join a transcoder of all source layers"),
        ([part(0), part(1, n_targets=1)], "sources 0 and 1 differ in settings"),
        ([part(0), scaled], "sources 0 and 1 differ in settings"),
    ):
        with pytest.raises(CheckpointError, match=words):
            join_transcoders(parts)
    with pytest.raises(ConfigError, match=r"clt\.source=1: .*join"):
        part(1).folded()
    part(0).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["join", str(tmp_path), str(tmp_path)])
    assert result.exit_code == 2 and "a transcoder exists here already" in result.output


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tied_decoders": "layer"}, r"clt\.tied_decoders"),
        ({"independent": "max"}, r"clt\.independent"),
        ({"source": 1}, "source=1 trains one layer alone; set independent"),
        ({"independent": "sum", "tied_decoders": "source"}, "tied_decoders=source is not supported with independent"),
        ({"independent": "sum", "skip": True}, "skip=true is not supported with independent"),
        ({"independent": "sum", "sparsity": {"kind": "batch_topk"}}, "sparsity.kind=batch_topk compares source layers"),
    ],
)
def test_settings_that_do_not_go_together_are_named(keys: dict[str, Any], words: str) -> None:
    tree = {"store": "s", "output": "o", "steps": 1, "clt": {"n_features": 8, "k": 4, **keys}}
    with pytest.raises(ConfigError, match=words) as error:
        parse_config(TrainConfig, tree, "job")
    assert "\n" not in str(error.value)


def test_a_source_without_target_or_replacement_model_is_refused() -> None:
    settings = {"n_features": 8, "k": 4, "independent": "sum", "source": 3}
    with pytest.raises(ConfigError, match="source=3 has no target among the 4 layers"):
        parse_config(CLTConfig, settings | {"n_layers": 4, "d_model": 2, "first_offset": 1}, "card")
    tree = {"store": "s", "output": "o", "steps": 1, "clt": settings}
    evaluation = {"every": 1, "replacement": {"capture": "c.yaml"}}
    with pytest.raises(ConfigError, match=r"evaluation\.replacement needs all source layers"):
        parse_config(TrainConfig, tree | {"evaluation": evaluation}, "job")
