"""Examples that a file or a folder lists: rows of text, and the names of the images that belong to them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from clt.capture.models.prompts import ImageSize
from clt.capture.sources.examples import Example, ExampleText, image_size, load_image, text_digest
from clt.capture.sources.settings import ColumnNames, FolderSource, JsonlSource, JsonSource, RowsSource
from clt.errors import InputError

#: A row with its number, and where it stands for error messages.
SourceRow = tuple[int, str, Mapping[str, Any]]


class ListedExamples:
    """Examples whose images are files.

    Args:
        texts: of all examples.
        names: file names of the images of each.
        folder: where the images lie.
    """

    def __init__(self, texts: Sequence[ExampleText], names: Sequence[tuple[str, ...]], folder: Path) -> None:
        self.texts = tuple(texts)
        self._names, self._folder = names, folder

    def load(self, index: int) -> Example:
        """The example of that number; InputError when an image cannot be decoded."""
        text = self.texts[index]
        images = tuple(load_image(self._folder / name) for name in self._names[index])
        return Example(example_id=text.example_id, prompt=text.prompt, images=images, answer=text.answer)

    def sizes(self, index: int) -> tuple[ImageSize, ...]:
        """Sizes of the images of an example; InputError when one is no image."""
        return tuple(image_size(self._folder / name) for name in self._names[index])

    def digest(self) -> str:
        """Hex digest of texts and image names."""
        return text_digest([repr(pair) for pair in zip(self.texts, self._names, strict=True)])


def open_jsonl(settings: JsonlSource) -> ListedExamples:
    """Examples of a JSON-lines file; InputError names the line that is wrong."""
    return _from_rows(_jsonl_rows(settings.file, settings.limit), settings)


def open_json(settings: JsonSource) -> ListedExamples:
    """Examples of a JSON list; InputError names the row that is wrong."""
    return _from_rows(_json_rows(settings.file, settings.limit), settings)


def open_folder(settings: FolderSource) -> ListedExamples:
    """One example per image below a folder, in the order of their paths, which are their ids.

    Raises:
        InputError: the folder is missing, or holds no image.
    """
    # Pillow names the formats that it reads once its plugins are there.
    known = Image.registered_extensions()
    paths = (path for path in settings.path.rglob("*") if path.suffix.lower() in known and path.is_file())
    names = sorted(path.relative_to(settings.path).as_posix() for path in paths)[: settings.limit]
    if not names:
        raise InputError(f"{settings.path}: no images in the folder; check source.folder.path")
    texts = [ExampleText(example_id=name, prompt=settings.prompt, n_images=1, answer=None) for name in names]
    return ListedExamples(texts, [(name,) for name in names], settings.path)


def row_text(row: SourceRow, settings: RowsSource, n_images: int) -> ExampleText:
    """The text of a row.

    Args:
        row: its fields.
        settings: what they are called, and the template.
        n_images: how many images belong to it.

    Raises:
        InputError: its prompt or its answer is no text.
    """
    number, where, record = row
    columns = settings.columns
    prompt = "" if columns.prompt is None else record.get(columns.prompt)
    answer, example_id = record.get(columns.answer), record.get(columns.id)
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise InputError(f"{where}: '{columns.prompt}' must be a text, and '{columns.answer}' a text if there is one")
    return ExampleText(
        example_id=str(number if example_id is None else example_id),
        prompt=settings.prompt_template.replace("{prompt}", prompt),
        n_images=n_images,
        answer=answer,
    )


def check_columns(columns: ColumnNames, found: Collection[str], where: object) -> None:
    """Finds columns that the configuration names and no row has; the usual names need not be there.

    Raises:
        InputError: one is missing; lists those that are there.
    """
    for column in fields(ColumnNames):
        name = getattr(columns, column.name)
        if name is not None and name not in found and name != getattr(ColumnNames(), column.name):
            known = ", ".join(sorted(found))
            raise InputError(f"{where}: no column '{name}' for columns.{column.name}, the columns are {known}")


def _from_rows(rows: Sequence[SourceRow], settings: JsonlSource | JsonSource) -> ListedExamples:
    if not rows:
        raise InputError(f"{settings.file}: no examples in the file")
    check_columns(settings.columns, {key for _, _, record in rows for key in record}, settings.file)
    names = [_strings(record.get(settings.columns.image), settings.columns.image, where) for _, where, record in rows]
    texts = [row_text(row, settings, len(images)) for row, images in zip(rows, names, strict=True)]
    return ListedExamples(texts, names, settings.image_dir or settings.file.parent)


def _jsonl_rows(path: Path, limit: int | None) -> list[SourceRow]:
    rows: list[SourceRow] = []
    for number, line in enumerate(_read(path, "jsonl").split("\n"), start=1):
        if len(rows) == limit:
            break
        if line.strip():
            where = f"{path}:{number}"
            rows.append((number, where, _object(_parsed(line, where, "each line must hold one object"), where)))
    return rows


def _json_rows(path: Path, limit: int | None) -> list[SourceRow]:
    records = _parsed(_read(path, "json"), str(path), "the file must hold a list of objects")
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a JSON list, found {type(records).__name__}; one object per line is jsonl")
    numbered: Iterable[tuple[int, str, Any]] = (
        (number, f"{path}: row {number}", record) for number, record in enumerate(records[:limit], start=1)
    )
    return [(number, where, _object(record, where)) for number, where, record in numbered]


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); check source.{key}.file") from None


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); {expected}") from None


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _strings(value: Any, column: str, where: str) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: '{column}' must be a file name or a list of file names")
    return tuple(names)
