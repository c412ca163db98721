"""ModelAdapter: prompts and images to tensors, parts by name, generation, and error messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

from clt.capture.models import architectures
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.loading import identify
from clt.errors import InputError, ModelError
from clt.records import Modality

from ..conftest import make_llama, make_llava, make_processor, make_tokenizer

PROMPT = "USER: <image>\nwhat is this? ASSISTANT:"


def picture(color: str = "red", size: tuple[int, int] = (24, 24)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste((0, 255, 0), (8, 0, 16, 8))
    return image


def test_prepare_matches_the_models_own_processor(llava: ModelAdapter) -> None:
    images = [picture("red"), picture("blue", (40, 30))]
    prompt = "USER: <image> the <image>\nwhat is this?"
    ours = llava.prepare(prompt, images)
    theirs = make_processor()(text=[prompt], images=images, return_tensors="pt")
    assert torch.equal(ours.model_inputs["input_ids"], theirs["input_ids"])
    assert torch.equal(ours.model_inputs["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours.model_inputs["pixel_values"], theirs["pixel_values"])


def test_prepare_tells_image_tokens_from_text_with_row_and_column(llava: ModelAdapter) -> None:
    tokens = llava.prepare("the <image> cat <image>", [picture(), picture()]).tokens
    expected = [(Modality.BOS, -1, -1, -1), (Modality.TEXT, -1, -1, -1)]
    expected += [(Modality.IMAGE, row, col, 0) for row in range(3) for col in range(3)]
    expected += [(Modality.TEXT, -1, -1, -1)]
    expected += [(Modality.IMAGE, row, col, 1) for row in range(3) for col in range(3)]
    names = ("modality", "patch_row", "patch_col", "image")
    found = zip(*(getattr(tokens, name)[0].tolist() for name in names), strict=True)
    assert list(found) == expected
    assert tokens.position[0].tolist() == list(range(21))


def test_patch_rows_and_columns_are_those_of_the_picture(llava: ModelAdapter) -> None:
    plain = Image.new("RGB", (24, 24), "red")
    changed = plain.copy()
    changed.paste((0, 0, 255), (16, 0, 24, 8))
    tower = llava.model.get_encoder(modality="image")
    pixels = [llava.prepare("<image>", [image]).model_inputs["pixel_values"] for image in (plain, changed)]
    with torch.no_grad():
        patches = [tower.embeddings(p)[0, 1:] for p in pixels]
    differs = (patches[0] != patches[1]).any(1)
    tokens = llava.prepare("<image>", [plain]).tokens.select((0, slice(1, None)))
    assert differs.nonzero().flatten().tolist() == [2]
    assert (int(tokens.patch_row[2]), int(tokens.patch_col[2])) == (0, 2)


def test_class_token_is_marked_when_the_model_keeps_it() -> None:
    adapter = ModelAdapter(make_llava("full"), make_processor("full"))
    inputs = adapter.prepare("<image> cat", [picture()])
    theirs = make_processor("full")(text=["<image> cat"], images=[picture()], return_tensors="pt")
    assert torch.equal(inputs.model_inputs["input_ids"], theirs["input_ids"])
    assert inputs.tokens.modality[0, :3].tolist() == [Modality.BOS, Modality.IMAGE_SPECIAL, Modality.IMAGE]
    assert adapter.count_tokens("<image> cat", 1) == inputs.tokens.modality.shape[1] == 12
    adapter.forward(inputs)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("prompt", ["the cat", "<s> the cat", "<s><s> the cat"])
def test_prepare_puts_bos_first_exactly_once(adds_bos: bool, prompt: str) -> None:
    adapter = ModelAdapter(make_llama(), make_tokenizer(adds_bos))
    assert adapter.prepare(prompt).model_inputs["input_ids"].tolist() == [[1, 5, 6]]


def test_answer_tokens_follow_with_end_of_sequence(llava: ModelAdapter) -> None:
    plain = llava.prepare(PROMPT, [picture()])
    inputs = llava.prepare(PROMPT, [picture()], answer="red cat")
    length = plain.tokens.modality.shape[1]
    assert plain.answer_start.tolist() == [length]
    assert not plain.answer_mask.any()
    assert inputs.answer_start.tolist() == [length]
    assert inputs.model_inputs["input_ids"][0, length:].tolist() == [11, 6, 2]
    # The last prompt token predicts "red", "red" predicts "cat", "cat" predicts the end.
    assert inputs.answer_mask[0].nonzero().flatten().tolist() == [length - 1, length, length + 1]


def test_collate_pads_on_the_left_and_changes_no_logits(llava: ModelAdapter) -> None:
    short = llava.prepare("the cat")
    long = llava.prepare("the <image> cat <image>", [picture("red"), picture("blue")], answer="mat")
    both = llava.collate([short, long])
    pad = long.tokens.modality.shape[1] - short.tokens.modality.shape[1]
    assert both.tokens.modality[0].tolist() == [Modality.PAD] * pad + short.tokens.modality[0].tolist()
    assert both.tokens.position[0, :pad].tolist() == [-1] * pad
    assert both.answer_start.tolist() == [both.real_mask.shape[1], int(long.answer_start)]
    assert both.real_mask.sum(1).tolist() == [3, 23]
    with torch.no_grad():
        logits, alone, other = llava.forward(both), llava.forward(short), llava.forward(long)
    # Summation order differs with the batch, the values do not.
    torch.testing.assert_close(logits[0, pad:], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], other[0], atol=1e-5, rtol=1e-5)


def test_count_tokens_is_the_length_of_prepare(llava: ModelAdapter) -> None:
    for images, answer in (([], None), ([], "red"), ([picture()], "cat"), ([picture(), picture()], None)):
        prompt = "the" + " <image>" * len(images)
        inputs = llava.prepare(prompt, images, answer)
        assert llava.count_tokens(prompt, len(images), answer) == inputs.tokens.modality.shape[1]


def test_placeholders_must_match_images(llava: ModelAdapter, llama: ModelAdapter) -> None:
    with pytest.raises(InputError, match="has 1 image placeholders but 0 images"):
        llava.prepare(PROMPT)
    with pytest.raises(InputError, match="has 0 image placeholders but 1 images"):
        llava.prepare("the cat", [picture()])
    with pytest.raises(InputError, match="takes no images"):
        llama.prepare("the cat", [picture()])


def test_processor_of_another_size_is_an_error() -> None:
    adapter = ModelAdapter(make_llava(), make_processor(size=32))
    with pytest.raises(ModelError, match=r"makes 32x32 pixels, its vision tower takes 24x24"):
        adapter.prepare("<image>", [picture()])


def test_generate_is_the_greedy_continuation(llava: ModelAdapter) -> None:
    prompts = [llava.prepare("the cat"), llava.prepare(PROMPT, [picture()])]
    generated = llava.generate(llava.collate(prompts), 6)
    for inputs, new in zip(prompts, generated, strict=True):
        ids = inputs.model_inputs["input_ids"]
        for token in new:
            model_inputs = {k: v for k, v in inputs.model_inputs.items() if k == "pixel_values"}
            with torch.no_grad():
                logits = llava.model(input_ids=ids, **model_inputs, use_cache=False).logits
            assert int(logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert len(new) == 6 or new[-1] == llava.tokenizer.eos_token_id


def test_generate_ends_with_end_of_sequence(llama: ModelAdapter) -> None:
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[2] = 1.0
        llama.final_norm.weight.fill_(1.0)
        llama.layers[-1].register_forward_hook(lambda _m, _a, out: torch.ones_like(out))
    assert llama.generate(llama.prepare("the cat"), 5) == [[2]]


def test_generate_ends_with_any_end_of_the_models_own(llama: ModelAdapter) -> None:
    inputs = llama.prepare("the cat")
    free = llama.generate(inputs, 6)[0]
    assert len(free) == 6 and llama.end_ids == (2,)
    last = next(place for place in range(1, 6) if free[place] not in free[:place])
    llama.model.generation_config.eos_token_id = [2, free[last]]
    assert llama.end_ids == (2, free[last])
    # Beside a longer answer, tokens after the end are padding.
    together = llama.generate(llama.collate([inputs, llama.prepare("the cat sat on a mat")]), 6)
    assert together[0] == llama.generate(inputs, 6)[0] == free[: last + 1]


def test_model_is_frozen_in_eval_mode_with_sdpa(llava: ModelAdapter) -> None:
    assert not llava.model.training
    assert not any(p.requires_grad for p in llava.model.parameters())
    assert llava.model.config.text_config._attn_implementation == "sdpa"
    assert llava.model.config.vision_config._attn_implementation == "sdpa"


def test_parts_have_the_shapes_of_the_configuration(llava: ModelAdapter, llama: ModelAdapter) -> None:
    for adapter in (llava, llama):
        assert (adapter.n_layers, adapter.n_heads, adapter.n_kv_heads, adapter.head_dim) == (3, 4, 2, 12)
        assert (adapter.d_model, adapter.vocab_size) == (32, 21)
        assert adapter.v_proj(1).weight.shape == (24, 32)
        assert adapter.o_proj(1).weight.shape == (32, 48)
        for part in (adapter.attn, adapter.attn_norm, adapter.mlp_norm, adapter.mlp):
            assert any(part(2) is module for module in adapter.layers[2].modules())
        for site in adapter.site_names():
            assert any(adapter.sites.place(site).module is module for module in adapter.model.modules())


@pytest.mark.parametrize("site", ["lm.3.mlp_out", "lm.0.mlpout", "lm.00.z", "lm.-1.z", "vision.0.z", "lm.0.layer", ""])
def test_unknown_site_is_an_error_with_near_names(llama: ModelAdapter, site: str) -> None:
    with pytest.raises(ModelError, match="unknown site") as error:
        llama.sites.place(site)
    assert site != "lm.0.mlpout" or "lm.0.mlp_out" in str(error.value)


def test_from_pretrained_equals_the_model_that_was_saved(llava_folder: Path, llava: ModelAdapter) -> None:
    loaded = ModelAdapter.from_pretrained(llava_folder)
    inputs = loaded.prepare(PROMPT, [picture()], "red")
    with torch.no_grad():
        assert torch.equal(loaded.forward(inputs), llava.forward(llava.prepare(PROMPT, [picture()], "red")))
    assert loaded.identity == replace(llava.identity, name=str(llava_folder))
    assert loaded.identity.architecture == "LlavaForConditionalGeneration"


def test_tied_embeddings_are_not_missing_weights(tmp_path: Path) -> None:
    tied = make_llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    adapter = ModelAdapter.from_pretrained(tmp_path)
    assert torch.equal(adapter.lm_head.weight, tied.lm_head.weight)  # type: ignore[arg-type]


def test_fingerprint_follows_the_values_of_the_weights(llama_folder: Path) -> None:
    identity = ModelAdapter.from_pretrained(llama_folder).identity
    assert ModelAdapter.from_pretrained(llama_folder, dtype="float64").identity == identity
    changed = make_llama()
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    assert identify(changed, identity.name, "local").fingerprint != identity.fingerprint


def test_unsupported_class_is_an_error() -> None:
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=21, **sizes))
    with pytest.raises(ModelError, match=r"OPTForCausalLM is not supported; add it by register_adapter"):
        ModelAdapter(model, make_tokenizer())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _set_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such model folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "other class": (lambda f: _set_config(f, architectures=["OPTForCausalLM"], model_type="opt"), "OPTForCausalLM"),
    "unknown type": (lambda f: _set_config(f, model_type="nosuch"), "nosuch"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors"), "cannot be loaded"),
    "missing weight": (_drop_weight, r"model\.layers\.1\.mlp\.down_proj\.weight"),
    "weight of another shape": (_reshape_weight, "cannot be loaded"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_pretrained_has_one_line_errors(damage: str, llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=message) as error:
        ModelAdapter.from_pretrained(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_registered_class_that_transformers_lacks_is_named(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_architectures", dict(architectures._architectures))
    architectures.register_adapter("HomeMadeForCausalLM")
    shutil.copytree(llama_folder, tmp_path / "model")
    _set_config(tmp_path / "model", architectures=["HomeMadeForCausalLM"], model_type="llama")
    with pytest.raises(ModelError, match=r"model: transformers \S+ has no HomeMadeForCausalLM; call ModelAdapter"):
        ModelAdapter.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("device", "nowhere")])
def test_from_pretrained_names_a_wrong_option(option: str, value: str, llama_folder: Path) -> None:
    with pytest.raises(ModelError, match=f"{option} '{value}'"):
        ModelAdapter.from_pretrained(llama_folder, **{option: value})


def test_repr_names_the_model_its_size_and_inputs(llava: ModelAdapter, llama64: ModelAdapter) -> None:
    assert repr(llava) == (
        "ModelAdapter(name='LlavaForConditionalGeneration', architecture=LlavaForConditionalGeneration, n_layers=3, "
        "d_model=32, dtype=float32, device=cpu, inputs=text and images)"
    )
    assert "dtype=float64, device=cpu, inputs=text)" in repr(llama64)
