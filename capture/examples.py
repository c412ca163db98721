"""Where prompts come from: the toy tasks, or a JSON-lines file with images beside it.

A source knows the text of all its examples at once, which is what planning a capture needs, and decodes the images of
one example at a time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT
from clt.errors import InputError


@plain_dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with its images, ready for `ModelAdapter.prepare`.

    Attributes:
        example_id: unique within its source.
        prompt: formatted text with one `<image>` per image.
        images: RGB pictures.
        answer: text that follows the prompt, or None.
    """

    example_id: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None


@plain_dataclass(frozen=True, kw_only=True)
class ExampleText:
    """An example without its pictures.

    Attributes:
        example_id: unique within its source.
        prompt: formatted text with one `<image>` per image.
        n_images: how many pictures it has.
        answer: text that follows the prompt, or None.
    """

    example_id: str
    prompt: str
    n_images: int
    answer: str | None


class ExampleSource(Protocol):
    """A fixed list of examples; their texts are at hand, their images are loaded one example at a time."""

    texts: tuple[ExampleText, ...]

    def load(self, index: int) -> Example:
        """The example of that number; InputError when an image cannot be decoded."""

    def digest(self) -> str:
        """Hex digest of everything that decides the examples, image pixels apart."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToySource:
    """Procedurally drawn boards; see `clt.capture.toy`."""

    n: int = Field(gt=0)
    """Number of examples."""
    seed: int = 0
    """Different seeds give different images."""
    tasks: tuple[str, ...] | None = None
    """Tasks to draw from; absent: those of the base toy model."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonlSource:
    """One JSON object per line: `prompt`, and optionally `id`, `image` (a file name or a list of them) and `answer`."""

    file: Path
    """The JSON-lines file."""
    image_dir: Path | None = None
    """Folder of the images; absent: the folder of `file`."""
    prompt_template: str = "{prompt}"
    """Text around each prompt, such as "USER: <image>\\n{prompt} ASSISTANT:"."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many lines only."""

    @model_validator(mode="after")
    def _has_place_for_the_prompt(self) -> JsonlSource:
        if "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template has no {prompt}; write where the prompt goes")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceSettings:
    """Where the examples come from: exactly one of the keys."""

    toy: ToySource | None = None
    """Procedurally drawn boards."""
    jsonl: JsonlSource | None = None
    """A JSON-lines file."""

    @model_validator(mode="after")
    def _is_one(self) -> SourceSettings:
        if (self.toy is None) == (self.jsonl is None):
            raise ValueError("give exactly one of toy and jsonl")
        return self


def open_source(settings: SourceSettings) -> ExampleSource:
    """Opens the source that the settings name.

    Args:
        settings: exactly one source.

    Returns:
        Its examples.

    Raises:
        InputError: a file cannot be read, or a toy task is unknown.
    """
    if settings.toy is not None:
        return _ToyExamples(settings.toy)
    assert settings.jsonl is not None
    return _JsonlExamples(settings.jsonl)


def load_image(path: Path | str) -> Image.Image:
    """Decodes an image file whole.

    Args:
        path: any format that Pillow reads.

    Returns:
        An RGB image, turned upright as its EXIF data says.

    Raises:
        InputError: the file is missing, or is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow reports damaged PNG data as a SyntaxError, and absurd sizes as a decompression bomb.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: the image cannot be decoded ({reason}); repair or remove it") from None


class _ToyExamples:
    def __init__(self, settings: ToySource) -> None:
        # clt.capture.toy builds on Example above, so it is imported when it is needed.
        from clt.capture.toy import TASKS, toy_samples

        self._seed = settings.seed
        self._samples = toy_samples(settings.n, settings.seed, settings.tasks if settings.tasks is not None else TASKS)
        self.texts = tuple(
            ExampleText(example_id=self._id(i), prompt=sample.prompt, n_images=1, answer=sample.answer)
            for i, sample in enumerate(self._samples)
        )

    def load(self, index: int) -> Example:
        return self._samples[index].to_example(self._id(index))

    def digest(self) -> str:
        return _digest([repr(sample) for sample in self._samples])

    def _id(self, index: int) -> str:
        return f"toy-{self._seed}-{index:06d}"


class _JsonlExamples:
    def __init__(self, settings: JsonlSource) -> None:
        self._folder = settings.image_dir if settings.image_dir is not None else settings.file.parent
        texts, names = [], []
        for number, record in _read_jsonl(settings.file, settings.limit):
            where = f"{settings.file}:{number}"
            images = _strings(record.get("image"), where)
            answer = record.get("answer")
            if not isinstance(record.get("prompt"), str) or not isinstance(answer, str | None):
                raise InputError(f"{where}: 'prompt' must be a text, and 'answer' a text if there is one")
            texts.append(
                ExampleText(
                    example_id=str(record.get("id", number)),
                    prompt=settings.prompt_template.replace("{prompt}", record["prompt"]),
                    n_images=len(images),
                    answer=answer,
                )
            )
            names.append(images)
        if not texts:
            raise InputError(f"{settings.file}: no examples in the file")
        self.texts = tuple(texts)
        self._names = names

    def load(self, index: int) -> Example:
        text = self.texts[index]
        images = tuple(load_image(self._folder / name) for name in self._names[index])
        return Example(example_id=text.example_id, prompt=text.prompt, images=images, answer=text.answer)

    def digest(self) -> str:
        return _digest([repr(pair) for pair in zip(self.texts, self._names, strict=True)])


def _read_jsonl(path: Path, limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); check source.jsonl.file") from None
    records: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if len(records) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error}); each line must hold one object") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        records.append((number, record))
    return records


def _strings(value: Any, where: str) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: 'image' must be a file name or a list of file names")
    return tuple(names)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
