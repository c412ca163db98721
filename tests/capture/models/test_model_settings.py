"""Model settings: dtype, devices, quantisation, and errors for missing packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from clt.capture.models.hooks import attach
from clt.capture.models.model_settings import ModelChoice
from clt.config import parse_config
from clt.errors import ConfigError, ModelError

from ..conftest import make_llama, make_tokenizer


def activations(site: str = "lm.2.mlp_out", **settings: Any) -> torch.Tensor:
    adapter = ModelChoice(**settings).load()
    with torch.no_grad(), attach(adapter, [site]) as recorded:
        adapter.forward(adapter.prepare("the cat sat on a mat"))
    return recorded[site]


def test_the_model_runs_in_the_type_of_the_job(llama_folder: Path) -> None:
    exact = activations(model=str(llama_folder))
    assert exact.dtype == torch.float32
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        rounded = activations(model=str(llama_folder), dtype=name)
        assert rounded.dtype == dtype
        # A few roundings of one layer after another, each of half a unit in the last place.
        assert (rounded.float() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"quantization": "8bit"}, "bitsandbytes", "quantization: 8bit needs the package 'bitsandbytes'; pip install"),
        ({"quantization": "4bit"}, "accelerate", "quantization: 4bit needs the package 'accelerate'; pip install"),
        ({"device_map": "auto"}, "accelerate", "device_map: auto needs the package 'accelerate'; pip install"),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], missing: str, message: str
) -> None:
    monkeypatch.setattr("clt.capture.models.loading.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ModelError, match=message) as error:
        ModelChoice(model=str(llama_folder), **settings).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "3bit"}, "quantization: "),
        ({"device_map": "everywhere"}, "device_map: "),
        ({"device_map": "auto", "device": "cuda:1"}, "device=cuda:1 and device_map=auto exclude each other"),
    ],
)
def test_wrong_settings_name_the_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ModelChoice, {"model": "m", **settings}, "job.yaml")


def test_a_model_that_is_spread_computes_the_same(llama_folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the optional package 'accelerate' is not installed")
    spread = activations(model=str(llama_folder), device_map="auto")
    assert torch.equal(spread.cpu(), activations(model=str(llama_folder)))


@pytest.mark.parametrize(("quantization", "error"), [("8bit", 0.02), ("4bit", 0.15)])
def test_quantised_weights_compute_nearly_the_same(tmp_path: Path, quantization: str, error: float) -> None:
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the optional package '{package}' is not installed")
    # Widths that bitsandbytes packs on every device.
    make_llama(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    # One linear map of exact inputs: deeper, random layers amplify any error.
    rounded, exact = (
        activations("lm.0.v", model=str(tmp_path), **settings) for settings in ({"quantization": quantization}, {})
    )
    assert 0 < (rounded.float() - exact).norm() < error * exact.norm()


def test_each_rank_of_torchrun_takes_its_own_gpu(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the message is that of a machine without GPUs")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ModelError, match="device 'cuda:3' cannot be used"):
        ModelChoice(model=str(llama_folder), device="cuda").load()
    with pytest.raises(ModelError, match="device 'cuda:1' cannot be used"):
        ModelChoice(model=str(llama_folder), device="cuda:1").load()
