"""Adapter of Hugging Face decoder models, with or without images: modules by name, prompts, forward and generate.

All access to a model goes through `ModelAdapter`, which finds its parts by name (`clt.capture.models.structure`) and
raises an error if one is missing. docs/models.md lists the supported models and how to add one.

Shape letters: N prompts, S prompt length with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clt.capture.models.architectures import Architecture, attention_of, find_architecture, require_residual_stream
from clt.capture.models.chat import PromptFormatter
from clt.capture.models.loading import DeviceMap, Placement, Quantization, identify, load_model
from clt.capture.models.prompts import PromptEncoder, PromptInputs, collate, token_text
from clt.capture.models.sites import Sites
from clt.capture.models.structure import Structure
from clt.errors import InputError
from clt.records import ModelIdentity, TokenTable

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ModelAdapter", "PromptInputs"]


class ModelAdapter:
    """A frozen model with its tokenizer and its modules by name.

    Args:
        model: a Hugging Face model; it is set to eval mode, frozen, and set to its fastest attention (`sdpa`).
        processor_or_tokenizer: for text models, a tokenizer; else a processor with `tokenizer`, `image_processor` and
            optionally `chat_template`.
        identity: name, revision and fingerprint; default: the class name and the fingerprint of the weights.

    Raises:
        ModelError: the model class is not supported, or a part of the model is not found.
    """

    def __init__(self, model: Any, processor_or_tokenizer: Any, identity: ModelIdentity | None = None) -> None:
        name = type(model).__name__
        architecture = find_architecture(name)
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(attention_of(type(model)))
        self.identity: ModelIdentity = identity or identify(self.model, name, "local")
        self.tokenizer: Any = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
        self.structure: Structure = architecture.structure(self.model)
        self.sites = Sites(self.structure, self.identity.name)
        self.decoder: Any = self.structure.decoder
        self.layers: tuple[nn.Module, ...] = tuple(block.block for block in self.structure.layers)
        self.final_norm: nn.Module = self.structure.final_norm
        self.lm_head: nn.Module = self.structure.lm_head
        text = self.model.config.get_text_config()
        self.n_layers: int = len(self.layers)
        self.n_heads: int = text.num_attention_heads
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or self.n_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // self.n_heads
        self.d_model: int = text.hidden_size
        self.vocab_size: int = cast(Tensor, self.lm_head.weight).shape[0]
        self._encoder = self._prompt_encoder(architecture, getattr(processor_or_tokenizer, "image_processor", None))
        template = getattr(processor_or_tokenizer, "chat_template", None) or self.tokenizer.chat_template
        self._formatter = PromptFormatter(encoder=self._encoder, chat_template=template)
        if not architecture.is_tested:
            require_residual_stream(self)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        inputs = "text" if self.image_token_id is None else "text and images"
        return (
            f"ModelAdapter(name='{self.identity.name}', architecture={self.identity.architecture}, "
            f"n_layers={self.n_layers}, d_model={self.d_model}, dtype={dtype}, device={self.device}, inputs={inputs})"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        *,
        device_map: DeviceMap | None = None,
        quantization: Quantization | None = None,
    ) -> ModelAdapter:
        """Loads a model, its tokenizer and its image processor from a folder or from the hub.

        Args:
            path: folder, or hub name such as `llava-hf/llava-1.5-7b-hf`.
            revision: hub revision; for a folder ignored with a warning.
            dtype: float32, bfloat16, float16 or float64.
            device: torch device.
            device_map: strategy of `accelerate` for spreading the model over all GPUs; `device` is then not used.
            quantization: type of quantised weights of linear layers (`bitsandbytes`); activations are in `dtype`.

        Returns:
            The adapter, its model on `device`.

        Raises:
            ModelError: a file is missing or damaged, the model class is not supported, a package is missing, or the
                model does not fit the devices.
        """
        placement = Placement(device=device, device_map=device_map, quantization=quantization)
        model, processor = load_model(str(path), revision, dtype, placement)
        # The commit on the hub, if there is one, is more exact than a branch.
        commit = getattr(model.config, "_commit_hash", None) or revision or "main"
        return cls(model, processor, identify(model, str(path), "local" if Path(path).is_dir() else commit))

    @property
    def device(self) -> torch.device:
        """Device of the language-model head."""
        return cast(Tensor, self.lm_head.weight).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return cast(Tensor, self.lm_head.weight).dtype

    @property
    def image_token_id(self) -> int | None:
        """Token id of the image token; None for text models."""
        return None if self._encoder.images is None else self._encoder.images.token_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: those of the tokenizer and of the generation config (Gemma: end of turn)."""
        settings = self.model.generation_config
        own = None if settings is None else settings.eos_token_id
        named = (self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]))
        return tuple(dict.fromkeys(token for token in named if token is not None))

    @property
    def image_processor(self) -> Any:
        """Hugging Face image processor; None for text models."""
        return None if self._encoder.images is None else self._encoder.images.image_processor

    def attn(self, layer: int) -> nn.Module:
        """Self-attention of a layer."""
        return self.structure.layers[layer].attn

    def attn_norm(self, layer: int) -> nn.Module:
        """Norm before the attention of a layer."""
        return self.structure.layers[layer].attn_norm

    def mlp_norm(self, layer: int) -> nn.Module:
        """Norm before the MLP of a layer."""
        return self.structure.layers[layer].mlp_norm

    def mlp(self, layer: int) -> nn.Module:
        """MLP of a layer; its output is that of the branch unless a norm follows (Gemma): see site `mlp_out`."""
        return self.structure.layers[layer].mlp

    def v_proj(self, layer: int) -> nn.Module:
        """Value projection of a layer, weight [n_kv_heads * head_dim, d_model]."""
        return self.structure.layers[layer].v_proj

    def o_proj(self, layer: int) -> nn.Module:
        """Output projection of a layer's attention, weight [d_model, n_heads * head_dim]."""
        return self.structure.layers[layer].o_proj

    def site_names(self) -> tuple[str, ...]:
        """Sites that can be read or edited, in the order of the forward pass; docs/models.md lists their tensors."""
        return self.sites.names

    def token_text(self, token_id: int) -> str:
        """Text of one vocabulary id."""
        return token_text(self.tokenizer, token_id)

    def format_prompt(self, question: str, n_images: int = 0) -> str:
        """Formats a question as a prompt for `prepare`; logs `prompt_format=` chat_template, plain or as_given.

        Args:
            question: plain text, which the model's chat template formats as the user's turn; without a template, image
                placeholders are put in front of it. Text with a placeholder, with special tokens or with the template's
                ending is used as it is.
            n_images: number of images that come with it.

        Returns:
            A prompt with exactly one placeholder per image.

        Raises:
            InputError: the text has another number of placeholders, the model takes no images, or the template fails.
        """
        return self._formatter.apply(question, n_images)

    def prepare(
        self, prompt: str, images: Sequence[Image.Image] = (), answer: str | Sequence[int] | None = None
    ) -> PromptInputs:
        """Tokenizes a prompt with its images and optionally its answer, as a batch of one.

        Args:
            prompt: formatted text with one placeholder (such as `<image>`) per image; see `format_prompt`.
            images: PIL images in the order of their placeholders.
            answer: text that follows the prompt, tokenized on its own, plus an end-of-sequence token; or token ids,
                for instance from `generate`, used unchanged.

        Returns:
            The batch on the model's device. A beginning-of-sequence token comes first, exactly once, if the tokenizer
            has one.

        Raises:
            InputError: the number of placeholders is not that of the images, or the model takes no images.
            ModelError: the image size of the image processor is not that of the vision tower.
        """
        inputs = self._encoder.encode(prompt, images, answer)
        model_inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.model_inputs.items()
        }
        tokens = TokenTable(**{name: value.to(self.device) for name, value in vars(inputs.tokens).items()})
        start = inputs.answer_start.to(self.device)
        return replace(inputs, model_inputs=model_inputs, tokens=tokens, answer_start=start)

    @property
    def size_matters(self) -> bool:
        """True if the number of tokens of an image depends on its size."""
        return self._encoder.images is not None and self._encoder.images.size_matters

    def count_tokens(
        self,
        prompt: str,
        images: int | Sequence[tuple[int, int]] = 0,
        answer: str | Sequence[int] | None = None,
    ) -> int:
        """Number of tokens that `prepare` would give, without decoding images.

        Args:
            prompt: see `prepare`.
            images: height and width of each image in pixels; their number is enough if `size_matters` is false.
            answer: see `prepare`.

        Returns:
            Number of tokens of prompt, images and answer.

        Raises:
            InputError: as for `prepare`; or sizes are needed and not given.
        """
        return self._encoder.count(prompt, images, answer)

    def collate(self, batch: Sequence[PromptInputs]) -> PromptInputs:
        """Concatenates batches, padded on the left.

        Args:
            batch: at least one batch, for instance from `prepare`.

        Returns:
            A batch of all prompts in order; S is the greatest length.
        """
        images = self._encoder.images
        return collate(batch, self._pad_id(), 0 if images is None else images.join_axis)

    def forward(self, inputs: PromptInputs) -> Tensor:
        """Runs the model once.

        Args:
            inputs: N prompts.

        Returns:
            Logits [N,S,V] in the model's dtype, with gradients where the caller enables them.
        """
        return self.model(**inputs.model_inputs, use_cache=False).logits

    def generate(self, inputs: PromptInputs, max_new_tokens: int) -> list[list[int]]:
        """Continues each prompt greedily with a key-value cache.

        Args:
            inputs: N prompts without answers.
            max_new_tokens: most tokens to add, > 0.

        Returns:
            New token ids of each prompt, up to and including the end token if it was generated.

        Raises:
            InputError: max_new_tokens is not positive.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=self._pad_id(),
            use_cache=True,
        )
        # generate() derives position ids from the attention mask at each step; these cover the prompt only.
        arguments = {name: value for name, value in inputs.model_inputs.items() if name != "position_ids"}
        with torch.no_grad():
            ids = self.model.generate(**arguments, generation_config=settings)
        new = ids[:, inputs.model_inputs["input_ids"].shape[1] :].tolist()
        ends = (next((place for place, token in enumerate(row) if token in self.end_ids), len(row)) for row in new)
        return [row[: end + 1] for row, end in zip(new, ends, strict=True)]

    def _pad_id(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else (eos or 0)

    def _prompt_encoder(self, architecture: Architecture, image_processor: Any) -> PromptEncoder:
        images = None
        if architecture.image_tokens is not None:
            images = architecture.image_tokens(self.model, self.tokenizer, image_processor)
        return PromptEncoder(model_name=self.identity.name, tokenizer=self.tokenizer, images=images)
