"""Images to model inputs: pixels for the vision tower, and the row and column of each image token.

Families of vision-language models split images in different ways. For each, an `ImageTokens` replaces the placeholder
of an image in the prompt by text with one image token per block of patches; the block lists the row and column of each
of its tokens in the grid of the image. Only PIL image processors are used: processors that expand prompts need
torchvision for some models. If a model sees an image twice, whole at low resolution and in parts at high resolution,
the grid is the fine one, and a token of the coarse view has the row and column of its centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image

#: Row and column of a token's patch; NO_PATCH for a class token or the end of a row.
Patch = tuple[int, int]
NO_PATCH: Patch = (-1, -1)


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """Text and patches of an image in a prompt.

    Attributes:
        text: replaces the placeholder; has one image token per block.
        blocks: patch of each token that an image token expands to, by image token.
    """

    text: str
    blocks: tuple[tuple[Patch, ...], ...]


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """The images of one prompt.

    Attributes:
        model_inputs: inputs of the model beside the tokens; pixels are float32.
        texts: text and patches of each image.
    """

    model_inputs: dict[str, Tensor]
    texts: tuple[ImageText, ...]


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Turns images into tokens for one model; a subclass per way of splitting images.

    Attributes:
        model_name: for error messages.
        image_processor: Hugging Face image processor; None if the model was loaded without one and takes no images.
        token: the image token as text.
        token_id: its vocabulary id.
        placeholder: text that marks the place of an image in a prompt.
        marks: text before and after a placeholder in the notation of the model.
        grid: rows and columns of tokens of one view of the tower; zeros if they depend on the image.
        view_size: height and width in pixels of one view; zeros if they depend on the image.
        size_matters: whether the number of tokens depends on the size of the image.
        join_axis: axis along which the model inputs of several prompts are concatenated.
        type_ids: name of the model input that is 1 at image tokens and 0 at text, if the model has one.
        counts_positions: whether the model computes position ids itself, along rows and columns of images.
    """

    model_name: str
    image_processor: Any
    token: str
    token_id: int
    placeholder: str
    marks: tuple[str, str] = ("", "")
    grid: Patch = (0, 0)
    view_size: Patch = (0, 0)
    size_matters: bool = False
    join_axis: int = 0
    type_ids: str | None = None
    counts_positions: bool = False

    @property
    def written(self) -> str:
        """An image as it is written in a prompt: its placeholder between its marks."""
        return self.placeholder.join(self.marks)

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """Pixels and tokens of the images of one prompt.

        Args:
            images: at least one RGB image.

        Raises:
            ModelError: the image size of the image processor is not that of the vision tower.
        """
        raise NotImplementedError

    def _process(self, images: Sequence[Image.Image], **settings: Any) -> dict[str, Any]:
        return dict(self.image_processor(list(images), return_tensors="pt", **settings))

    def _require_view_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[-2:]) != self.view_size:
            found, expected = "x".join(map(str, pixels.shape[-2:])), "x".join(map(str, self.view_size))
            raise ModelError(
                f"{self.model_name}: its image processor makes {found} pixels, its vision tower takes {expected}; "
                f"correct the size in preprocessor_config.json or processor_config.json"
            )


MakeImageTokens = Callable[[Any, Any, Any], ImageTokens]


@dataclass(frozen=True, kw_only=True)
class OneView(ImageTokens):
    """Every image is resized to one view (LLaVA-1.5, Gemma 3).

    Attributes:
        has_class_token: whether the class token of the tower comes before the patches.
        before: text before the tokens of an image.
        after: text after them.
    """

    has_class_token: bool = False
    before: str = ""
    after: str = ""

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """See `ImageTokens.encode`."""
        pixels = self._process(images)["pixel_values"]
        if len(pixels) != len(images):
            raise ModelError(f"{self.model_name}: {len(images)} images become {len(pixels)}; set do_pan_and_scan false")
        self._require_view_size(pixels)
        block = (NO_PATCH,) * self.has_class_token + rows_of(self.grid)
        text = ImageText(text=f"{self.before}{self.token}{self.after}", blocks=(block,))
        return EncodedImages(model_inputs={"pixel_values": pixels}, texts=(text,) * len(images))


@dataclass(frozen=True, kw_only=True)
class AnyResolution(ImageTokens):
    """An image is encoded whole and, at the best of several resolutions, in parts without padding (LLaVA-Next).

    Attributes:
        resolutions: the model's `image_grid_pinpoints`.
    """

    resolutions: tuple[Patch, ...]

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """See `ImageTokens.encode`."""
        inputs = self._process(images)
        self._require_view_size(inputs["pixel_values"])
        texts = tuple(self._text(size) for size in inputs["image_sizes"].tolist())
        return EncodedImages(model_inputs={n: inputs[n] for n in ("pixel_values", "image_sizes")}, texts=texts)

    def _text(self, size: Sequence[int]) -> ImageText:
        from transformers.models.llava_next import modeling_llava_next as official

        parts = official.get_anyres_image_grid_shape(tuple(size), list(self.resolutions), self.view_size[0])
        padded = torch.empty(1, parts[0] * self.grid[0], parts[1] * self.grid[1])
        _, rows, cols = official.unpad_image(padded, tuple(size)).shape
        # Each row ends with a learned vector.
        fine = tuple((row, col) if col < cols else NO_PATCH for row in range(rows) for col in range(cols + 1))
        return ImageText(text=self.token, blocks=(coarse_view(self.grid, (rows, cols)) + fine,))


@dataclass(frozen=True, kw_only=True)
class MergedGrid(ImageTokens):
    """An image keeps its shape; square groups of patches are merged into tokens (Qwen2-VL, 2.5 and 3).

    Attributes:
        merge: side of a group in patches.
    """

    merge: int

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """See `ImageTokens.encode`."""
        inputs = self._process(images)
        grids = [(rows // self.merge, cols // self.merge) for _, rows, cols in inputs["image_grid_thw"].tolist()]
        texts = tuple(ImageText(text=self.token, blocks=(rows_of(grid),)) for grid in grids)
        return EncodedImages(model_inputs={n: inputs[n] for n in ("pixel_values", "image_grid_thw")}, texts=texts)


@dataclass(frozen=True, kw_only=True)
class SplitGrid(ImageTokens):
    """An image is split into views, each after its row and column as text, then encoded whole (Idefics3, SmolVLM)."""

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """See `ImageTokens.encode`."""
        # Nested list: the images of one prompt. The second axis holds the views of all images.
        inputs = dict(self.image_processor([list(images)], return_tensors="pt", return_row_col_info=True))
        self._require_view_size(inputs["pixel_values"])
        parts = zip(inputs["rows"][0], inputs["cols"][0], strict=True)
        texts = tuple(self._text(int(rows), int(cols)) for rows, cols in parts)
        return EncodedImages(model_inputs={n: inputs[n] for n in ("pixel_values", "pixel_attention_mask")}, texts=texts)

    def _text(self, n_rows: int, n_cols: int) -> ImageText:
        mark = "<fake_token_around_image>"
        whole = f"{mark}<global-img>{self.token}{mark}"
        if n_rows == 0:
            return ImageText(text=whole, blocks=(rows_of(self.grid),))
        height, width = self.grid
        lines, blocks = [], []
        for row in range(n_rows):
            lines.append("".join(f"{mark}<row_{row + 1}_col_{col + 1}>{self.token}" for col in range(n_cols)) + "\n")
            blocks += [
                tuple((row * height + r, col * width + c) for r, c in rows_of(self.grid)) for col in range(n_cols)
            ]
        blocks.append(coarse_view(self.grid, (n_rows * height, n_cols * width)))
        return ImageText(text="".join(lines) + "\n" + whole, blocks=tuple(blocks))


def rows_of(grid: Patch) -> tuple[Patch, ...]:
    """All patches of a grid, row by row."""
    return tuple((row, col) for row in range(grid[0]) for col in range(grid[1]))


def coarse_view(grid: Patch, fine: Patch) -> tuple[Patch, ...]:
    """Patches of a view of the whole image, each as the patch of a finer grid at its centre."""
    return tuple(
        (int((row + 0.5) * fine[0] / grid[0]), int((col + 0.5) * fine[1] / grid[1])) for row, col in rows_of(grid)
    )


def _common(model: Any, tokenizer: Any, image_processor: Any) -> dict[str, Any]:
    token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    return {
        "model_name": type(model).__name__,
        "image_processor": image_processor,
        "token": token,
        "token_id": model.config.image_token_id,
        "placeholder": token,
    }


def _view(model: Any, merge: int = 1) -> dict[str, Any]:
    """Size of a view in pixels and in tokens, from the config of the vision tower."""
    vision = model.config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    side = vision.patch_size * merge
    return {"view_size": (height, width), "grid": (height // side, width // side)}


def _llava(model: Any, tokenizer: Any, image_processor: Any) -> ImageTokens:
    has_class_token = model.config.vision_feature_select_strategy == "full"
    return OneView(**_common(model, tokenizer, image_processor), **_view(model), has_class_token=has_class_token)


def _llava_next(model: Any, tokenizer: Any, image_processor: Any) -> ImageTokens:
    resolutions = tuple((height, width) for height, width in model.config.image_grid_pinpoints)
    common = _common(model, tokenizer, image_processor)
    return AnyResolution(**common, **_view(model), size_matters=True, resolutions=resolutions)


def _qwen_vl(model: Any, tokenizer: Any, image_processor: Any) -> ImageTokens:
    start, end = tokenizer.convert_ids_to_tokens([model.config.vision_start_token_id, model.config.vision_end_token_id])
    return MergedGrid(
        **_common(model, tokenizer, image_processor),
        marks=(start, end),
        size_matters=True,
        type_ids="mm_token_type_ids",
        counts_positions=True,
        merge=model.config.vision_config.spatial_merge_size,
    )


def _gemma3(model: Any, tokenizer: Any, image_processor: Any) -> ImageTokens:
    config = model.config
    side = math.isqrt(config.mm_tokens_per_image)
    start, end = tokenizer.convert_ids_to_tokens([config.boi_token_index, config.eoi_token_index])
    view = _view(model) | {"grid": (side, side)}
    common = _common(model, tokenizer, image_processor) | {"placeholder": start}
    return OneView(**common, **view, type_ids="token_type_ids", before=f"\n\n{start}", after=f"{end}\n\n")


def _idefics3(model: Any, tokenizer: Any, image_processor: Any) -> ImageTokens:
    view = _view(model, merge=model.config.scale_factor)
    return SplitGrid(**_common(model, tokenizer, image_processor), **view, size_matters=True, join_axis=1)


#: Model class -> function that makes its `ImageTokens`.
IMAGE_TOKENS: dict[str, MakeImageTokens] = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Idefics3ForConditionalGeneration": _idefics3,
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "Qwen2VLForConditionalGeneration": _qwen_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen3VLForConditionalGeneration": _qwen_vl,
    "SmolVLMForConditionalGeneration": _idefics3,
}
