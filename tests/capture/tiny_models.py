"""Tiny random models of all supported architectures, with a word-level tokenizer and real image processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.loading import Processor

#: Token ids: the image token is 5, the marks around images come next.
_MARKS = ("<start>", "<end>", "<video>", "<fake_token_around_image>", "<global-img>")
_PLACES = tuple(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))
_WORDS = ("\n\n", "\n", "the", "cat", "sat", "on", "a", "mat", "what", "is", "red", "blue")
VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "?", "<image>", *_MARKS, *_PLACES, *_WORDS)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}
#: Sides in pixels of a view and of a patch.
_VIEW, _PATCH = 32, 8

_TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Random weights of the usual size would make all layers nearly the identity.
    "initializer_range": 0.2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _VIEW,
    "patch_size": _PATCH,
    "initializer_range": 0.2,
}
_GEMMA = _TEXT | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
_QWEN_TEXT = _TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "initializer_range": 0.2,
}
_QWEN_IDS = {
    "image_token_id": _IDS["<image>"],
    "video_token_id": _IDS["<video>"],
    "vision_start_token_id": _IDS["<start>"],
    "vision_end_token_id": _IDS["<end>"],
}


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(**_VISION, projection_dim=16)
    text = hf.LlamaConfig(**_TEXT)
    ids = {"image_token_id": _IDS["<image>"], "vision_feature_layer": -1}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, **ids))


def _llava_next() -> Any:
    vision = hf.CLIPVisionConfig(**_VISION, projection_dim=16)
    text = hf.LlamaConfig(**_TEXT)
    ids = {"image_token_id": _IDS["<image>"], "vision_feature_layer": -1}
    grids = [[32, 64], [64, 32], [64, 64]]
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=grids, **ids)
    return hf.LlavaNextForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = _QWEN_VISION | {"embed_dim": 16, "mlp_ratio": 2}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS)
    )


def _qwen2_5_vl() -> Any:
    # Windows of 2x2 tokens, so that patches are reordered on their way through the tower.
    vision = _QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS)
    )


def _qwen3_vl() -> Any:
    vision = _QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = _QWEN_TEXT | {"head_dim": 8}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS))


def _gemma3() -> Any:
    ids = {name: _IDS[word] for name, word in (("image_token_id", "<image>"), ("boi_token_index", "<start>"))}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**_GEMMA),
            vision_config=hf.SiglipVisionConfig(**_VISION),
            mm_tokens_per_image=4,
            eoi_token_index=_IDS["<end>"],
            **ids,
        )
    )


def _shuffled(name: str) -> Any:
    """Idefics3 and SmolVLM."""
    config = getattr(hf, f"{name}Config")(
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_VISION,
        scale_factor=2,
        image_token_id=_IDS["<image>"],
        pad_token_id=0,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _gpt2() -> Any:
    names = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(VOCABULARY), bos_token_id=1, eos_token_id=2, **names))


def _qwen_images() -> Any:
    # Pictures between 2x2 and 8x8 tokens keep their size.
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )


_SIDE = {"height": _VIEW, "width": _VIEW}
_SPLIT = {"size": {"longest_edge": 2 * _VIEW}, "max_image_size": {"longest_edge": _VIEW}}
MODELS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "idefics3": lambda: _shuffled("Idefics3"),
    "smolvlm": lambda: _shuffled("SmolVLM"),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_TEXT)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=12, **_TEXT)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GEMMA)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA)),
    "gpt2": _gpt2,
}
IMAGE_PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.CLIPImageProcessorPil(size={"shortest_edge": _VIEW}, crop_size=_SIDE),
    "llava_next": lambda: LlavaNextImageProcessorPil(
        size={"shortest_edge": _VIEW}, crop_size=_SIDE, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
    ),
    "qwen2_vl": _qwen_images,
    "qwen2_5_vl": _qwen_images,
    "qwen3_vl": _qwen_images,
    "gemma3": lambda: Gemma3ImageProcessorPil(size=_SIDE),
    "idefics3": lambda: Idefics3ImageProcessorPil(**_SPLIT),
    "smolvlm": lambda: SmolVLMImageProcessorPil(**_SPLIT),
}


def make_words(chat_template: str | None = None) -> Any:
    """A word-level tokenizer that keeps spaces out."""
    tokenizer = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    split = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n\n", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.Split("\n", "isolated")])
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"},
        chat_template=chat_template,
    )
    words.add_tokens([*_MARKS, *_PLACES], special_tokens=True)
    return words


def make_adapter(name: str, chat_template: str | None = None) -> ModelAdapter:
    """An adapter of a random model, the same every time; norms and biases are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = MODELS[name]()
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.data += 0.2 * torch.randn_like(parameter)
        # Ties go to the first: no model ever answers with an image, which it could not be asked about again.
        head = model.get_output_embeddings().weight.data
        head[_IDS["<image>"]] = head[_IDS["?"]]
    images = IMAGE_PROCESSORS.get(name)
    return ModelAdapter(model, Processor(tokenizer=make_words(chat_template), image_processor=images and images()))


def official_processor(name: str) -> Any:
    """The processor of transformers for a tiny model; skips the test where a package is missing."""
    images, words = IMAGE_PROCESSORS[name](), make_words()
    if name == "gemma3":
        return hf.Gemma3Processor(images, words, image_seq_length=4)
    if name == "idefics3":
        return hf.Idefics3Processor(images, words, image_seq_len=4)
    if name.startswith("llava"):
        kind = hf.LlavaNextProcessor if name == "llava_next" else hf.LlavaProcessor
        settings: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return kind(images, words, patch_size=8, image_token="<image>", **settings)
    for package in ("torchvision", "num2words"):
        pytest.importorskip(package, reason=f"the model's own processor needs the package '{package}'")
    if name == "smolvlm":
        return hf.SmolVLMProcessor(images, words, hf.SmolVLMVideoProcessor(), image_seq_len=4)
    kinds = {
        "qwen2_vl": (hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    }
    processor, videos = kinds[name]
    return processor(images, words, videos())


def prompt_for(name: str, text: str, n_images: int = 0) -> str:
    """A prompt in the model's own notation, its images first."""
    return f"{image_for(name)} " * n_images + text


def image_for(name: str) -> str:
    """An image in the model's own notation."""
    return {"gemma3": "<start>"}.get(name, "<start><image><end>" if name.startswith("qwen") else "<image>")


def picture(width: int, height: int) -> Image.Image:
    """A picture of random pixels, the same every time for a size."""
    random = torch.Generator().manual_seed(width + height)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8).numpy())
