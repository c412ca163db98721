"""One view of a decoder model, with or without images: modules by name, prompts to tensors, forward and generate.

First stage of the journey: everything that touches a Hugging Face model goes through `ModelAdapter`, which finds the
parts of the model by discovery (`get_decoder`, `get_output_embeddings`, `config.get_text_config`) and says so when a
part is missing. Supported now: LLaVA and plain Llama.

Shape letters: N prompts, S prompt length with padding, V vocabulary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clt.capture.loading import SUPPORTED, identify, load_model
from clt.capture.prompts import PromptEncoder, PromptInputs, collate
from clt.errors import ModelError
from clt.records import ModelIdentity, TokenTable

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ModelAdapter", "PromptInputs"]

_DECODERS = ("LlamaModel",)
_LAYER_PARTS = {
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
}
#: Which part of a layer a site hangs on, in the order of the forward pass.
_SITE_PARTS = {
    "resid_pre": "layer",
    "scores": "attn",
    "pattern": "attn",
    "z": "attn",
    "attn_out": "attn",
    "resid_mid": "mlp_norm",
    "mlp_in": "mlp",
    "mlp_out": "mlp",
    "resid_post": "layer",
}


class ModelAdapter:
    """A frozen model with its tokenizer, its parts by name and its prompts.

    Args:
        model: a Hugging Face model; it is put in eval mode, frozen, and set to `sdpa` attention.
        processor_or_tokenizer: a processor with `tokenizer` and `image_processor`, or a tokenizer for text models.
        identity: who the model is; absent: its class name and the fingerprint of its weights.

    Raises:
        ModelError: the model's class is not supported, or a part of it is not found.
    """

    def __init__(self, model: Any, processor_or_tokenizer: Any, identity: ModelIdentity | None = None) -> None:
        name = type(model).__name__
        if name not in SUPPORTED:
            raise ModelError(f"{name}: this model class is not supported; supported are {', '.join(SUPPORTED)}")
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation("sdpa")
        self.identity: ModelIdentity = identity or identify(self.model, name, "local")
        self.tokenizer: Any = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
        self.decoder: Any = self.model.get_decoder()
        if type(self.decoder).__name__ not in _DECODERS:
            found = type(self.decoder).__name__
            raise ModelError(f"{name}: its decoder {found} is not supported; supported are {', '.join(_DECODERS)}")
        self.layers: nn.ModuleList = cast(nn.ModuleList, _part(self.decoder, "layers"))
        self.final_norm: nn.Module = _part(self.decoder, "norm")
        self.lm_head: nn.Module = self.model.get_output_embeddings()
        if self.lm_head is None:
            raise ModelError(f"{name}: get_output_embeddings() found no language-model head")
        for layer in self.layers:
            for path in _LAYER_PARTS.values():
                _part(layer, path)
        text = self.model.config.get_text_config()
        self.n_layers: int = len(self.layers)
        self.n_heads: int = text.num_attention_heads
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or self.n_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // self.n_heads
        self.d_model: int = text.hidden_size
        self.vocab_size: int = cast(Tensor, self.lm_head.weight).shape[0]
        self._encoder = self._prompt_encoder(getattr(processor_or_tokenizer, "image_processor", None))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> ModelAdapter:
        """Loads a model, its tokenizer and its image processor from a folder or from the hub.

        Args:
            path: folder, or hub name such as `llava-hf/llava-1.5-7b-hf`.
            revision: hub revision; ignored for folders.
            dtype: float32, bfloat16, float16 or float64.
            device: torch device.

        Returns:
            The adapter, its model on `device`.

        Raises:
            ModelError: the folder does not exist, lacks a file, holds a damaged one, or a class that is not supported.
        """
        model, processor = load_model(str(path), revision, dtype, device)
        # The hub's commit, when there is one, says more than a branch.
        commit = getattr(model.config, "_commit_hash", None) or revision or "main"
        return cls(model, processor, identify(model, str(path), "local" if Path(path).is_dir() else commit))

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return cast(Tensor, self.lm_head.weight).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model's weights."""
        return cast(Tensor, self.lm_head.weight).dtype

    @property
    def image_token_id(self) -> int | None:
        """Vocabulary id of the image placeholder; None for text models."""
        return self._encoder.image_token_id

    @property
    def image_processor(self) -> Any:
        """Hugging Face image processor; None for text models."""
        return self._encoder.image_processor

    def attn(self, layer: int) -> nn.Module:
        """Self-attention of a layer."""
        return self._layer_part(layer, "attn")

    def attn_norm(self, layer: int) -> nn.Module:
        """Norm before the attention of a layer."""
        return self._layer_part(layer, "attn_norm")

    def mlp_norm(self, layer: int) -> nn.Module:
        """Norm before the MLP of a layer."""
        return self._layer_part(layer, "mlp_norm")

    def mlp(self, layer: int) -> nn.Module:
        """MLP of a layer; its output is what the branch adds to the residual stream."""
        return self._layer_part(layer, "mlp")

    def v_proj(self, layer: int) -> nn.Module:
        """Value projection of a layer, weight [n_kv_heads * head_dim, d_model]."""
        return self._layer_part(layer, "v_proj")

    def o_proj(self, layer: int) -> nn.Module:
        """Output projection of a layer's attention, weight [d_model, n_heads * head_dim]."""
        return self._layer_part(layer, "o_proj")

    def site_names(self) -> tuple[str, ...]:
        """All sites that can be read or edited, in the order of the forward pass; described in `clt.capture.hooks`."""
        inner = [f"lm.{layer}.{kind}" for layer in range(self.n_layers) for kind in _SITE_PARTS]
        return ("lm.embed", *inner, "lm.final")

    def module_for(self, site: str) -> nn.Module:
        """The module a site hangs on.

        Args:
            site: a name out of `site_names`.

        Returns:
            The module at whose input or output, or inside which, the site's tensor passes.

        Raises:
            ModelError: no such site; lists similar names.
        """
        if site == "lm.embed":
            return self.layers[0]
        if site == "lm.final":
            return self.final_norm
        match = re.fullmatch(r"lm\.(0|[1-9]\d*)\.(\w+)", site)
        if match is None or int(match[1]) >= self.n_layers or match[2] not in _SITE_PARTS:
            near = difflib.get_close_matches(site, self.site_names(), n=4, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ModelError(f"unknown site '{site}' in {self.identity.name} with {self.n_layers} layers{hint}")
        part = _SITE_PARTS[match[2]]
        return self.layers[int(match[1])] if part == "layer" else self._layer_part(int(match[1]), part)

    def prepare(self, prompt: str, images: Sequence[Image.Image] = (), answer: str | None = None) -> PromptInputs:
        """Turns one prompt, its images and optionally its answer into a batch of one.

        Args:
            prompt: formatted text with one placeholder (such as `<image>`) per image.
            images: pictures in the order of their placeholders.
            answer: text whose tokens follow the prompt's, tokenized on its own, with an end-of-sequence token after it.

        Returns:
            The batch on the model's device; a beginning-of-sequence token comes first exactly once if the tokenizer
            has one.

        Raises:
            InputError: the prompt does not have one placeholder per image, or the model takes no images.
            ModelError: the image processor does not make images of the size that the vision tower takes.
        """
        inputs = self._encoder.encode(prompt, images, answer)
        model_inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.model_inputs.items()
        }
        tokens = TokenTable(**{name: value.to(self.device) for name, value in vars(inputs.tokens).items()})
        start = inputs.answer_start.to(self.device)
        return replace(inputs, model_inputs=model_inputs, tokens=tokens, answer_start=start)

    def count_tokens(self, prompt: str, n_images: int = 0, answer: str | None = None) -> int:
        """Number of tokens that `prepare` would give, without looking at the images; same arguments and errors."""
        return self._encoder.count(prompt, n_images, answer)

    def collate(self, batch: Sequence[PromptInputs]) -> PromptInputs:
        """Joins batches into one, padded on the left.

        Args:
            batch: at least one batch, for instance from `prepare`.

        Returns:
            A batch of all their prompts in order; S is the longest length.
        """
        return collate(batch, self._pad_id())

    def forward(self, inputs: PromptInputs) -> Tensor:
        """Runs the model once.

        Args:
            inputs: N prompts.

        Returns:
            Logits [N,S,V] in the model's dtype; whether gradients are recorded is the caller's business.
        """
        return self.model(**inputs.model_inputs, use_cache=False).logits

    def generate(self, inputs: PromptInputs, max_new_tokens: int) -> list[list[int]]:
        """Continues each prompt greedily with a key-value cache.

        Args:
            inputs: N prompts without answers.
            max_new_tokens: most tokens to add, > 0.

        Returns:
            New token ids of each prompt, the end-of-sequence token included where it came.
        """
        from transformers import GenerationConfig

        eos = self.tokenizer.eos_token_id
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=self._pad_id(),
            use_cache=True,
        )
        # generate() derives position ids from the attention mask at each step; ours cover the prompt only.
        arguments = {name: value for name, value in inputs.model_inputs.items() if name != "position_ids"}
        with torch.no_grad():
            ids = self.model.generate(**arguments, generation_config=settings)
        new = ids[:, inputs.model_inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in new]

    def _layer_part(self, layer: int, part: str) -> nn.Module:
        return _part(self.layers[layer], _LAYER_PARTS[part])

    def _pad_id(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else (eos or 0)

    def _prompt_encoder(self, image_processor: Any) -> PromptEncoder:
        config = self.model.config
        vision = getattr(config, "vision_config", None)
        side = getattr(vision, "image_size", 0)
        return PromptEncoder(
            model_name=self.identity.name,
            tokenizer=self.tokenizer,
            image_processor=image_processor,
            image_token_id=None if vision is None else config.image_token_id,
            image_size=(side, side) if isinstance(side, int) else (side[0], side[1]),
            patch_size=1 if vision is None else vision.patch_size,
            has_class_token=getattr(config, "vision_feature_select_strategy", None) == "full",
        )


def _part(module: nn.Module, path: str) -> nn.Module:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ModelError(f"{type(module).__name__}: no module '{path}' found; this structure is not supported")
    return found
