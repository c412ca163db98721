"""The linear model against autograd through the real modules, and its errors for unsupported models."""

import copy
from dataclasses import replace

import pytest
import torch

from clt.attribution.replacement.frozen_model import record
from clt.attribution.replacement.linear_model import LinearModel
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.errors import GraphError, ModelError

#: Float64 sums of some hundred terms of size 1 to 100.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(scope="module")
def adapter(make_tiny_llama):
    return make_tiny_llama()


@pytest.fixture(scope="module")
def inputs(adapter):
    return adapter.prepare("c l t o f a m o d e l")


def changed(adapter, change):
    """A copy of the model after `change(model)`."""
    model = copy.deepcopy(adapter.model)
    change(model)
    return ModelAdapter(model, adapter)


def test_record_splits_the_residual_stream_into_branches(adapter, inputs):
    found = record(adapter, inputs, "mlp_in")
    after = torch.cat([found.resid_pre[1:], found.final[None]])
    torch.testing.assert_close(found.resid_mid + found.mlp_out, after, **EXACT)
    torch.testing.assert_close(found.embed, found.resid_pre[0])
    torch.testing.assert_close(found.pattern.sum(-1), torch.ones_like(found.pattern[..., 0]), **EXACT)
    normed = torch.stack([adapter.mlp_norm(layer)(found.resid_mid[layer]) for layer in range(3)])
    torch.testing.assert_close(found.read, normed, **EXACT)


def test_record_refuses_two_prompts_and_padding(adapter, inputs):
    with pytest.raises(GraphError, match="one prompt at a time"):
        record(adapter, adapter.collate([inputs, inputs]), "resid_mid")
    padded = adapter.collate([adapter.prepare("a"), inputs])
    with pytest.raises(GraphError, match="padding"):
        record(adapter, replace(padded, prompts=padded.prompts[:1]), "resid_mid")


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("reach", [5, 12])
def test_pull_attention_equals_autograd_with_frozen_pattern_and_denominators(adapter, inputs, layer, reach):
    linear = LinearModel(adapter, record(adapter, inputs, "resid_mid"))
    x_SD = linear.recording.resid_pre[layer].clone().requires_grad_()
    attention, norm = adapter.attn(layer), adapter.attn_norm(layer)
    rotary = adapter.decoder.rotary_emb(x_SD[None], torch.arange(12)[None])

    def branch(x_SD):
        denominator = torch.rsqrt(linear.recording.resid_pre[layer].square().mean(-1, keepdim=True) + norm.eps)
        normed = x_SD * denominator * norm.weight
        with attach(adapter, edit={f"lm.{layer}.pattern": lambda p: linear.recording.pattern[layer][None]}):
            return x_SD + attention(normed[None], position_embeddings=rotary, attention_mask=None)[0][0]

    G_BSD = torch.zeros(3, 12, 24, dtype=torch.float64)
    G_BSD[:, :reach] = torch.randn(3, reach, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [torch.autograd.grad(branch(x_SD), x_SD, G_SD, retain_graph=False)[0] for G_SD in G_BSD]
    pulled, _ = linear.pull_attention(layer, G_BSD[:, :reach])
    torch.testing.assert_close(pulled, torch.stack(expected)[:, :reach], **EXACT)
    assert not torch.stack(expected)[:, reach:].any(), "later positions cannot be reached"


def test_linear_model_is_causal(adapter, inputs):
    linear = LinearModel(adapter, record(adapter, inputs, "resid_mid"))
    assert linear.is_causal
    assert linear.reach(torch.tensor([2, 6, 4])) == 7


def test_attention_bias_equals_the_output_at_input_zero(adapter, inputs):
    linear = LinearModel(adapter, record(adapter, inputs, "resid_mid"))
    zeros = torch.zeros(1, 12, 24, dtype=torch.float64)
    rotary = adapter.decoder.rotary_emb(zeros, torch.arange(12)[None])
    for layer in range(3):
        output = adapter.attn(layer)(zeros, position_embeddings=rotary, attention_mask=None)[0][0]
        torch.testing.assert_close(output, linear.attention_bias(layer).expand(12, -1), **EXACT)


def layer_norm(model):
    model.model.norm = torch.nn.LayerNorm(24, dtype=torch.float64)


def shifted_norm(model):
    class Shifted(torch.nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + x * self.weight.new_tensor(0.01)

    model.model.layers[1].input_layernorm = Shifted(24, dtype=torch.float64)


def scaled_logits(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)


def norm_after_attention(model):
    norm = torch.nn.RMSNorm(24, dtype=torch.float64)
    projection = model.model.layers[1].self_attn.o_proj
    projection.register_forward_hook(lambda module, args, output: norm(output))


def scaled_residual(model):
    model.model.layers[2].register_forward_hook(lambda module, args, output: 0.7 * output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (layer_norm, "LayerNorm"),
        (shifted_norm, "Shifted"),
        (scaled_logits, "the logits"),
        (norm_after_attention, "the attention of layer 1"),
        (scaled_residual, "the residual stream after layer 2"),
    ],
)
def test_linear_model_refuses_an_architecture_it_does_not_reproduce(adapter, inputs, change, message):
    other = changed(adapter, change)
    with pytest.raises(ModelError, match=message) as error:
        LinearModel(other, record(other, inputs, "resid_mid"))
    assert "\n" not in str(error.value)


def test_linear_model_works_in_float32_for_a_bfloat16_model(make_tiny_llama):
    adapter = make_tiny_llama(dtype=torch.bfloat16)
    linear = LinearModel(adapter, record(adapter, adapter.prepare("a b c"), "resid_mid"))
    assert linear.dtype == linear.attn_scale[0].dtype == torch.float32
