"""Sites: recorded tensors equal plain forward hooks, and edits act downstream as direct edits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.hooks import attach
from clt.capture.models.sites import SiteKind, decoder_site, decoder_sites
from clt.errors import ModelError

from ..conftest import make_llama, make_tokenizer

LAYER = 1
BRANCH_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@pytest.fixture
def inputs(llava: ModelAdapter) -> PromptInputs:
    """Two prompts of different lengths, one with an image."""
    image = Image.linear_gradient("L").convert("RGB")
    prompts = [llava.prepare("the cat sat on a mat"), llava.prepare("what is <image> ?", [image], answer="red")]
    return llava.collate(prompts)


def plain_hooks(adapter: ModelAdapter, inputs: PromptInputs) -> dict[str, Tensor]:
    """The same tensors by ordinary forward hooks."""
    layer: Any = adapter.layers[LAYER]
    found: dict[str, Tensor] = {}
    handles = []

    def record(module: nn.Module, name: str, of_output: bool) -> None:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = output if of_output else (args[0] if args else kwargs["hidden_states"])
            found[name] = value[0] if isinstance(value, tuple) else value

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    record(adapter.layers[0], "lm.embed", False)
    record(layer, f"lm.{LAYER}.resid_pre", False)
    record(layer.self_attn, f"lm.{LAYER}.attn_out", True)
    record(layer.post_attention_layernorm, f"lm.{LAYER}.resid_mid", False)
    record(layer.mlp, f"lm.{LAYER}.mlp_in", False)
    record(layer.mlp, f"lm.{LAYER}.mlp_out", True)
    record(layer, f"lm.{LAYER}.resid_post", True)
    record(adapter.final_norm, "lm.final", False)
    adapter.forward(inputs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_recording_is_bit_equal_to_plain_hooks(llava: ModelAdapter, inputs: PromptInputs) -> None:
    expected = plain_hooks(llava, inputs)
    with attach(llava, expected) as recorded:
        llava.forward(inputs)
    assert set(recorded) == set(expected)
    for site in expected:
        assert torch.equal(recorded[site], expected[site]), site


@torch.no_grad()
def test_recording_leaves_the_logits_alone(llava: ModelAdapter, inputs: PromptInputs) -> None:
    before = llava.forward(inputs)
    with attach(llava, [f"lm.{LAYER}.{kind}" for kind in BRANCH_SITES]):
        assert torch.equal(llava.forward(inputs), before)


@torch.no_grad()
def test_sites_obey_the_equations_of_the_block(llava: ModelAdapter, inputs: PromptInputs) -> None:
    with attach(llava, llava.site_names()) as r:
        logits = llava.forward(inputs)
    assert torch.equal(r["lm.embed"], r["lm.0.resid_pre"])
    for layer in range(llava.n_layers):
        at = {kind: r[f"lm.{layer}.{kind}"] for kind in (*BRANCH_SITES, "scores", "pattern", "z")}
        n, h, s, d = at["z"].shape
        assert (h, d) == (4, 12)
        assert at["scores"].shape == at["pattern"].shape == (n, h, s, s)
        assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        assert torch.equal(at["mlp_in"], llava.mlp_norm(layer)(at["resid_mid"]))
        assert torch.equal(at["mlp_out"], llava.mlp(layer)(at["mlp_in"]))
        assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
        values = llava.v_proj(layer)(llava.attn_norm(layer)(at["resid_pre"]))
        values = values.view(n, s, 2, d).transpose(1, 2).repeat_interleave(2, dim=1)
        torch.testing.assert_close(at["z"], at["pattern"] @ values)
        torch.testing.assert_close(at["attn_out"], llava.o_proj(layer)(at["z"].transpose(1, 2).flatten(2)))
        torch.testing.assert_close(at["pattern"].sum(-1), torch.ones(n, h, s))
    assert torch.equal(r["lm.final"], r["lm.2.resid_post"])
    assert torch.equal(llava.lm_head(llava.final_norm(r["lm.final"])), logits)


@torch.no_grad()
def test_own_attention_gives_the_logits_of_sdpa(llava: ModelAdapter, inputs: PromptInputs) -> None:
    expected = llava.forward(inputs)
    with attach(llava, ["lm.0.pattern"]):
        found = llava.forward(inputs)
    # float32 and another order of summation
    torch.testing.assert_close(found[inputs.real_mask], expected[inputs.real_mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_own_attention_keeps_float64(llama64: ModelAdapter) -> None:
    inputs = llama64.prepare("the cat sat on a mat")
    expected = llama64.forward(inputs)
    with attach(llama64, ["lm.0.pattern"]) as recorded:
        found = llama64.forward(inputs)
    torch.testing.assert_close(recorded["lm.0.pattern"].sum(-1), torch.ones(1, 4, 7).double(), atol=1e-15, rtol=0)
    # RMSNorm rounds to float32 inside transformers, so a last-bit change may flip such a rounding.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_own_attention_is_causal_and_blind_to_padding(llava: ModelAdapter, inputs: PromptInputs) -> None:
    with attach(llava, ["lm.0.pattern", "lm.2.pattern"]) as recorded:
        llava.forward(inputs)
    for pattern in recorded.values():
        assert pattern.triu(1)[inputs.real_mask[:, None, :, None].expand_as(pattern)].abs().max() == 0
        pad = ~inputs.real_mask
        to_padding = pattern * pad[:, None, None, :] * inputs.real_mask[:, None, :, None]
        assert to_padding.abs().max() == 0


@torch.no_grad()
def test_vision_tower_keeps_its_attention(llava: ModelAdapter, inputs: PromptInputs) -> None:
    config = llava.model.config
    with attach(llava, ["lm.0.z"]):
        assert config.vision_config._attn_implementation == "sdpa"
        assert config.text_config._attn_implementation != "sdpa"
    assert config.text_config._attn_implementation == "sdpa"


def run_from(adapter: ModelAdapter, layer: int, resid_pre: Tensor, inputs: PromptInputs) -> Tensor:
    """Logits of the blocks from `layer` on, computed directly, for one prompt without padding."""
    positions = inputs.model_inputs["position_ids"]
    rotary = adapter.decoder.rotary_emb(resid_pre, position_ids=positions)
    hidden = resid_pre
    for block in adapter.layers[layer:]:
        hidden = block(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
    return adapter.lm_head(adapter.final_norm(hidden))


@pytest.mark.parametrize("kind", [*BRANCH_SITES, "scores", "pattern", "z", "embed", "final"])
@torch.no_grad()
def test_edit_changes_downstream_as_by_hand(llama: ModelAdapter, kind: str) -> None:
    inputs = llama.prepare("the cat sat on a mat")
    site = f"lm.{kind}" if kind in ("embed", "final") else f"lm.{LAYER}.{kind}"
    kinds = ("resid_pre", "resid_mid", "pattern", "z")
    with attach(llama, [*(f"lm.{LAYER}.{k}" for k in kinds), "lm.embed", "lm.final", site]) as clean:
        before = llama.forward(inputs)
    delta = torch.randn(clean[site].shape, generator=torch.Generator().manual_seed(3))
    edited = clean[site] + delta
    with attach(llama, [site], {site: lambda value: value + delta}) as recorded:
        logits = llama.forward(inputs)
    torch.testing.assert_close(recorded[site], edited, atol=1e-5, rtol=1e-5)

    pre, mid = clean[f"lm.{LAYER}.resid_pre"], clean[f"lm.{LAYER}.resid_mid"]
    mlp, norm, o_proj = llama.mlp(LAYER), llama.mlp_norm(LAYER), llama.o_proj(LAYER)
    heads = llama.v_proj(LAYER)(llama.attn_norm(LAYER)(pre)).view(1, 7, 2, 12).transpose(1, 2)
    values = heads.repeat_interleave(2, dim=1)

    def after_attention(attn_out: Tensor) -> Tensor:
        return pre + attn_out + mlp(norm(pre + attn_out))

    def from_z(z: Tensor) -> Tensor:
        return after_attention(o_proj(z.transpose(1, 2).flatten(2)))

    if kind == "embed":
        expected = llama.model(inputs_embeds=edited, use_cache=False).logits
    elif kind == "final":
        expected = llama.lm_head(llama.final_norm(edited))
    elif kind == "resid_pre":
        expected = run_from(llama, LAYER, edited, inputs)
    else:
        causal = torch.full((7, 7), float("-inf")).triu(1)
        resid_post = {
            "attn_out": lambda: after_attention(edited),
            "resid_mid": lambda: edited + mlp(norm(edited)),
            "mlp_in": lambda: mid + mlp(edited),
            "mlp_out": lambda: mid + edited,
            "resid_post": lambda: edited,
            "scores": lambda: from_z((edited + causal).softmax(-1) @ values),
            "pattern": lambda: from_z(edited @ values),
            "z": lambda: from_z(edited),
        }[kind]()
        expected = run_from(llama, LAYER + 1, resid_post, inputs)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert (logits - before).abs().max() > 1e-2, "the edit did something"


def test_gradients_flow_through_recorded_and_edited_sites(llama64: ModelAdapter) -> None:
    inputs = llama64.prepare("the cat sat")
    leaf: list[Tensor] = []

    def start(value: Tensor) -> Tensor:
        leaf.append(value.detach().requires_grad_())
        return leaf[0]

    edits = {"lm.1.resid_pre": start, "lm.1.resid_mid": lambda value: value * value}
    with attach(llama64, ["lm.1.attn_out"], edits) as recorded:
        llama64.forward(inputs).square().sum().backward()
    resid_pre = leaf[0].detach().clone().requires_grad_()
    mid = (resid_pre + run_attention(llama64, resid_pre, inputs)) ** 2
    post = mid + llama64.mlp(1)(llama64.mlp_norm(1)(mid))
    run_from(llama64, 2, post, inputs).square().sum().backward()
    torch.testing.assert_close(leaf[0].grad, resid_pre.grad, atol=1e-4, rtol=1e-4)
    assert recorded["lm.1.attn_out"].requires_grad


def run_attention(adapter: ModelAdapter, resid_pre: Tensor, inputs: PromptInputs) -> Tensor:
    positions = inputs.model_inputs["position_ids"]
    rotary = adapter.decoder.rotary_emb(resid_pre, position_ids=positions)
    return adapter.attn(1)(adapter.attn_norm(1)(resid_pre), position_embeddings=rotary, attention_mask=None)[0]


@torch.no_grad()
def test_everything_is_restored_after_an_exception(llama: ModelAdapter) -> None:
    inputs = llama.prepare("the cat sat")
    before = llama.forward(inputs)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())

    n_hooks = hooks()

    def fail(value: Tensor) -> Tensor:
        raise RuntimeError("edit failed")

    for site in ("lm.1.resid_mid", "lm.1.pattern"):
        with pytest.raises(RuntimeError, match="edit failed"), attach(llama, ["lm.0.z", "lm.2.mlp_out"], {site: fail}):
            llama.forward(inputs)
        assert hooks() == n_hooks
        assert llama.decoder.config._attn_implementation == "sdpa"
        assert torch.equal(llama.forward(inputs), before)


@torch.no_grad()
def test_nothing_is_attached_when_a_site_is_unknown(llama: ModelAdapter) -> None:
    with pytest.raises(ModelError, match=r"did you mean .*lm\.1\.mlp_out"), attach(llama, ["lm.0.z", "lm.1.mlp_ot"]):
        pass
    assert llama.decoder.config._attn_implementation == "sdpa"
    assert not llama.attn(0)._forward_hooks


@torch.no_grad()
def test_edit_of_another_shape_or_type_is_an_error(llama: ModelAdapter) -> None:
    inputs = llama.prepare("the cat")
    for edit in (lambda value: value[:, :1], lambda value: value.double()):
        with pytest.raises(ModelError, match=r"edit of lm\.1\.z returned"), attach(llama, edit={"lm.1.z": edit}):
            llama.forward(inputs)


@torch.no_grad()
def test_nested_blocks_act_from_the_inside_out(llama: ModelAdapter) -> None:
    inputs = llama.prepare("the cat sat")
    for site in ("lm.1.mlp_out", "lm.1.resid_mid", "lm.1.z"):
        with attach(llama, [site]) as clean:
            llama.forward(inputs)
        with (
            attach(llama, [site], {site: lambda value: value + 1}) as outer,
            attach(llama, [site], {site: lambda value: value * 2}) as inner,
        ):
            llama.forward(inputs)
        expected = clean[site] * 2
        if site != "lm.1.resid_mid":  # written in place, so the inner recording shows the outer edit too
            torch.testing.assert_close(inner[site], expected)
        torch.testing.assert_close(outer[site], expected + 1)
        with attach(llama, [site]) as again:
            llama.forward(inputs)
        assert torch.equal(again[site], clean[site])


@torch.no_grad()
def test_transformers_own_recording_sees_edits(llama: ModelAdapter) -> None:
    inputs = llama.prepare("the cat sat")
    llama.model(**inputs.model_inputs, output_hidden_states=True)
    with attach(llama, edit={"lm.1.resid_post": torch.zeros_like}):
        states = llama.model(**inputs.model_inputs, output_hidden_states=True).hidden_states
    assert states[2].abs().max() == 0


@torch.no_grad()
def test_edits_act_in_every_step_of_generate(llama: ModelAdapter) -> None:
    inputs = llama.collate([llama.prepare("the cat"), llama.prepare("the cat sat on a mat")])
    plain = llama.generate(inputs, 5)
    calls: list[tuple[int, ...]] = []

    def to_red(value: Tensor) -> Tensor:
        calls.append(tuple(value.shape[:2]))
        return llama.lm_head.weight[11].expand_as(value) * 100  # type: ignore[index]

    with attach(llama, ["lm.0.pattern"]) as recorded:
        assert llama.generate(inputs, 5) == plain
    with attach(llama, ["lm.0.pattern"], {"lm.final": to_red}) as recorded:
        generated = llama.generate(inputs, 5)
    best = int((llama.lm_head.weight @ llama.final_norm(llama.lm_head.weight[11] * 100)).argmax())  # type: ignore[operator, index]
    assert generated == [[best] * 5] * 2
    assert calls == [(2, 7)] + [(2, 1)] * 4
    assert recorded["lm.0.pattern"].shape == (2, 4, 1, 11)


@torch.no_grad()
def test_two_models_do_not_share_sites(llama: ModelAdapter) -> None:
    other = ModelAdapter(make_llama(num_hidden_layers=1), make_tokenizer())
    inputs = other.prepare("the cat")
    before = other.forward(inputs)
    with attach(llama, edit={"lm.0.z": torch.zeros_like}), attach(other, ["lm.0.z"]) as recorded:
        after = other.forward(inputs)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert recorded["lm.0.z"].abs().max() > 0


def test_decoder_sites_are_named_in_one_place(llava: ModelAdapter) -> None:
    names = [decoder_site(layer, kind) for layer in range(llava.n_layers) for kind in get_args(SiteKind)]
    assert [name for name in llava.site_names() if re.match(r"lm\.\d", name)] == names
    assert decoder_sites([2, 0], "mlp_out") == ["lm.2.mlp_out", "lm.0.mlp_out"]
    root = Path(__file__).resolve().parents[3]
    sources = (path for folder in ("capture", "attribution", "launch") for path in (root / folder).rglob("*.py"))
    by_hand = {path.name for path in sources if 'f"lm.' in path.read_text(encoding="utf-8")}
    assert by_hand == {"sites.py"}
