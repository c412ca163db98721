"""Every supported architecture, as a tiny random model: sites, batches, replaced MLPs, generation, capture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.hooks import attach
from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings
from clt.errors import ModelError
from clt.records import Modality

from ..test_run import natural_rows
from ..tiny_models import IMAGE_PROCESSORS, MODELS, make_adapter, picture, prompt_for

LAYER = 1
#: Longer than Gemma's window of 8.
LONG = "the cat sat on a red mat what is the blue cat ?"


@pytest.fixture(scope="module", params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(name: str) -> ModelAdapter:
    return make_adapter(name)


@pytest.fixture(scope="module")
def prompts(name: str, adapter: ModelAdapter) -> list[PromptInputs]:
    return make_prompts(name, adapter)


def make_prompts(name: str, adapter: ModelAdapter) -> list[PromptInputs]:
    """Without an image, with one and with two, of different sizes; text models get text of these lengths."""
    if name not in IMAGE_PROCESSORS:
        return [adapter.prepare(text) for text in ("the cat", LONG, "what is red ?")]
    pictures = [[], [picture(48, 32)], [picture(32, 64), picture(32, 32)]]
    texts = zip((LONG, "the cat", "what is red ?"), pictures, strict=True)
    return [adapter.prepare(prompt_for(name, text, len(images)), images) for text, images in texts]


@pytest.fixture(scope="module")
def batch(adapter: ModelAdapter, prompts: list[PromptInputs]) -> PromptInputs:
    return adapter.collate(prompts)


def named_parts(name: str, layer: Any) -> dict[str, tuple[nn.Module, bool]]:
    """Kind of site -> module by the name that the architecture gives it, and whether the site is its output."""
    if name == "gpt2":
        norm, attn, attn_out, mlp_out = layer.ln_2, layer.attn, layer.attn, layer.mlp
    elif name.startswith("gemma"):
        norm, attn = layer.pre_feedforward_layernorm, layer.self_attn
        attn_out, mlp_out = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    else:
        norm, attn, attn_out, mlp_out = layer.post_attention_layernorm, layer.self_attn, layer.self_attn, layer.mlp
    heads = attn.c_proj if name == "gpt2" else attn.o_proj
    return {
        "resid_pre": (layer, False),
        "z": (heads, False),
        "attn_out": (attn_out, True),
        "resid_mid": (norm, False),
        "mlp_in": (layer.mlp, False),
        "mlp_out": (mlp_out, True),
        "resid_post": (layer, True),
    }


def plain_hooks(adapter: ModelAdapter, inputs: PromptInputs, parts: dict[str, tuple[nn.Module, bool]]) -> Any:
    found: dict[str, Tensor] = {}
    handles = []
    for kind, (module, of_output) in parts.items():

        def hook(
            _module: nn.Module, args: Any, kwargs: Any, output: Any, kind: str = kind, out: bool = of_output
        ) -> None:
            value = output if out else (args[0] if args else kwargs["hidden_states"])
            found[kind] = (value[0] if isinstance(value, tuple) else value).clone()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    adapter.forward(inputs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_sites_are_bit_equal_to_plain_hooks(name: str, adapter: ModelAdapter, batch: PromptInputs) -> None:
    parts = named_parts(name, adapter.layers[LAYER])
    del parts["z"]  # in another attention function: see below
    expected = plain_hooks(adapter, batch, parts)
    with attach(adapter, [f"lm.{LAYER}.{kind}" for kind in parts]) as found:
        adapter.forward(batch)
    for kind in parts:
        assert torch.equal(found[f"lm.{LAYER}.{kind}"], expected[kind]), kind
    at = {kind: found[f"lm.{LAYER}.{kind}"] for kind in parts}
    assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
    assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])


@torch.no_grad()
def test_sites_inside_attention_equal_its_values(name: str, adapter: ModelAdapter, batch: PromptInputs) -> None:
    before, parts = adapter.forward(batch), named_parts(name, adapter.layers[LAYER])
    with attach(adapter, ["lm.*.[qkvz]", "lm.*.pattern", "lm.*.scores"]) as found:
        plain = plain_hooks(adapter, batch, {"z": parts["z"]})["z"]
        logits = adapter.forward(batch)
    # float32 and another order of summation
    torch.testing.assert_close(logits[batch.real_mask], before[batch.real_mask], atol=5e-5, rtol=1e-5)
    q, k, v, z, pattern, scores = (found[f"lm.{LAYER}.{kind}"] for kind in ("q", "k", "v", "z", "pattern", "scores"))
    n, s = batch.real_mask.shape
    assert q.shape == z.shape == (n, adapter.n_heads, s, adapter.head_dim)
    assert k.shape == v.shape == (n, adapter.n_kv_heads, s, adapter.head_dim)
    assert scores.shape == pattern.shape == (n, adapter.n_heads, s, s)
    assert torch.equal(z.transpose(1, 2).flatten(2), plain)
    groups = adapter.n_heads // adapter.n_kv_heads
    torch.testing.assert_close(pattern @ v.repeat_interleave(groups, dim=1), z)
    attends = pattern[0, 0][batch.real_mask[0]] > 0
    assert not attends[:, ~batch.real_mask[0]].any()
    # The attention of a head follows from its scores.
    of_scores = scores[0, 0][batch.real_mask[0]].masked_fill(~attends, -torch.inf).softmax(-1)
    torch.testing.assert_close(pattern[0, 0][batch.real_mask[0]], of_scores)


@torch.no_grad()
def test_gemmas_sliding_layers_see_their_window_only() -> None:
    for name in ("gemma2", "gemma3_text"):
        adapter = make_adapter(name)
        with attach(adapter, ["lm.*.pattern"]) as found:
            adapter.forward(adapter.prepare(LONG))
        for layer, first_seen in ((0, 6), (1, 0)):
            last = found[f"lm.{layer}.pattern"][0, 0, -1]
            assert (len(last), int(last.nonzero()[0])) == (14, first_seen)


@torch.no_grad()
def test_vision_sites_and_bridges_are_recorded_and_edited(
    name: str, adapter: ModelAdapter, batch: PromptInputs
) -> None:
    sites = [site for site in adapter.site_names() if not site.startswith("lm.")]
    assert bool(sites) == (name in IMAGE_PROCESSORS)
    if not sites:
        return
    before = adapter.forward(batch)
    heads = adapter.structure.vision_blocks[0].o_proj
    with attach(adapter, sites) as found:
        plain = plain_hooks(adapter, batch, {"z": (heads, False)})["z"]
        logits = adapter.forward(batch)
    torch.testing.assert_close(logits[batch.real_mask], before[batch.real_mask], atol=5e-5, rtol=1e-5)
    assert set(found) == set(sites)
    z = found["vision.0.z"]
    # Qwen's towers run the patches of all images as one sequence, without a batch axis outside attention.
    assert torch.equal(z.transpose(1, 2).flatten(2), plain[None] if plain.dim() == 2 else plain)
    torch.testing.assert_close(found["vision.0.pattern"] @ found["vision.0.v"], z)
    torch.testing.assert_close(found["vision.0.pattern"].sum(-1), torch.ones(z.shape[:-1]))
    scale = z.shape[-1] ** -0.5
    torch.testing.assert_close(found["vision.0.q"] @ found["vision.0.k"].mT * scale, found["vision.0.scores"])
    at = {kind: found[f"vision.0.{kind}"] for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")}
    assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
    assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
    assert torch.equal(found["vision.1.resid_pre"], at["resid_post"])
    with_images = (batch.tokens.modality == Modality.IMAGE).any(1)
    for site in (
        *(f"vision.0.{kind}" for kind in ("q", "k", "v", "scores", "pattern", "z", "resid_mid")),
        "vision.1.resid_post",
        *(site for site in sites if site.startswith("bridge")),
    ):
        with attach(adapter, edit={site: lambda value: value * torch.linspace(0, 2, value.shape[-1])}):
            moved = (adapter.forward(batch) - before).abs().amax((1, 2)) > 1e-3
        assert torch.equal(moved, with_images), site


@pytest.mark.parametrize(
    ("name", "block", "sizes"),
    [
        # Pictures of 8x12, 16x8 and 8x8 patches.
        ("qwen2_vl", 0, [96, 128, 64]),
        ("qwen3_vl", 1, [96, 128, 64]),
        # Windows of 4x4 patches, in the first block only.
        ("qwen2_5_vl", 0, [16] * 18),
        ("qwen2_5_vl", 1, [96, 128, 64]),
    ],
)
@torch.no_grad()
def test_packed_towers_attend_within_images_and_windows(name: str, block: int, sizes: list[int]) -> None:
    adapter = make_adapter(name)
    batch = adapter.collate(make_prompts(name, adapter))
    assert batch.model_inputs["image_grid_thw"].tolist() == [[1, 8, 12], [1, 16, 8], [1, 8, 8]]
    with attach(adapter, [f"vision.{block}.pattern"]) as found, attach(adapter, [f"vision.{block}.z"]):
        adapter.forward(batch)
    blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)) > 0
    assert torch.equal(found[f"vision.{block}.pattern"][0, 1] > 0, blocks)


@torch.no_grad()
def test_a_padded_batch_equals_single_prompts(
    adapter: ModelAdapter, batch: PromptInputs, prompts: list[PromptInputs]
) -> None:
    sites = [f"lm.{layer}.{kind}" for layer in range(adapter.n_layers) for kind in ("resid_mid", "mlp_out")]
    with attach(adapter, sites) as together:
        logits = adapter.forward(batch)
    for row, prompt in enumerate(prompts):
        with attach(adapter, sites) as alone:
            expected = adapter.forward(prompt)
        length = expected.shape[1]
        assert int(batch.real_mask[row].sum()) == length
        # float32 and another order of summation
        torch.testing.assert_close(logits[row, -length:], expected[0], atol=5e-5, rtol=1e-4)
        for site in sites:
            torch.testing.assert_close(together[site][row, -length:], alone[site][0], atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_mlps_replaced_by_their_own_outputs_leave_the_logits_alone(
    adapter: ModelAdapter, batch: PromptInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [f"lm.{layer}.mlp_out" for layer in range(adapter.n_layers)]
    with attach(adapter, sites) as found:
        before = adapter.forward(batch)
    recorded = {site: value.clone() for site, value in found.items()}
    for layer in range(adapter.n_layers):
        monkeypatch.setattr(adapter.mlp(layer), "forward", torch.zeros_like)
    without = adapter.forward(batch)
    with attach(adapter, edit={site: lambda _, y=recorded[site]: y for site in sites}):
        replaced = adapter.forward(batch)
    real = batch.real_mask
    torch.testing.assert_close(replaced[real], before[real], atol=1e-5, rtol=0)
    assert (without[real] - before[real]).abs().max() > 0.1, "the MLPs do something"


@torch.no_grad()
def test_generation_with_a_cache_is_the_greedy_continuation(
    adapter: ModelAdapter, batch: PromptInputs, prompts: list[PromptInputs]
) -> None:
    before = adapter.forward(prompts[0])
    generated = adapter.generate(batch, 5)
    assert torch.equal(adapter.forward(prompts[0]), before), "a generation leaves nothing behind in the model"
    n_new = max(map(len, generated))
    ids = torch.tensor([row + [0] * (n_new - len(row)) for row in generated])
    # One forward without cache over prompts and answers; tokens after an answer's end are ignored.
    whole = dict(batch.model_inputs)
    for key, new in (
        ("input_ids", ids),
        ("attention_mask", torch.ones_like(ids)),
        ("position_ids", batch.real_mask.sum(1, keepdim=True) + torch.arange(n_new)),
        ("mm_token_type_ids", torch.zeros_like(ids)),
        ("token_type_ids", torch.zeros_like(ids)),
    ):
        if key in whole:
            whole[key] = torch.cat([whole[key], new], 1)
    logits = adapter.model(**whole, use_cache=False).logits[:, -n_new - 1 :]
    for row, answer in enumerate(generated):
        for step, token in enumerate(answer):
            assert logits[row, step, token] >= logits[row, step].max() - 1e-4, (row, step)
        assert len(answer) == 5 or answer[-1] == adapter.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("lm.*.mlp_ot", "lm.0.mlp_out"), ("lm.7.resid_mid", "lm.1.resid_mid"), ("decoder.*.mlp_out", "lm.0.mlp_out")],
)
def test_a_pattern_that_matches_nothing_lists_near_names(adapter: ModelAdapter, pattern: str, near: str) -> None:
    with pytest.raises(ModelError, match=r"unknown site.*did you mean") as error, attach(adapter, [pattern]):
        pass
    assert near in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_a_saved_model_is_loaded_and_captured(name: str, tmp_path: Path) -> None:
    made = make_adapter(name)
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    records: list[dict[str, object]] = [{"prompt": LONG, "answer": "red"}, {"prompt": "the cat"}]
    if name in IMAGE_PROCESSORS:
        made.image_processor.save_pretrained(tmp_path / "model")
        for size in ((48, 32), (32, 64)):
            picture(*size).save(tmp_path / f"{size[0]}.png")
        records += [{"prompt": prompt_for(name, "what is red ?", 2), "image": ["48.png", "32.png"]}]
        records += [{"prompt": prompt_for(name, "the", 1), "image": "32.png", "answer": "blue"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = CaptureConfig(
        model=str(tmp_path / "model"),
        output=str(tmp_path / "store"),
        source=SourceSettings(jsonl=JsonlSource(file=file)),
        store_dtype="float32",
        rows_per_unit=256,
    )
    capture_store(config)
    # Its own tokenizer: transformers always splits words as Qwen2 does.
    adapter = config.load()
    assert adapter.identity.fingerprint == made.identity.fingerprint
    assert torch.equal(adapter.forward(made.prepare(LONG)), made.forward(made.prepare(LONG)))
    store, job = open_store(config.output), plan_capture(config, adapter)
    acts, tokens = natural_rows(store)
    first = 0
    for sample, length in enumerate(job.lengths):
        example = job.source.load(sample)
        inputs = adapter.prepare(example.prompt, example.images, example.answer)
        with attach(adapter, store.sites) as found:
            adapter.forward(inputs)
        expected = torch.stack([found[site][0] for site in store.sites], dim=1)
        # float32; padding and batching change the order of summation
        torch.testing.assert_close(acts[first : first + length], expected, atol=5e-5, rtol=1e-4)
        assert torch.equal(tokens["patch_row"][first : first + length], inputs.tokens.patch_row[0])
        assert store.sample(sample, store.sites).answer_tokens == length - int(inputs.answer_start)
        first += length
    assert first == len(acts)
