"""JSON lists, folders of images and Hugging Face datasets give the examples that the same JSON lines would give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clt.capture.planning import CaptureConfig
from clt.capture.sources.examples import ExampleSource, SourceSettings, open_source
from clt.config import load_config, parse_config
from clt.errors import ConfigError, InputError

ROOT = Path(__file__).resolve().parents[3]
#: Rows in the layout of AMBER's queries.
ROWS = ({"id": 1, "image": "a.png", "query": "Is there a cat?"}, {"id": 2, "image": "b.png", "query": "Describe."})


def source(**tree: Any) -> ExampleSource:
    return open_source(parse_config(SourceSettings, tree, "job.yaml"))


def listing(found: ExampleSource) -> list[tuple[str, str, int, str | None]]:
    return [(t.example_id, t.prompt, t.n_images, t.answer) for t in found.texts]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (3, 2), "red").save(folder / "a.png")
    Image.new("L", (4, 5), 7).save(folder / "b.png")
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_amber_queries_equal_the_same_json_lines(tmp_path: Path, images: Path) -> None:
    rows = {"columns": {"prompt": "query"}, "prompt_template": "USER: <image>\n{prompt}", "image_dir": images}
    queries = source(json={"file": write(tmp_path / "queries.json", list(ROWS)), **rows})
    assert listing(queries) == [
        ("1", "USER: <image>\nIs there a cat?", 1, None),
        ("2", "USER: <image>\nDescribe.", 1, None),
    ]
    assert [queries.load(i).images[0].size for i in range(2)] == [(3, 2), (4, 5)]
    lines = write(tmp_path / "queries.jsonl", "\n".join(map(json.dumps, ROWS)))
    assert source(jsonl={"file": lines, **rows}).digest() == queries.digest()
    assert len(source(json={"file": tmp_path / "queries.json", **rows, "limit": 1}).texts) == 1


def test_the_amber_benchmark_itself(tmp_path: Path) -> None:
    file = ROOT.parent / "shared/data/amber/query/query_all.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    found = source(json={"file": file, "columns": {"prompt": "query"}})
    assert found.texts[0].prompt == "Describe this image."
    assert len({text.example_id for text in found.texts}) == len(found.texts)
    assert all(text.n_images == 1 for text in found.texts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[{"prompt": "p"},\n oops]', r"x\.json: not valid JSON \(.*line 2"),
        ({"prompt": "p"}, r"x\.json: expected a JSON list, found dict; for JSON lines use source\.jsonl"),
        ([{"prompt": "p"}, 3], r"x\.json: row 2: expected a JSON object, found int"),
        ([{"prompt": "p"}, {"query": "q"}], r"x\.json: row 2: 'prompt' must be a text"),
        ([{"prompt": "p", "image": 3}], r"x\.json: row 1: 'image' must be a file name"),
        ([], r"x\.json: no examples"),
    ],
)
def test_bad_row_of_a_list_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        source(json={"file": write(tmp_path / "x.json", value)})
    assert "\n" not in str(error.value)


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", list(ROWS))
    with pytest.raises(InputError, match=r"columns\.prompt=qeury: no such column; choose from id, image, query"):
        source(json={"file": file, "columns": {"prompt": "qeury"}})
    with pytest.raises(InputError, match=r"columns\.answer=label: no such column"):
        source(json={"file": file, "columns": {"prompt": "query", "answer": "label"}})
    with pytest.raises(ConfigError, match=r"columns\.prompt: null"):
        source(json={"file": file, "prompt_template": "the same for all"})


def test_a_folder_gives_every_image_below_it_the_same_prompt(images: Path) -> None:
    (images / "deep").mkdir()
    Image.new("RGB", (6, 6)).save(images / "deep" / "C.JPG", "jpeg")
    write(images / "notes.txt", "no image")
    found = source(folder={"path": images, "prompt": "<image> What is it?"})
    names = ["a.png", "b.png", "deep/C.JPG"]
    assert listing(found) == [(name, "<image> What is it?", 1, None) for name in names]
    assert [found.load(i).images[0].size for i in range(3)] == [(3, 2), (4, 5), (6, 6)]
    assert len(source(folder={"path": images, "prompt": "p", "limit": 2}).texts) == 2
    with pytest.raises(InputError, match="notes: the folder has no images"):
        source(folder={"path": images / "notes", "prompt": "p"})


def test_dataset_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"source\.dataset needs the package 'datasets'; pip install datasets"):
        source(dataset={"name": "any"})


class TestDatasets:
    """Tiny datasets on disk; skipped where the package is missing."""

    @pytest.fixture
    def saved(self, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        datasets = pytest.importorskip("datasets", reason="the optional package 'datasets' is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        one, many = datasets.Image(), datasets.Sequence(datasets.Image())
        rows = {
            "key": ["x", "y", "z"],
            "question": ["one", "two", "three"],
            "answer": ["yes", None, "no"],
            "image": [str(images / "a.png"), None, str(images / "b.png")],
            "images": [[str(images / "a.png"), str(images / "b.png")], [], None],
        }
        text = datasets.Value("string")
        kinds = datasets.Features({"key": text, "question": text, "answer": text, "image": one, "images": many})
        data = datasets.Dataset.from_dict(rows, features=kinds)
        data.save_to_disk(tmp_path / "saved")
        datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
        (tmp_path / "parquet").mkdir()
        data.to_parquet(tmp_path / "parquet" / "train.parquet")
        return tmp_path

    COLUMNS = {"id": "key", "prompt": "question"}  # noqa: RUF012

    @pytest.mark.parametrize(("name", "split"), [("saved", "train"), ("splits", "test"), ("parquet", "train")])
    def test_rows_become_examples(self, saved: Path, name: str, split: str) -> None:
        found = source(dataset={"name": str(saved / name), "split": split, "columns": self.COLUMNS})
        assert listing(found) == [("x", "one", 1, "yes"), ("y", "two", 0, None), ("z", "three", 1, "no")]
        loaded = [found.load(i) for i in range(3)]
        assert [[image.size for image in example.images] for example in loaded] == [[(3, 2)], [], [(4, 5)]]
        assert [found.sizes(i) for i in range(3)] == [((2, 3),), (), ((5, 4),)]
        assert loaded[0].images[0].getpixel((0, 0)) == (255, 0, 0) and loaded[2].images[0].mode == "RGB"

    def test_a_row_may_have_several_images_and_no_prompt(self, saved: Path) -> None:
        columns = {"prompt": None, "image": "images"}
        found = source(dataset={"name": str(saved / "saved"), "columns": columns, "prompt_template": "p", "limit": 2})
        assert listing(found) == [("0", "p", 2, "yes"), ("1", "p", 0, None)]
        assert [image.size for image in found.load(0).images] == [(3, 2), (4, 5)]
        assert found.load(1).images == ()
        other = {"prompt": None}
        assert found.digest() != source(dataset={"name": str(saved / "saved"), "columns": other, "limit": 2}).digest()

    def test_errors_name_the_row(self, saved: Path) -> None:
        def message(name: str, **settings: Any) -> str:
            with pytest.raises(InputError) as error:
                source(dataset={"name": str(saved / name), **settings})
            assert "\n" not in str(error.value)
            return str(error.value)

        assert "row 0: 'prompt' must be a text" in message("saved")
        assert "columns.prompt=text: no such column" in message("saved", columns={"prompt": "text"})
        holds = message("saved", columns={"prompt": "question", "image": "key"})
        assert "column 'key' holds string, expected images; cast it to datasets.Image()" in holds
        assert "the dataset cannot be loaded" in message("splits", split="validation")
        assert "the dataset cannot be loaded" in message("nowhere/at/all")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "capture").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_configuration_is_valid(file: Path) -> None:
    config = load_config(CaptureConfig, file)
    assert config.output.startswith("runs/")
