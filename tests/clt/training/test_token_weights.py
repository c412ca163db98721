"""Weights of tokens in the loss: values, effect on every term, and their source in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clt.config import parse_config
from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers
from clt.errors import ConfigError
from clt.training.deepspeed_engine import joined_job
from clt.training.loss import modality_weights
from clt.training.metrics import read_metrics
from clt.training.objective import Objective
from clt.training.settings import AuxKSettings, TokenWeights, TrainConfig
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

from ...distributed.toy_job import BATCH_TOKENS, global_batch, toy_config, toy_scaling, toy_trainer

L, D, F, K, B = 3, 6, 20, 4, 8


def test_weights_have_mean_one_over_the_tokens_of_the_store() -> None:
    # 30 text and 570 image tokens: (30 + 570/20) / 600 = 0.0975 on average.
    weights_G = modality_weights(TokenWeights(text=1, image=0.05), [30, 570, 0, 0])
    assert weights_G is not None
    assert weights_G[:2].tolist() == pytest.approx([1 / 0.0975, 0.05 / 0.0975])
    assert (30 * weights_G[0] + 570 * weights_G[1]).item() == pytest.approx(600)


def test_equal_weights_are_no_weights() -> None:
    assert modality_weights(TokenWeights(), [30, 570, 0, 0]) is None
    assert modality_weights(TokenWeights(text=2, image=2, image_special=2, bos=2), [1, 1, 1, 1]) is None


def test_token_weights_without_training_tokens_are_refused() -> None:
    tree: dict[str, Any] = {"store": "s", "output": "o", "steps": 1, "clt": {"n_features": 8, "k": 4}}
    nothing = dict.fromkeys(("text", "image", "image_special", "bos"), 0)
    with pytest.raises(ConfigError, match=r"data\.token_weights: .*no token trains"):
        parse_config(TrainConfig, tree | {"data": {"token_weights": nothing}}, "job")
    with pytest.raises(ConfigError, match=r"data\.token_weights\.image: "):
        parse_config(TrainConfig, tree | {"data": {"token_weights": {"image": -1}}}, "job")
    with pytest.raises(ConfigError, match=r"unknown key 'data\.token_weights\.video'"):
        parse_config(TrainConfig, tree | {"data": {"token_weights": {"video": 1}}}, "job")
    with pytest.raises(ConfigError, match=r"token_weights: .*\(image and bos\) have weight 0"):
        modality_weights(TokenWeights(image=0, bos=0), [0, 570, 0, 1])


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
def test_a_weight_of_n_is_n_equal_tokens(kind: str) -> None:
    config = CLTConfig(n_layers=L, d_model=D, n_features=F, k=K, skip=True, sparsity=SparsitySettings(kind=kind))
    copies_B = torch.tensor([1, 3, 0, 2, 1, 1, 4, 2])
    x, y = torch.randn(2, L, B, D, dtype=torch.float64)
    dead_LF = torch.rand(L, F) < 0.3
    with joined_job():
        mesh = Mesh.create(1)
        transcoder = CrossLayerTranscoder(config, Scaling.identity(L, D)).double()
        with torch.no_grad():
            for group in (transcoder.W_dec, transcoder.b_dec, transcoder.W_skip):
                for parameter in group.values():
                    parameter.normal_()
        # All tokens have part in AuxK, so that the repeated ones do.
        settings = AuxKSettings(coefficient=0.5, revival=0.2, token_fraction=1)
        objective = Objective(transcoder, CodeExchange(mesh, deal_layers(config, 1)), settings)
        found = []
        for x_LBD, y_MBD, weights_B in (
            (x.repeat_interleave(copies_B, 1), y.repeat_interleave(copies_B, 1), None),
            (x, y, copies_B / copies_B.sum().double()),
        ):
            transcoder.zero_grad()
            loss, seen = objective(x_LBD, y_MBD, K, dead_LF, 0.3, weights_B)
            loss.backward()
            found.append([loss.detach(), seen.error_M, *(p.grad for p in transcoder.parameters())])
    for repeated, weighted in zip(*found, strict=True):
        torch.testing.assert_close(repeated, weighted, rtol=1e-10, atol=1e-12)


def test_training_weighs_tokens_by_their_modality(tmp_path: Path) -> None:
    weights_G = torch.tensor([0.1, 1.9, 1, 1], dtype=torch.float64)
    with joined_job():
        toy_trainer(toy_config(tmp_path, steps=1), Mesh.create(1), weights_G=weights_G).fit()
    (report,) = read_metrics(tmp_path / "metrics.jsonl")
    # Before the first step reconstructions are zero; every other token of the toy is an image token.
    y = toy_scaling().standardise_y(global_batch(0)[1], tuple(range(4)))
    errors_B = y.square().mean(dim=(0, 2))
    weights_B = weights_G[torch.arange(BATCH_TOKENS) % 2]
    assert report["loss"] == pytest.approx((weights_B * errors_B).mean().item(), rel=1e-6)
    assert report["loss"] != pytest.approx(errors_B.mean().item(), rel=1e-2)
