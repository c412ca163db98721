"""Prompts and images to model inputs, with the modality and image patch of every token.

Called through `ModelAdapter.prepare` and `ModelAdapter.collate`. Image placeholders are expanded as defined for the
model's family in `clt.capture.models.image_tokens`.

Shape letters: N prompts, S prompt length with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt.capture.models.image_tokens import NO_PATCH, EncodedImages, ImageText, ImageTokens, Patch
from clt.errors import InputError
from clt.records import Modality, TokenTable

if TYPE_CHECKING:
    from PIL import Image

#: Height and width of an image in pixels.
ImageSize = tuple[int, int]
#: Used where the number of tokens does not depend on the size.
_ANY_SIZE: ImageSize = (64, 64)
#: Model inputs [N,S], padded on the left; all others are of images.
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")


def token_text(tokenizer: Any, token_id: int) -> str:
    """Text of one vocabulary id."""
    return str(tokenizer.decode([token_id]))


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """Model inputs of N prompts, padded on the left.

    Attributes:
        model_inputs: keyword arguments of the model: input_ids, attention_mask, position_ids [N,S] int64 and, where
            there are images, pixel_values in the model's own shape ([images,3,height,width] in LLaVA).
        tokens: [N,S] modality, position and image patch of each token; padding has modality PAD and position -1.
        answer_start: [N] int64, column of the first answer token; S without an answer.
        images: PIL images of each prompt.
        prompts: texts of the prompts.
    """

    model_inputs: dict[str, Tensor]
    tokens: TokenTable
    answer_start: Tensor
    images: tuple[tuple[Image.Image, ...], ...]
    prompts: tuple[str, ...]

    @property
    def real_mask(self) -> Tensor:
        """[N,S] bool: tokens that are not padding."""
        return self.tokens.modality != Modality.PAD

    def grid(self, prompt: int, image: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of a prompt."""
        tokens = self.tokens.select(prompt)
        patches = tokens.image == image
        return int(tokens.patch_row[patches].max()) + 1, int(tokens.patch_col[patches].max()) + 1

    @property
    def answer_mask(self) -> Tensor:
        """[N,S] bool: columns that predict an answer token, the end of sequence included."""
        length = self.tokens.modality.shape[1]
        column = torch.arange(length, device=self.answer_start.device)
        return (column >= self.answer_start[:, None] - 1) & (column < length - 1)


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A token of a prompt, before conversion to tensors."""

    token_id: int
    modality: Modality = Modality.TEXT
    patch_row: int = -1
    patch_col: int = -1
    image: int = -1


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns prompts into `PromptInputs` for one model.

    Attributes:
        model_name: for error messages.
        tokenizer: Hugging Face tokenizer.
        images: conversion of images to tokens; None for text models.
    """

    model_name: str
    tokenizer: Any
    images: ImageTokens | None
    _texts_of_sizes: dict[ImageSize, ImageText] = field(default_factory=dict, init=False, repr=False, compare=False)

    def count(self, prompt: str, images: int | Sequence[ImageSize], answer: str | Sequence[int] | None) -> int:
        """Number of tokens that `encode` would give, without decoding images.

        Args:
            prompt: formatted text with one placeholder per image.
            images: sizes of the images; their number is enough if `size_matters` is false.
            answer: text or token ids after the prompt.

        Returns:
            Number of tokens of prompt, images and answer.

        Raises:
            InputError: the placeholders do not match the images, or sizes are needed and not given.
        """
        sizes: Sequence[ImageSize] = [_ANY_SIZE] * images if isinstance(images, int) else images
        if isinstance(images, int) and images and self.images is not None and self.images.size_matters:
            raise InputError(f"{self.model_name}: the number of tokens of an image depends on its size; give the sizes")
        return len(self._columns(prompt, [self._text_of_size(size) for size in sizes])) + len(self._answer_ids(answer))

    def encode(self, prompt: str, images: Sequence[Image.Image], answer: str | Sequence[int] | None) -> PromptInputs:
        """Tokenizes a prompt; see `ModelAdapter.prepare`.

        Args:
            prompt: formatted text with one placeholder per image.
            images: PIL images in the order of their placeholders.
            answer: text or token ids after the prompt.

        Returns:
            A batch of one on the CPU, pixels in float32.

        Raises:
            InputError: the placeholders do not match the images.
            ModelError: the image size of the image processor is not that of the vision tower.
        """
        encoded = EncodedImages(model_inputs={}, texts=())
        if images:
            encoded = self.image_tokens(prompt, len(images)).encode([image.convert("RGB") for image in images])
        columns = self._columns(prompt, encoded.texts)
        answer_start = len(columns)
        columns += [_Column(token_id=token_id) for token_id in self._answer_ids(answer)]
        tokens = _token_table(columns)
        return PromptInputs(
            model_inputs=self._token_inputs(tokens) | encoded.model_inputs,
            tokens=tokens,
            answer_start=torch.tensor([answer_start]),
            images=(tuple(images),),
            prompts=(prompt,),
        )

    def image_tokens(self, prompt: str, n_images: int) -> ImageTokens:
        """Conversion of images to tokens; InputError for a model that takes no images."""
        if self.images is None or self.images.image_processor is None:
            raise InputError(f"{self.model_name} takes no images; {quoted(prompt)} comes with {n_images}")
        return self.images

    def split(self, prompt: str, n_images: int) -> list[str]:
        """Cuts a prompt at its image placeholders; InputError unless it has one per image."""
        if n_images:
            self.image_tokens(prompt, n_images)
        pieces = [prompt] if self.images is None else prompt.split(self.images.placeholder)
        if len(pieces) - 1 != n_images:
            counts = f"{len(pieces) - 1} image placeholders but {n_images} images"
            raise InputError(f"{quoted(prompt)} has {counts}; make them equal")
        return pieces

    def _columns(self, prompt: str, texts: Sequence[ImageText]) -> list[_Column]:
        """Tokens of the prompt, image tokens included."""
        blocks = [(number, block) for number, text in enumerate(texts) for block in text.blocks]
        columns: list[_Column] = []
        for index, token_id in enumerate(self._prompt_ids(prompt, texts)):
            if self.images is not None and token_id == self.images.token_id:
                if self.images.counts_positions and columns and columns[-1].image >= 0:
                    # The model would take the two for one image and compute wrong position ids.
                    raise InputError(f"{quoted(prompt)} has an image right after an image; write text between them")
                columns += self._block_columns(*blocks.pop(0))
            else:
                bos = index == 0 and token_id == self.tokenizer.bos_token_id
                columns.append(_Column(token_id=token_id, modality=Modality.BOS if bos else Modality.TEXT))
        return columns

    def _prompt_ids(self, prompt: str, texts: Sequence[ImageText]) -> list[int]:
        """Token ids with one image token per block of patches."""
        pieces = self.split(prompt, len(texts))
        written = "".join(piece + text for piece, text in zip(pieces, [*(t.text for t in texts), ""], strict=True))
        ids = [*self.tokenizer(written)["input_ids"]]
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            first_other = next((index for index, token_id in enumerate(ids) if token_id != bos), len(ids))
            ids = [bos, *ids[first_other:]]
        n_blocks = sum(len(text.blocks) for text in texts)
        if self.images is not None and ids.count(self.images.token_id) != n_blocks:
            found = ids.count(self.images.token_id)
            raise InputError(f"{quoted(prompt)} becomes {found} image tokens, expected {n_blocks}; check the tokenizer")
        if not ids:
            raise InputError(f"{quoted(prompt)} has no tokens; write a prompt")
        return ids

    def _answer_ids(self, answer: str | Sequence[int] | None) -> list[int]:
        if not isinstance(answer, str):
            return [] if answer is None else [*answer]
        eos = self.tokenizer.eos_token_id
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]

    def _text_of_size(self, size: ImageSize) -> ImageText:
        """Text and patches of an image of a size, from a blank image, cached by size."""
        if size not in self._texts_of_sizes:
            from PIL import Image

            blank = Image.new("RGB", (size[1], size[0]))
            self._texts_of_sizes[size] = self.image_tokens("a prompt", 1).encode([blank]).texts[0]
        return self._texts_of_sizes[size]

    def _block_columns(self, image: int, block: Sequence[Patch]) -> list[_Column]:
        assert self.images is not None
        return [
            _Column(
                token_id=self.images.token_id,
                modality=Modality.IMAGE_SPECIAL if (row, col) == NO_PATCH else Modality.IMAGE,
                patch_row=row,
                patch_col=col,
                image=image,
            )
            for row, col in block
        ]

    def _token_inputs(self, tokens: TokenTable) -> dict[str, Tensor]:
        inputs = {"input_ids": tokens.token_id.long(), "attention_mask": torch.ones_like(tokens.token_id.long())}
        if self.images is None or not self.images.counts_positions:
            inputs["position_ids"] = tokens.position.long()
        if self.images is not None and self.images.type_ids is not None:
            inputs[self.images.type_ids] = (tokens.image >= 0).long()
        return inputs


def _token_table(columns: Sequence[_Column]) -> TokenTable:
    def row(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[int(getattr(column, name)) for column in columns]], dtype=dtype)

    position = torch.arange(len(columns))[None]
    return TokenTable(
        sample=torch.zeros_like(position),
        position=position.int(),
        token_id=row("token_id", torch.int32),
        modality=row("modality", torch.uint8),
        patch_row=row("patch_row", torch.int16),
        patch_col=row("patch_col", torch.int16),
        image=row("image", torch.int16),
    )


def collate(batch: Sequence[PromptInputs], pad_id: int, image_axis: int = 0) -> PromptInputs:
    """Concatenates batches, padded on the left to the longest.

    Args:
        batch: at least one batch.
        pad_id: token id of the padding, which is masked.
        image_axis: axis along which the model inputs of images are concatenated.

    Returns:
        A batch of all prompts, in order.
    """
    length = max(item.tokens.modality.shape[1] for item in batch)

    def joined(parts: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([nn.functional.pad(part, (length - part.shape[1], 0), value=fill) for part in parts])

    fills = {"sample": 0, "position": -1, "token_id": pad_id, "modality": int(Modality.PAD)}
    fills |= {"patch_row": -1, "patch_col": -1, "image": -1}
    model_inputs = {}
    for name in dict.fromkeys(name for item in batch for name in item.model_inputs):
        parts = [item.model_inputs[name] for item in batch if name in item.model_inputs]
        if name in _TOKEN_INPUTS:
            model_inputs[name] = joined(parts, pad_id if name == "input_ids" else 0)
        else:
            model_inputs[name] = _join_images(parts, image_axis)
    return PromptInputs(
        model_inputs=model_inputs,
        tokens=TokenTable(**{n: joined([getattr(item.tokens, n) for item in batch], f) for n, f in fills.items()}),
        answer_start=torch.cat([item.answer_start + (length - item.tokens.modality.shape[1]) for item in batch]),
        images=tuple(images for item in batch for images in item.images),
        prompts=tuple(prompt for item in batch for prompt in item.prompts),
    )


def _join_images(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenates along an axis; other axes are padded with zeros, for images with fewer views (LLaVA-Next)."""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [0 if a == axis else shape[a] - part.shape[a] for a in range(part.ndim)]
        padded.append(nn.functional.pad(part, [n for count in reversed(missing) for n in (0, count)]))
    return torch.cat(padded, dim=axis)


def quoted(prompt: str) -> str:
    """The beginning of a prompt, for error messages."""
    return f"prompt {prompt[:60]!r}"
