"""Prompts and images to model inputs, every token knowing what it is and which image patch it shows.

`ModelAdapter.prepare` and `ModelAdapter.collate` are the public doors. The image placeholder of a prompt is expanded
here, one token per patch of the vision tower's grid, which its configuration gives.

Shape letters: N prompts, S prompt length with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt.errors import InputError, ModelError
from clt.records import Modality, TokenTable

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """N prompts as the model takes them; padding is on the left.

    Attributes:
        model_inputs: keyword arguments of the model: input_ids, attention_mask, position_ids [N,S] int64 and, where
            there are images, pixel_values [images,3,height,width].
        tokens: [N,S] where each token comes from; modality PAD and position -1 for padding.
        answer_start: [N] int64, column of the first answer token; S when there is no answer.
        images: the pictures of each prompt.
        prompts: the prompts as text.
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

    @property
    def answer_mask(self) -> Tensor:
        """[N,S] bool: columns whose next token is an answer token or the end of sequence, those that predict it."""
        length = self.tokens.modality.shape[1]
        column = torch.arange(length, device=self.answer_start.device)
        return (column >= self.answer_start[:, None] - 1) & (column < length - 1)


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One token of a prompt before it becomes tensors."""

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
        image_processor: Hugging Face image processor; None for text models.
        image_token_id: vocabulary id of the image placeholder; None for text models.
        image_size: height and width in pixels of what the vision tower takes; zeros for text models.
        patch_size: side of a patch in pixels.
        has_class_token: a class token of the vision tower comes before the patches of each image.
    """

    model_name: str
    tokenizer: Any
    image_processor: Any
    image_token_id: int | None
    image_size: tuple[int, int]
    patch_size: int
    has_class_token: bool

    def count(self, prompt: str, n_images: int, answer: str | None) -> int:
        """Number of tokens that `encode` would give, without looking at the images."""
        rows, cols = self._grid()
        ids = self._prompt_ids(prompt, n_images)
        return len(ids) + n_images * (rows * cols + self.has_class_token - 1) + len(self._answer_ids(answer))

    def encode(self, prompt: str, images: Sequence[Image.Image], answer: str | None) -> PromptInputs:
        """A batch of one on the CPU, pixels in float32; see `ModelAdapter.prepare`."""
        ids = self._prompt_ids(prompt, len(images))
        pixels = self._pixels(images)
        columns: list[_Column] = []
        image = 0
        for index, token_id in enumerate(ids):
            if pixels is not None and token_id == self.image_token_id:
                columns += self._image_columns(image)
                image += 1
            else:
                bos = index == 0 and token_id == self.tokenizer.bos_token_id
                columns.append(_Column(token_id=token_id, modality=Modality.BOS if bos else Modality.TEXT))
        answer_start = len(columns)
        columns += [_Column(token_id=token_id) for token_id in self._answer_ids(answer)]
        return _batch_of_one(columns, pixels, answer_start, tuple(images), prompt)

    def _prompt_ids(self, prompt: str, n_images: int) -> list[int]:
        ids = [*self.tokenizer(prompt)["input_ids"]]
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            first_other = next((index for index, token_id in enumerate(ids) if token_id != bos), len(ids))
            ids = [bos, *ids[first_other:]]
        if n_images and (self.image_token_id is None or self.image_processor is None):
            raise InputError(f"{self.model_name} takes no images; {_quoted(prompt)} comes with {n_images}")
        found = 0 if self.image_token_id is None else ids.count(self.image_token_id)
        if found != n_images:
            raise InputError(f"{_quoted(prompt)} has {found} image placeholders but {n_images} images; make them equal")
        if not ids:
            raise InputError(f"{_quoted(prompt)} has no tokens; write a prompt")
        return ids

    def _answer_ids(self, answer: str | None) -> list[int]:
        if answer is None:
            return []
        eos = self.tokenizer.eos_token_id
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]

    def _grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor | None:
        if not images:
            return None
        pixels = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        if tuple(pixels.shape[-2:]) != self.image_size:
            found, expected = "x".join(map(str, pixels.shape[-2:])), "x".join(map(str, self.image_size))
            raise ModelError(
                f"{self.model_name}: its image processor makes {found} pixels, its vision tower takes {expected}; "
                f"correct the size in the processor's configuration"
            )
        return pixels

    def _image_columns(self, image: int) -> list[_Column]:
        assert self.image_token_id is not None
        rows, cols = self._grid()
        columns = []
        if self.has_class_token:
            columns.append(_Column(token_id=self.image_token_id, modality=Modality.IMAGE_SPECIAL, image=image))
        for row in range(rows):
            for col in range(cols):
                columns.append(
                    _Column(
                        token_id=self.image_token_id,
                        modality=Modality.IMAGE,
                        patch_row=row,
                        patch_col=col,
                        image=image,
                    )
                )
        return columns


def _batch_of_one(
    columns: list[_Column], pixels: Tensor | None, answer_start: int, images: tuple[Image.Image, ...], prompt: str
) -> PromptInputs:
    def row(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[int(getattr(column, name)) for column in columns]], dtype=dtype)

    position = torch.arange(len(columns))[None]
    tokens = TokenTable(
        sample=torch.zeros_like(position),
        position=position.int(),
        token_id=row("token_id", torch.int32),
        modality=row("modality", torch.uint8),
        patch_row=row("patch_row", torch.int16),
        patch_col=row("patch_col", torch.int16),
        image=row("image", torch.int16),
    )
    model_inputs = {
        "input_ids": tokens.token_id.long(),
        "attention_mask": torch.ones_like(position),
        "position_ids": position,
    }
    if pixels is not None:
        model_inputs["pixel_values"] = pixels
    return PromptInputs(
        model_inputs=model_inputs,
        tokens=tokens,
        answer_start=torch.tensor([answer_start]),
        images=(images,),
        prompts=(prompt,),
    )


def collate(batch: Sequence[PromptInputs], pad_id: int) -> PromptInputs:
    """Joins batches into one, padded on the left to the longest.

    Args:
        batch: at least one batch.
        pad_id: token id written into the padding, which nothing attends to.

    Returns:
        A batch of all their prompts, in order.
    """
    length = max(item.tokens.modality.shape[1] for item in batch)

    def joined(parts: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([nn.functional.pad(part, (length - part.shape[1], 0), value=fill) for part in parts])

    fills = {"sample": 0, "position": -1, "token_id": pad_id, "modality": int(Modality.PAD)}
    fills |= {"patch_row": -1, "patch_col": -1, "image": -1}
    model_inputs = {
        name: joined([item.model_inputs[name] for item in batch], fill)
        for name, fill in (("input_ids", pad_id), ("attention_mask", 0), ("position_ids", 0))
    }
    pixels = [item.model_inputs["pixel_values"] for item in batch if "pixel_values" in item.model_inputs]
    if pixels:
        model_inputs["pixel_values"] = torch.cat(pixels)
    return PromptInputs(
        model_inputs=model_inputs,
        tokens=TokenTable(**{n: joined([getattr(item.tokens, n) for item in batch], f) for n, f in fills.items()}),
        answer_start=torch.cat([item.answer_start + (length - item.tokens.modality.shape[1]) for item in batch]),
        images=tuple(images for item in batch for images in item.images),
        prompts=tuple(prompt for item in batch for prompt in item.prompts),
    )


def _quoted(prompt: str) -> str:
    return f"prompt {prompt[:60]!r}"
