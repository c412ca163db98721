"""Tiny random models with real tokenizers and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from clt.capture.models.adapter import ModelAdapter

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "red",
    "blue",
    "USER",
    ":",
    "ASSISTANT",
    "?",
    "\n",
    "what",
    "is",
    "this",
)


def make_tokenizer(adds_bos: bool = True) -> Any:
    """A word-level tokenizer of 21 tokens."""
    vocab = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def text_config(**changes: Any) -> LlamaConfig:
    """Three layers, grouped-query attention, head_dim that is not d_model / heads."""
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**settings, **changes})


def make_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama, the same every time."""
    torch.manual_seed(1)
    return LlamaForCausalLM(text_config(**changes))


def make_llava(strategy: str = "default") -> LlavaForConditionalGeneration:
    """A random LLaVA of 24-pixel images in 8-pixel patches, the same every time."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        projection_dim=16,
    )
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text_config(),
            image_token_id=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
        )
    )


def make_processor(strategy: str = "default", size: int = 24) -> Any:
    """A real LLaVA processor for `make_llava`."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@pytest.fixture
def llama() -> ModelAdapter:
    return ModelAdapter(make_llama(), make_tokenizer())


@pytest.fixture
def llama64() -> ModelAdapter:
    return ModelAdapter(make_llama().double(), make_tokenizer())


@pytest.fixture
def llava() -> ModelAdapter:
    return ModelAdapter(make_llava(), make_processor())


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    make_llava().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder
