"""Examples of a Hugging Face dataset, read by the optional package `datasets`.

Planning reads the texts and counts the images; image bytes are read when a row is loaded, and decoded by `load_image`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clt.capture.models.prompts import ImageSize
from clt.capture.sources.examples import Example, ExampleText, image_size, load_image, text_digest
from clt.capture.sources.file_sources import check_columns, row_text
from clt.capture.sources.settings import DatasetSource
from clt.errors import InputError

#: Rows per batch while planning.
_BATCH = 1000


class DatasetExamples:
    """Rows of a dataset in its own order.

    Args:
        settings: name of the dataset and of its columns.

    Raises:
        InputError: the package is missing, the dataset cannot be loaded, or the prompt of a row is not a text.
    """

    def __init__(self, settings: DatasetSource) -> None:
        rows = _load(settings)
        columns, self._name = settings.columns, f"{settings.name}[{settings.split}]"
        check_columns(columns, rows.column_names, self._name)
        self._pictures = columns.image if columns.image in rows.column_names else None
        wanted = {columns.id, columns.prompt, columns.answer, columns.image}
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
        if settings.limit is not None:
            rows = rows.select(range(min(settings.limit, len(rows))))
        if not len(rows):
            raise InputError(f"{self._name}: the dataset has no rows")
        self._rows = rows.with_format("arrow")
        self._sizes: list[str] = []
        self.texts: tuple[ExampleText, ...] = tuple(
            row_text((number, self._where(number), record), settings, n_images)
            for number, (record, n_images) in enumerate(self._records())
        )

    def load(self, index: int) -> Example:
        """Loads an example; InputError if an image cannot be decoded."""
        text = self.texts[index]
        images = tuple(load_image(*file) for file in self._files(index))
        return Example(example_id=text.example_id, prompt=text.prompt, images=images, answer=text.answer)

    def sizes(self, index: int) -> tuple[ImageSize, ...]:
        """Sizes of the images of an example; InputError if one is not an image."""
        return tuple(image_size(*file) for file in self._files(index))

    def digest(self) -> str:
        """Hex digest of texts, image names and image sizes."""
        return text_digest([*map(repr, self.texts), *self._sizes])

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Texts and number of images of each row; reads no image."""
        import pyarrow as pa
        import pyarrow.compute

        for table in self._rows.iter(batch_size=_BATCH):
            counts = [0] * len(table)
            if self._pictures is not None:
                column = table.column(self._pictures)
                self._check_type(column.type)
                nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
                lengths = pa.compute.list_value_length(column) if nested else column.is_valid().cast("int32")
                counts = lengths.fill_null(0).to_pylist()
                flat = pa.compute.list_flatten(column) if nested else column
                names, contents = (pa.compute.struct_field(flat, field) for field in ("path", "bytes"))
                sizes = pa.compute.binary_length(contents).to_pylist()
                self._sizes += map(repr, zip(names.to_pylist(), sizes, strict=True))
                table = table.drop_columns([self._pictures])
            yield from zip(table.to_pylist() or [{}] * len(counts), counts, strict=True)

    def _check_type(self, kind: Any) -> None:
        """InputError unless images are records of `bytes` and `path`, as stored by `datasets.Image`."""
        kind = getattr(kind, "value_type", kind)
        if {field.name for field in getattr(kind, "fields", ())} != {"bytes", "path"}:
            raise InputError(
                f"{self._name}: column '{self._pictures}' holds {kind}, expected images; cast it to datasets.Image()"
            )

    def _files(self, index: int) -> list[tuple[IO[bytes] | str, str]]:
        """Contents or paths of the images of a row, and their names in error messages."""
        pictures = [] if self._pictures is None else self._rows[index].column(self._pictures).to_pylist()[0] or []
        return [
            (picture["path"], picture["path"])
            if picture["bytes"] is None
            else (io.BytesIO(picture["bytes"]), self._where(index))
            for picture in (pictures if isinstance(pictures, list) else [pictures])
        ]

    def _where(self, number: int) -> str:
        return f"{self._name}: row {number}"


def _load(settings: DatasetSource) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError("source.dataset needs the package 'datasets'; pip install datasets") from None
    folder = Path(settings.name)
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(settings.name)
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(settings.name)[settings.split]
        return datasets.load_dataset(settings.name, settings.config, split=settings.split, revision=settings.revision)
    # The package passes on all errors of its readers and of the hub client.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{settings.name}: the dataset cannot be loaded ({reason}); check source.dataset") from error
