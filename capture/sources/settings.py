"""Settings of the source of prompts and images; `clt.capture.sources.examples.open_source` opens it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToySource:
    """Settings of the toy tasks, procedurally drawn boards; see `clt.capture.sources.toy`."""

    n: int = Field(gt=0)
    """Number of examples."""
    seed: int = 0
    """Seed of the boards and questions."""
    tasks: tuple[str, ...] | None = None
    """Tasks to draw from; default: odd, background, exists and describe, the tasks of the base toy model."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ColumnNames:
    """Names of the fields of a row; all but the prompt may be missing."""

    id: str = "id"
    """Field of the example's id, a text or number; rows without it get their number."""
    prompt: str | None = "prompt"
    """Field of the prompt; null: prompt_template is the prompt of every row."""
    image: str = "image"
    """Field of the image or list of images; file names in JSON files."""
    answer: str = "answer"
    """Field of the text that follows the prompt."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowsSource:
    """Settings of a source of rows with named fields."""

    columns: ColumnNames = ColumnNames()
    """Names of the fields."""
    prompt_template: str = "{prompt}"
    """Text in which {prompt} is replaced by each prompt, such as "USER: <image>\\n{prompt} ASSISTANT:"."""
    limit: int | None = Field(default=None, gt=0)
    """Most rows to read; default: all."""

    @model_validator(mode="after")
    def _has_place_for_the_prompt(self) -> RowsSource:
        if self.columns.prompt is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template has no {prompt}; add it, or set columns.prompt: null")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonlSource(RowsSource):
    """Settings of a JSON-lines file, one object per line."""

    file: Path
    """Path of the file."""
    image_dir: Path | None = None
    """Folder of the images; default: the folder of `file`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonSource(RowsSource):
    """Settings of a JSON file with a list of objects, such as AMBER's queries (`columns: {prompt: query}`)."""

    file: Path
    """Path of the file."""
    image_dir: Path | None = None
    """Folder of the images; default: the folder of `file`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderSource:
    """Settings of a folder of images, subfolders included, in the order of their paths, with one prompt for all."""

    path: Path
    """Path of the folder."""
    prompt: str = Field(min_length=1)
    """Prompt of every image, such as "USER: <image>\\nDescribe this image. ASSISTANT:"."""
    limit: int | None = Field(default=None, gt=0)
    """Most images to read; default: all."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasetSource(RowsSource):
    """Settings of a Hugging Face dataset; needs the package `datasets`."""

    name: str
    """Hub name, folder of files for `load_dataset`, or folder written by `save_to_disk`."""
    config: str | None = None
    """Configuration of the dataset; default: its only or default one."""
    split: str = "train"
    """Split; for datasets read by `load_dataset`, slices too, such as "train[:1000]"."""
    revision: str | None = None
    """Hub revision: branch, tag or commit; default: the main branch."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceSettings:
    """Source of prompts and images: exactly one of the keys."""

    toy: ToySource | None = None
    """The toy tasks, procedurally drawn boards."""
    jsonl: JsonlSource | None = None
    """A JSON-lines file."""
    json: JsonSource | None = None
    """A JSON file with a list."""
    folder: FolderSource | None = None
    """A folder of images with one prompt for all."""
    dataset: DatasetSource | None = None
    """A Hugging Face dataset."""

    @model_validator(mode="after")
    def _is_one(self) -> SourceSettings:
        if sum(value is not None for value in vars(self).values()) != 1:
            raise ValueError("give exactly one of toy, jsonl, json, folder and dataset")
        return self
