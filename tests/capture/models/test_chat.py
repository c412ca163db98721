"""Prompt formats: chat templates equal those rendered by transformers; plain notation; prompts given as formatted."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.loading import Processor
from clt.capture.sources.examples import load_image, load_images
from clt.errors import InputError

from ..conftest import make_llama, make_llava, make_processor, make_tokenizer
from ..tiny_models import IMAGE_PROCESSORS, MODELS, image_for, make_adapter, make_words, official_processor, picture

QUESTION = "what is red ?"
#: Of a text model; trims the question as Gemma's does.
TEXT = (
    "{{ bos_token }}{% for message in messages %}the {{ message['content'] | trim }} </s>{% endfor %}"
    "{% if add_generation_prompt %}cat{% endif %}"
)


def parts_template(image: str) -> str:
    """Message of a vision-language model: a list of parts, images first."""
    return (
        "{{ bos_token }}{% for message in messages %}the {% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image} {{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %} </s>{% endfor %}{% if add_generation_prompt %}cat{% endif %}"
    )


def turn(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in IMAGE_PROCESSORS])
def test_text_models_use_the_template_of_the_tokenizer(name: str) -> None:
    adapter = make_adapter(name, TEXT)
    adapter.tokenizer.chat_template = TEXT
    prompt = adapter.format_prompt(f" {QUESTION}\n")
    expected = make_words(TEXT).apply_chat_template(turn(QUESTION), add_generation_prompt=True, tokenize=False)
    assert prompt == expected == f"<s>the {QUESTION} </s>cat"
    ids = make_words(TEXT).apply_chat_template(turn(QUESTION), add_generation_prompt=True, return_dict=False)
    assert adapter.prepare(prompt).model_inputs["input_ids"].tolist() == [ids]


@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("name", list(IMAGE_PROCESSORS))
def test_vision_models_use_the_template(name: str, n_images: int) -> None:
    template = parts_template(image_for(name))
    adapter = make_adapter(name, template)
    parts = [*({"type": "image"},) * n_images, {"type": "text", "text": QUESTION}]
    expected = make_words(template).apply_chat_template(turn(parts), add_generation_prompt=True, tokenize=False)
    prompt = adapter.format_prompt(QUESTION, n_images)
    assert prompt == expected and prompt.count(image_for(name)) == n_images
    inputs = adapter.prepare(prompt, [picture(48, 32)] * n_images)
    ids = inputs.model_inputs["input_ids"][0].tolist()
    assert ids.count(adapter.tokenizer.bos_token_id) == 1
    assert len({int(image) for image in inputs.tokens.image.flatten()} - {-1}) == n_images


@pytest.mark.parametrize("name", list(IMAGE_PROCESSORS))
def test_prepared_chats_are_those_of_the_models_own_processor(name: str) -> None:
    processor, pictures = official_processor(name), [picture(48, 32), picture(20, 70)]
    processor.chat_template = parts_template(image_for(name))
    parts = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": QUESTION}]
    theirs = processor.apply_chat_template(
        turn(parts), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    made = make_adapter(name)
    template = {"tool_use": "", "default": processor.chat_template}
    images = IMAGE_PROCESSORS[name]()
    adapter = ModelAdapter(
        made.model, Processor(tokenizer=make_words(), image_processor=images, chat_template=template)
    )
    ours = adapter.prepare(adapter.format_prompt(QUESTION, 2), pictures).model_inputs
    for key in ("input_ids", "pixel_values"):
        assert torch.equal(ours[key], theirs[key].to(ours[key].dtype)), key


@pytest.mark.parametrize("name", list(MODELS))
def test_without_a_template_images_come_before_the_text(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    adapter = make_adapter(name)
    assert adapter.format_prompt(QUESTION) == QUESTION
    n_images = 2 if name in IMAGE_PROCESSORS else 0
    prompt = adapter.format_prompt(QUESTION, n_images)
    assert prompt == f"{image_for(name)}\n" * n_images + QUESTION
    adapter.prepare(prompt, [picture(48, 32)] * n_images)
    assert [record.message for record in caplog.records] == [
        "prompt_format=plain images=0",
        f"prompt_format=plain images={n_images}",
    ]


@pytest.mark.parametrize("question", ["<s> what", "what </s>", "what is red ? cat", "the what is red ? </s>cat"])
def test_a_formatted_prompt_is_used_as_it_is(question: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert make_adapter("llama", TEXT.replace(" </s>", "")).format_prompt(question) == question
    assert caplog.messages == ["prompt_format=as_given images=0"]


def test_bos_comes_once_whoever_writes_it() -> None:
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(adds_bos)
        tokenizer.chat_template = TEXT
        adapter = ModelAdapter(make_llama(), tokenizer)
        ids = adapter.prepare(adapter.format_prompt("the cat")).model_inputs["input_ids"][0].tolist()
        assert ids == [1, 5, 5, 6, 2, 6]


def test_a_template_that_takes_text_only_gets_the_placeholders_in_the_text() -> None:
    adapter = make_adapter(
        "llava", "{% for message in messages %}{{ 'the ' + message['content'] + ' cat' }}{% endfor %}"
    )
    assert adapter.format_prompt(QUESTION, 1) == f"the <image>\n{QUESTION} cat"
    adapter = make_adapter("llava", TEXT)
    assert adapter.format_prompt(QUESTION, 2) == f"<s>the <image>\n<image>\n{QUESTION} </s>cat"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no turns') }}", "the cat", "{{ messages[0]['content'] + 1 }}"]
)
def test_a_template_that_loses_the_question_is_an_error(template: str) -> None:
    for name, n_images in (("llava", 1), ("llama", 0)):
        with pytest.raises(InputError, match=r"the chat template does not fit prompt 'what is red \?'") as error:
            make_adapter(name, template).format_prompt(QUESTION, n_images)
        assert "\n" not in str(error.value)


def test_placeholders_must_match_images() -> None:
    for template in (None, parts_template("<image>")):
        llava = make_adapter("llava", template)
        assert llava.format_prompt("<image> what", 1) == "<image> what"
        assert "<image>" in llava.format_prompt("", 1)
        with pytest.raises(InputError, match="has 2 image placeholders but 1 images"):
            llava.format_prompt("<image> <image> what", 1)
        with pytest.raises(InputError, match="has 1 image placeholders but 0 images"):
            llava.format_prompt("<image> what")
        with pytest.raises(InputError, match="has 0 image placeholders but 1 images"):
            llava.format_prompt("<s> what", 1)
        with pytest.raises(InputError, match="takes no images"):
            make_adapter("llama", template).format_prompt(QUESTION, 1)


def _in_processor_config(folder: Path, template: str) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"chat_template": template}))


def _named(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


PLACES = {
    "jinja": lambda folder, template: (folder / "chat_template.jinja").write_text(template),
    "json": lambda folder, template: (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": template})
    ),
    "processor_config": _in_processor_config,
    "named": _named,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_loaded_from_wherever_transformers_finds_it(place: str, tmp_path: Path) -> None:
    template = parts_template("<image>")
    make_llava().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    PLACES[place](tmp_path, template)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    theirs = LlavaProcessor.from_pretrained(tmp_path).apply_chat_template(turn(parts), add_generation_prompt=True)
    assert ModelAdapter.from_pretrained(tmp_path).format_prompt(QUESTION, 1) == theirs


def test_the_tokenizers_template_is_used_where_the_processor_has_none(tmp_path: Path) -> None:
    make_llava().save_pretrained(tmp_path)
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = parts_template("<image>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ModelAdapter.from_pretrained(tmp_path).format_prompt(QUESTION, 1) == f"<s>the <image> {QUESTION} </s>cat"


def test_images_are_paths_or_pictures_turned_upright(tmp_path: Path) -> None:
    turned, path = picture(48, 32), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.convert("L").save(path, exif=exif)
    shutil.copy(path, tmp_path / "again.png")
    expected = load_image(path)
    assert expected.size == (32, 48) and expected.mode == "RGB"
    with Image.open(path) as opened:
        found = load_images([str(path), tmp_path / "again.png", opened])
    assert [image.tobytes() for image in found] == [expected.tobytes()] * 3
    assert [image.size for image in load_images(str(path))] == [(32, 48)]
    assert load_images([]) == []
    with pytest.raises(InputError, match=r"missing\.png: the image cannot be decoded"):
        load_images([tmp_path / "missing.png"])
    wrong: Any = [None, 3, b"bytes", [[path]], torch.zeros(3, 4, 4), [expected, Image.new("RGB", (0, 4))]]
    for images in wrong:
        with pytest.raises(InputError, match=r"images\[[01]\] (is of type|has no pixels)"):
            load_images(images)
