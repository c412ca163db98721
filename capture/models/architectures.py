"""Supported model classes, and `register_adapter` for adding others.

An architecture is a model class of transformers with functions that find its parts and its image tokens. Those listed
here are tested against plain forward hooks in `tests/capture/models/test_architectures.py`. Registered ones are checked
when a model is loaded: each block must add exactly its two branches to the residual stream, as capture and attribution
assume.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clt.capture.models.hooks import attach
from clt.capture.models.image_tokens import IMAGE_TOKENS, MakeImageTokens
from clt.capture.models.sites import SiteKind, decoder_site
from clt.capture.models.structure import Structure, discover
from clt.errors import ModelError

if TYPE_CHECKING:
    from clt.capture.models.adapter import ModelAdapter

_TEXT_MODELS = (
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
#: Tokens of the forward pass that checks a registered architecture, and the rounding error of a sum in units of eps.
_TRIAL_TOKENS = 4
_ROUNDING = 16


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model class that the adapter supports.

    Attributes:
        name: name of the class in transformers.
        structure: function that finds the parts of a model.
        image_tokens: function that makes the `ImageTokens` of a model; None for models that take no images.
        is_tested: whether it is tested against plain forward hooks; if not, every model is checked when loaded.
    """

    name: str
    structure: Callable[[Any], Structure] = discover
    image_tokens: MakeImageTokens | None = None
    is_tested: bool = False


_architectures = {
    name: Architecture(name=name, image_tokens=images, is_tested=True)
    for name, images in (dict.fromkeys(_TEXT_MODELS) | IMAGE_TOKENS).items()
}


def register_adapter(
    architecture: str,
    structure: Callable[[Any], Structure] = discover,
    image_tokens: MakeImageTokens | None = None,
) -> None:
    """Adds support for a model class; docs/models.md has an example.

    Args:
        architecture: name of the model class in transformers, as `architectures` in its config.json.
        structure: function from a model to its parts; the default finds parts with usual names.
        image_tokens: function from model, tokenizer and image processor to `ImageTokens`; None for models that take no
            images.
    """
    _architectures[architecture] = Architecture(name=architecture, structure=structure, image_tokens=image_tokens)


def find_architecture(name: str) -> Architecture:
    """The architecture of a model class.

    Args:
        name: name of the class.

    Raises:
        ModelError: it is not supported.
    """
    if name not in _architectures:
        known = ", ".join(sorted(_architectures))
        raise ModelError(f"{name} is not supported; add it by register_adapter (docs/models.md); supported: {known}")
    return _architectures[name]


def attention_of(model_class: Any) -> str:
    """The fastest attention of a model class on every device: sdpa, or eager if it does more than a softmax."""
    return "sdpa" if model_class._supports_sdpa else "eager"


@torch.no_grad()
def require_residual_stream(adapter: ModelAdapter) -> None:
    """Checks that each block adds exactly its two branches to the residual stream.

    Args:
        adapter: the model.

    Raises:
        ModelError: a block does something else, such as running its branches in parallel or scaling them.
    """
    kinds: tuple[SiteKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    layers = range(adapter.n_layers)
    ids = torch.arange(_TRIAL_TOKENS, device=adapter.device)[None] % adapter.vocab_size
    with attach(adapter, [decoder_site(layer, kind) for layer in layers for kind in kinds]) as found:
        adapter.model(input_ids=ids, use_cache=False)
    for layer in layers:
        pre, attn, mid, mlp, post = (found.get(decoder_site(layer, kind)) for kind in kinds)
        for whole, start, branch, what in ((mid, pre, attn, "attention"), (post, mid, mlp, "the MLP")):
            if whole is None or start is None or branch is None:
                raise _no_stream(adapter, layer, f"{what} does not run")
            tolerance = _ROUNDING * torch.finfo(whole.dtype).eps * max(float(whole.abs().max()), sys.float_info.min)
            if not bool(((start + branch - whole).abs() <= tolerance).all()):
                raise _no_stream(adapter, layer, f"the output of {what} is not added unchanged to the residual stream")


def _no_stream(adapter: ModelAdapter, layer: int, what: str) -> ModelError:
    return ModelError(f"{adapter.identity.architecture}: {what} in layer {layer}; give its Structure (docs/models.md)")
