"""`register_adapter`: the examples of docs/models.md work, and models without a plain residual stream are an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

from clt.capture.models import architectures
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.architectures import register_adapter
from clt.capture.models.hooks import attach
from clt.errors import ModelError

from ..tiny_models import VOCABULARY, make_words

DOCS = Path(__file__).resolve().parents[3] / "docs" / "models.md"
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes registrations after each test."""
    monkeypatch.setattr(architectures, "_architectures", dict(architectures._architectures))


def neox(**changes: Any) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_hidden_layers=2, initializer_range=0.2, **changes))


def register_as_in_the_docs() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "gpt_neox" in block)
    exec(compile(code, str(DOCS), "exec"), {})


@torch.no_grad()
def test_example_of_the_docs_captures_gpt_neox() -> None:
    model = neox(use_parallel_residual=False)
    with pytest.raises(ModelError, match="GPTNeoXForCausalLM is not supported"):
        ModelAdapter(model, make_words())
    register_as_in_the_docs()
    adapter = ModelAdapter(model, make_words())
    inputs = adapter.prepare("the cat sat on a mat")
    seen: list[torch.Tensor] = []
    handle = model.gpt_neox.layers[1].mlp.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with attach(adapter, ["lm.1.mlp_out", "lm.1.pattern"]) as found:
        adapter.forward(inputs)
    handle.remove()
    assert torch.equal(found["lm.1.mlp_out"], seen[0])
    torch.testing.assert_close(found["lm.1.pattern"].sum(-1), torch.ones(1, 2, 7))


def test_parallel_branches_are_refused() -> None:
    register_as_in_the_docs()
    with pytest.raises(
        ModelError, match="of attention is not added unchanged to the residual stream in layer 0"
    ) as error:
        ModelAdapter(neox(use_parallel_residual=True), make_words())
    assert "\n" not in str(error.value)


def test_a_scaled_branch_is_refused() -> None:
    register_as_in_the_docs()
    model = neox(use_parallel_residual=False)
    model.gpt_neox.layers[1].post_mlp_dropout.register_forward_hook(lambda _module, _args, output: 0.5 * output)
    with pytest.raises(ModelError, match="of the MLP is not added unchanged to the residual stream in layer 1"):
        ModelAdapter(model, make_words())


@torch.no_grad()
def test_usual_names_need_no_description() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=1, sliding_window=4))
    register_adapter("MistralForCausalLM")
    adapter = ModelAdapter(model, make_words())
    inputs = adapter.prepare("the cat sat on a mat")
    before = adapter.forward(inputs)
    with attach(adapter, ["lm.*.z"]) as found:
        # float32 and another order of summation
        torch.testing.assert_close(adapter.forward(inputs), before, atol=1e-5, rtol=1e-5)
    assert list(found) == ["lm.0.z", "lm.1.z"]


def test_unusual_names_are_an_error() -> None:
    register_adapter("GPTNeoXForCausalLM")
    with pytest.raises(ModelError, match="no module 'self_attn or attn'"):
        ModelAdapter(neox(), make_words())
