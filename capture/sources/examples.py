"""Examples of a source: the toy tasks, JSON files, a folder of images, or a dataset.

A source holds the texts of all examples, which planning a capture needs, and decodes images one example at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from PIL import ExifTags, Image, ImageOps

from clt.capture.models.prompts import ImageSize
from clt.capture.sources.settings import JsonlSource, SourceSettings, ToySource
from clt.errors import InputError

__all__ = [
    "Example",
    "ExampleSource",
    "ExampleText",
    "JsonlSource",
    "SourceSettings",
    "ToySource",
    "image_size",
    "load_image",
    "load_images",
    "open_source",
]

#: An image as a user gives it: a path or a PIL image.
ImageLike = str | Path | Image.Image
#: EXIF orientations that rotate an image by a quarter turn.
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with its images, ready for `ModelAdapter.prepare`.

    Attributes:
        example_id: unique within its source.
        prompt: formatted text with one `<image>` per image.
        images: RGB images.
        answer: text that follows the prompt, or None.
    """

    example_id: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExampleText:
    """An example without its images.

    Attributes:
        example_id: unique within its source.
        prompt: formatted text with one `<image>` per image.
        n_images: number of images.
        answer: text that follows the prompt, or None.
    """

    example_id: str
    prompt: str
    n_images: int
    answer: str | None


class ExampleSource(Protocol):
    """A fixed list of examples; texts are in memory, images are loaded one example at a time."""

    texts: tuple[ExampleText, ...]

    def load(self, index: int) -> Example:
        """Loads an example; InputError if an image cannot be decoded."""

    def sizes(self, index: int) -> tuple[ImageSize, ...]:
        """Sizes of the images of an example, from their headers; InputError if one is not an image."""

    def digest(self) -> str:
        """Hex digest of the examples, without image pixels."""


def open_source(settings: SourceSettings) -> ExampleSource:
    """Opens a source.

    Args:
        settings: settings of exactly one source.

    Returns:
        Its examples.

    Raises:
        InputError: a file or a dataset cannot be read, or a toy task is unknown.
    """
    # These modules import Example from this one.
    from clt.capture.sources.file_sources import open_folder, open_json, open_jsonl
    from clt.capture.sources.hf_datasets import DatasetExamples

    if settings.toy is not None:
        return _ToyExamples(settings.toy)
    if settings.jsonl is not None:
        return open_jsonl(settings.jsonl)
    if settings.json is not None:
        return open_json(settings.json)
    if settings.folder is not None:
        return open_folder(settings.folder)
    assert settings.dataset is not None
    return DatasetExamples(settings.dataset)


def load_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """The images of one prompt.

    Args:
        images: an image or several, each a path or a PIL image.

    Returns:
        RGB images, turned upright by their EXIF orientation.

    Raises:
        InputError: a file is missing, or is not a complete image; a picture is empty, or of another type.
    """
    several = [images] if isinstance(images, (str, Path, Image.Image)) or not isinstance(images, Iterable) else images
    several = list(several)
    for number, image in enumerate(several):
        if not isinstance(image, (str, Path, Image.Image)):
            kind = type(image).__name__
            raise InputError(f"images[{number}] is of type {kind}; give a path or a PIL image (Image.fromarray)")
        if isinstance(image, Image.Image) and 0 in image.size:
            raise InputError(f"images[{number}] has no pixels (size {image.width} x {image.height}); leave it out")
    return [_upright(image) if isinstance(image, Image.Image) else load_image(image) for image in several]


def load_image(file: Path | str | IO[bytes], name: str | None = None) -> Image.Image:
    """Decodes an image.

    Args:
        file: path or contents, in any format that Pillow reads.
        name: name in error messages; default: the path.

    Returns:
        An RGB image, turned upright by its EXIF orientation.

    Raises:
        InputError: the file is missing, or is not a complete image.
    """
    with _opened(file, name) as image:
        return _upright(image)


def image_size(file: Path | str | IO[bytes], name: str | None = None) -> ImageSize:
    """Height and width of the image from `load_image`, for most formats without decoding; same arguments and errors."""
    with _opened(file, name) as image:
        # Pillow rotates TIFF images itself.
        rotated = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        return (image.width, image.height) if rotated else (image.height, image.width)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _opened(file: Path | str | IO[bytes], name: str | None) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    # Pillow raises SyntaxError for damaged PNG data, and DecompressionBombError for absurd sizes.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name or file}: the image cannot be decoded ({reason}); correct the path, or repair or remove the file"
        ) from None


def text_digest(parts: Sequence[str]) -> str:
    """Hex digest of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _ToyExamples:
    def __init__(self, settings: ToySource) -> None:
        from clt.capture.sources.toy import TASKS, toy_samples

        self._seed = settings.seed
        self._samples = toy_samples(settings.n, settings.seed, settings.tasks if settings.tasks is not None else TASKS)
        self.texts = tuple(
            ExampleText(example_id=self._id(i), prompt=sample.prompt, n_images=1, answer=sample.answer)
            for i, sample in enumerate(self._samples)
        )

    def load(self, index: int) -> Example:
        return self._samples[index].to_example(self._id(index))

    def sizes(self, index: int) -> tuple[ImageSize, ...]:
        return tuple((image.height, image.width) for image in self.load(index).images)

    def digest(self) -> str:
        return text_digest([repr(sample) for sample in self._samples])

    def _id(self, index: int) -> str:
        return f"toy-{self._seed}-{index:06d}"
