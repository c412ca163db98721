"""What a configuration says about where prompts come from; `clt.capture.sources.examples.open_source` opens it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToySource:
    """Procedurally drawn boards; see `clt.capture.sources.toy`."""

    n: int = Field(gt=0)
    """Number of examples."""
    seed: int = 0
    """Different seeds give different images."""
    tasks: tuple[str, ...] | None = None
    """Tasks to draw from; absent: those of the base toy model."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ColumnNames:
    """What the fields of a row are called; all but the prompt may be missing."""

    id: str = "id"
    """A name for the row, any text or number; where it is missing, the number of the row."""
    prompt: str | None = "prompt"
    """The prompt; null: rows have none, and prompt_template is the prompt of all."""
    image: str = "image"
    """A picture or a list of pictures; in files, their names."""
    answer: str = "answer"
    """Text that follows the prompt."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowsSource:
    """Rows with named fields."""

    columns: ColumnNames = ColumnNames()
    """What the fields are called."""
    prompt_template: str = "{prompt}"
    """Text around each prompt, such as "USER: <image>\\n{prompt} ASSISTANT:"."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many rows only."""

    @model_validator(mode="after")
    def _has_place_for_the_prompt(self) -> RowsSource:
        if self.columns.prompt is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(
                "prompt_template has no {prompt}; write where the prompt goes, or set columns.prompt: null"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonlSource(RowsSource):
    """One JSON object per line."""

    file: Path
    """The JSON-lines file."""
    image_dir: Path | None = None
    """Folder of the images; absent: the folder of `file`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JsonSource(RowsSource):
    """A JSON list of objects, such as AMBER's queries (`columns: {prompt: query}`)."""

    file: Path
    """The JSON file."""
    image_dir: Path | None = None
    """Folder of the images; absent: the folder of `file`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderSource:
    """All images in a folder and the folders below it, by name, each with the same prompt."""

    path: Path
    """The folder."""
    prompt: str = Field(min_length=1)
    """The prompt, such as "USER: <image>\\nDescribe this image. ASSISTANT:"."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many images only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasetSource(RowsSource):
    """A Hugging Face dataset; needs the package `datasets`."""

    name: str
    """Hub name, folder of files that `load_dataset` reads, or folder that `save_to_disk` wrote."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split; slices such as "train[:1000]" work where `load_dataset` does."""
    revision: str | None = None
    """Hub revision."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceSettings:
    """Where the examples come from: exactly one of the keys."""

    toy: ToySource | None = None
    """Procedurally drawn boards."""
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
