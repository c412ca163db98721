"""Image tokens: rows and columns match the image, and token ids match the processors of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.models.loading import Processor
from clt.errors import InputError

from ..tiny_models import IMAGE_PROCESSORS, make_adapter, make_words, official_processor, picture, prompt_for


@pytest.mark.parametrize("name", list(IMAGE_PROCESSORS))
@torch.no_grad()
def test_rows_and_columns_of_image_tokens_are_those_of_the_picture(name: str) -> None:
    adapter = make_adapter(name)
    for block in adapter.structure.vision_blocks:  # patches that do not mix
        for parameter in block.o_proj.parameters():
            parameter.zero_()
    width, pixel = (64, (22, 42)) if adapter.size_matters else (32, (11, 21))
    plain = picture(width, 32)
    changed = plain.copy()
    changed.putpixel((pixel[1], pixel[0]), tuple(255 - value for value in plain.getpixel((pixel[1], pixel[0]))))  # type: ignore[union-attr]
    prompt, embeds = prompt_for(name, "the cat", 1), []
    for image in (plain, changed):
        inputs = adapter.prepare(prompt, [image])
        with attach(adapter, ["lm.embed"]) as found:
            adapter.forward(inputs)
        embeds.append(found["lm.embed"][0])
    tokens = inputs.tokens.select(0)
    grid = (int(tokens.patch_row.max()) + 1, int(tokens.patch_col.max()) + 1)
    cell = (pixel[0] * grid[0] // 32, pixel[1] * grid[1] // width)
    differs = (embeds[0] != embeds[1]).any(1).nonzero()[:, 0]
    seen = {(int(tokens.patch_row[at]), int(tokens.patch_col[at])) for at in differs}
    assert cell in seen
    # A view of the whole picture beside the parts shows the pixel in the coarse patch whose middle is near.
    assert len(differs) == (2 if name in ("llava_next", "idefics3", "smolvlm") else 1)
    assert all(max(abs(row - cell[0]), abs(col - cell[1])) <= 1 for row, col in seen)
    sizes = [(32, width)] if adapter.size_matters else 1
    assert adapter.count_tokens(prompt, sizes) == len(tokens.modality)
    if adapter.size_matters:
        with pytest.raises(InputError, match="give the sizes"):
            adapter.count_tokens(prompt, 1)


@pytest.mark.parametrize("name", list(IMAGE_PROCESSORS))
def test_prompts_are_those_of_the_models_own_processor(name: str) -> None:
    pictures = [picture(48, 32), picture(20, 70)]
    prompt = prompt_for(name, "the cat", 2)
    ours = make_adapter(name).prepare(f"<s>{prompt}", pictures).model_inputs
    theirs = official_processor(name)(text=[f"<s>{prompt}"], images=[pictures], return_tensors="pt")
    compared = set(theirs) & set(ours)
    assert compared >= {"input_ids", "pixel_values"}
    for key in compared:
        assert torch.equal(ours[key], theirs[key].to(ours[key].dtype)), key


def test_a_picture_that_is_not_split_is_one_view() -> None:
    made = make_adapter("idefics3")
    images = Idefics3ImageProcessorPil(do_image_splitting=False, max_image_size={"longest_edge": 32})
    adapter = ModelAdapter(made.model, Processor(tokenizer=make_words(), image_processor=images))
    inputs = adapter.prepare("<image> the cat", [picture(48, 32)])
    assert inputs.grid(0, 0) == (2, 2)
    adapter.forward(inputs)


def test_neighbouring_images_of_qwen_are_an_error() -> None:
    adapter = make_adapter("qwen2_vl")
    with pytest.raises(InputError, match="write text between them"):
        adapter.prepare("<image><image> what is red ?", [picture(32, 32), picture(32, 32)])
