"""Which models are supported, and `register_adapter`, the door for those that are not.

An architecture is a model class of transformers, how its parts are found, and how its prompts show images. The ones
listed here are held to plain forward hooks by `tests/capture/test_architectures.py`. One that a user registers is held
to the equations of a residual stream when a model of it is loaded, since capture and attribution mean nothing without.
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
#: Tokens of the forward pass by which a registered architecture is tried, and what rounding may make of a sum.
_TRIAL_TOKENS = 4
_ROUNDING = 16


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model class that the adapter knows.

    Attributes:
        name: name of the class in transformers.
        structure: finds the parts of a model.
        image_tokens: makes what turns images into tokens; None for models that take no images.
        is_tested: whether this project's tests hold it to plain forward hooks; tried at every loading if not.
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
    """Makes a model class known that is not among the supported ones; docs/models.md has an example.

    Args:
        architecture: name of the model class in transformers, as `architectures` in its config.json.
        structure: gives the parts of a model of this class; the default finds those with usual names.
        image_tokens: makes, of model, tokenizer and image processor, what turns images into tokens; None for models
            that take no images.
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
        raise ModelError(
            f"{name} is not supported; register_adapter makes it known (docs/models.md); known are {known}"
        )
    return _architectures[name]


def attention_of(model_class: Any) -> str:
    """The fastest attention that a model class has on every device: sdpa, or eager where softmax is not all of it."""
    return "sdpa" if model_class._supports_sdpa else "eager"


@torch.no_grad()
def require_residual_stream(adapter: ModelAdapter) -> None:
    """Tries whether each block adds exactly its two branches to the residual stream.

    Args:
        adapter: the model.

    Raises:
        ModelError: a block does something else, such as running its branches side by side or scaling them.
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
                raise _no_stream(adapter, layer, f"{what} is not added to the residual stream as it is")


def _no_stream(adapter: ModelAdapter, layer: int, what: str) -> ModelError:
    return ModelError(f"{adapter.identity.architecture}: {what} in layer {layer}; describe its parts by hand")
