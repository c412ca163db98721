"""Examples of JSON files and image folders: texts, and the names of their images."""

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

#: Number of a row, its location for error messages, and its fields.
SourceRow = tuple[int, str, Mapping[str, Any]]


class ListedExamples:
    """Examples whose images are files.

    Args:
        texts: texts of all examples.
        names: file names of the images of each example.
        folder: folder of the images.
    """

    def __init__(self, texts: Sequence[ExampleText], names: Sequence[tuple[str, ...]], folder: Path) -> None:
        self.texts = tuple(texts)
        self._names, self._folder = names, folder

    def load(self, index: int) -> Example:
        """Loads an example; InputError if an image cannot be decoded."""
        text = self.texts[index]
        images = tuple(load_image(self._folder / name) for name in self._names[index])
        return Example(example_id=text.example_id, prompt=text.prompt, images=images, answer=text.answer)

    def sizes(self, index: int) -> tuple[ImageSize, ...]:
        """Sizes of the images of an example; InputError if one is not an image."""
        return tuple(image_size(self._folder / name) for name in self._names[index])

    def digest(self) -> str:
        """Hex digest of texts and image names."""
        return text_digest([repr(pair) for pair in zip(self.texts, self._names, strict=True)])


def open_jsonl(settings: JsonlSource) -> ListedExamples:
    """Examples of a JSON-lines file; InputError names the wrong line."""
    return _from_rows(_jsonl_rows(settings.file, settings.limit), settings)


def open_json(settings: JsonSource) -> ListedExamples:
    """Examples of a JSON list; InputError names the wrong row."""
    return _from_rows(_json_rows(settings.file, settings.limit), settings)


def open_folder(settings: FolderSource) -> ListedExamples:
    """One example per image of a folder and its subfolders, in the order of their paths, which are their ids.

    Raises:
        InputError: the folder is missing or has no image.
    """
    # Loads the plugins of Pillow, then lists the suffixes of all formats.
    known = Image.registered_extensions()
    paths = (path for path in settings.path.rglob("*") if path.suffix.lower() in known and path.is_file())
    names = sorted(path.relative_to(settings.path).as_posix() for path in paths)[: settings.limit]
    if not names:
        raise InputError(f"{settings.path}: the folder has no images; check source.folder.path")
    texts = [ExampleText(example_id=name, prompt=settings.prompt, n_images=1, answer=None) for name in names]
    return ListedExamples(texts, [(name,) for name in names], settings.path)


def row_text(row: SourceRow, settings: RowsSource, n_images: int) -> ExampleText:
    """Text of the example of a row.

    Args:
        row: number, location and fields.
        settings: names of the fields, and the template of the prompt.
        n_images: number of images of the row.

    Returns:
        Id, prompt and answer.

    Raises:
        InputError: the prompt or the answer is not a text.
    """
    number, where, record = row
    columns = settings.columns
    prompt = "" if columns.prompt is None else record.get(columns.prompt)
    answer, example_id = record.get(columns.answer), record.get(columns.id)
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise InputError(f"{where}: '{columns.prompt}' must be a text, '{columns.answer}' a text or missing")
    return ExampleText(
        example_id=str(number if example_id is None else example_id),
        prompt=settings.prompt_template.replace("{prompt}", prompt),
        n_images=n_images,
        answer=answer,
    )


def check_columns(columns: ColumnNames, found: Collection[str], where: object) -> None:
    """Checks that columns named in the settings exist; those of default names may be missing.

    Args:
        columns: names of the fields.
        found: columns that exist.
        where: location for error messages.

    Raises:
        InputError: a column is missing; lists the existing ones.
    """
    for column in fields(ColumnNames):
        name = getattr(columns, column.name)
        if name is not None and name not in found and name != getattr(ColumnNames(), column.name):
            known = ", ".join(sorted(found))
            raise InputError(f"{where}: columns.{column.name}={name}: no such column; choose from {known}")


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
        raise InputError(
            f"{path}: expected a JSON list, found {type(records).__name__}; for JSON lines use source.jsonl"
        )
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
