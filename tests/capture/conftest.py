"""Tiny random models with real tokenizers and processors, and small stores whose values encode their position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.store.row_order import pack_units
from clt.capture.store.schema import SCHEMA_VERSION, CapturePlan, SiteGroup, StoreSpec
from clt.capture.writing.writer import StoreWriter, UnitData
from clt.records import Modality, ModelIdentity, TokenTable

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


SITES = ("lm.0.resid_mid", "lm.1.resid_mid", "lm.0.mlp_out", "lm.1.mlp_out")
#: Tokens per sample of most stores in these tests.
LENGTHS = [20, 30, 13, 40, 24, 5]
TWO_GROUPS = (
    SiteGroup(name="lm", sites=("lm.0.resid_mid", "lm.0.mlp_out"), width=4),
    SiteGroup(name="vision", sites=("vision.0.resid_mid", "vision.1.resid_mid", "vision.2.resid_mid"), width=7),
)


def identity(n_layers: int = 2, d_model: int = 4, fingerprint: str = "f" * 64) -> ModelIdentity:
    return ModelIdentity(
        name="random",
        revision="local",
        architecture="LlamaForCausalLM",
        n_layers=n_layers,
        d_model=d_model,
        fingerprint=fingerprint,
    )


def make_spec(**changes: Any) -> StoreSpec:
    """Two layers of width 4, units of 64 rows in chunks of 16, float32."""
    settings: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created_by": "tests",
        "model": identity(),
        "model_dtype": "float32",
        "groups": (SiteGroup(name="lm", sites=SITES, width=4),),
        "store_dtype": "float32",
        "compression": "none",
        "rows_per_unit": 64,
        "chunk_tokens": 16,
        "batch_size": 1,
        "seed": 0,
        "source": "synthetic",
    }
    return StoreSpec(**{**settings, **changes})


def make_plan(lengths: Sequence[int], rows_per_unit: int = 64) -> CapturePlan:
    starts = pack_units(lengths, rows_per_unit)
    return CapturePlan(
        sample_starts=starts, unit_tokens=tuple(sum(lengths[a:b]) for a, b in itertools.pairwise(starts))
    )


def unit_data(lengths: Sequence[int], samples: range, spec: StoreSpec) -> UnitData:
    """Activations that say where they come from: channels hold sample + 1, position, site and a random number."""
    sample = torch.cat([torch.full((lengths[s],), s) for s in samples])
    position = torch.cat([torch.arange(lengths[s]) for s in samples])
    n = len(sample)
    acts = {}
    for group in spec.groups:
        values = torch.empty(n, len(group.sites), group.width)
        values[..., 0], values[..., 1] = sample[:, None] + 1, position[:, None]
        values[..., 2] = torch.arange(len(group.sites))
        values[..., 3:] = torch.randn(n, len(group.sites), 1, generator=torch.Generator().manual_seed(int(sample[0])))
        acts[group.name] = values
    bos = position == 0
    tokens = TokenTable(
        sample=sample,
        position=position.int(),
        token_id=(sample * 7 + position).int(),
        modality=torch.where(bos, int(Modality.BOS), int(Modality.TEXT)).to(torch.uint8),
        patch_row=torch.full((n,), -1, dtype=torch.int16),
        patch_col=torch.full((n,), -1, dtype=torch.int16),
        image=torch.full((n,), -1, dtype=torch.int16),
    )
    return UnitData(
        acts=acts,
        tokens=tokens,
        sample_ids=tuple(f"sample-{s}" for s in samples),
        sample_tokens=tuple(lengths[s] for s in samples),
    )


def make_store(path: Path | str, lengths: Sequence[int], **changes: Any) -> ActivationStore:
    """A complete store of samples of the given lengths; see `unit_data` for what it holds."""
    spec = make_spec(**changes)
    plan = make_plan(lengths, spec.rows_per_unit)
    writer = StoreWriter(path, spec, plan)
    if not writer.calibrated:
        writer.calibrate(unit_data(lengths, plan.samples(0), spec).acts)
    for unit in writer.pending():
        writer.commit(unit, unit_data(lengths, plan.samples(unit), spec))
    writer.finalize()
    return open_store(path)
