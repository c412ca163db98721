"""Example sources: prompts and images equal those of the file, and errors name the wrong line or image."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clt.capture.sources.examples import JsonlSource, SourceSettings, ToySource, image_size, load_image, open_source
from clt.capture.sources.toy import BIASED_TASKS, toy_examples
from clt.config import parse_config
from clt.errors import ConfigError, InputError

TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def jsonl(file: Path, **settings: Any) -> Any:
    return open_source(SourceSettings(jsonl=JsonlSource(file=file, **settings)))


def test_jsonl_gives_prompts_answers_and_decoded_images(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3, 2), "red").save(tmp_path / "pictures/a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "pictures/b.png")
    file = write_lines(
        tmp_path / "x.jsonl",
        {"prompt": "one {brace} \u2028 line", "image": "a.png", "answer": "yes", "label": 1},
        "",
        {"id": 17, "prompt": "two", "image": ["a.png", "b.png"]},
        {"id": "text", "prompt": "none"},
    )
    source = jsonl(file, image_dir=tmp_path / "pictures", prompt_template="Q {prompt} A")
    assert [(t.example_id, t.prompt, t.n_images, t.answer) for t in source.texts] == [
        ("1", "Q one {brace} \u2028 line A", 1, "yes"),
        ("17", "Q two A", 2, None),
        ("text", "Q none A", 0, None),
    ]
    first, second, third = (source.load(i) for i in range(3))
    assert (first.example_id, first.prompt, first.answer) == ("1", source.texts[0].prompt, "yes")
    assert first.images[0].size == (3, 2)
    assert [image.mode for image in second.images] == ["RGB", "RGB"]
    assert third.images == ()


def test_images_lie_beside_the_file_by_default(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    source = jsonl(write_lines(tmp_path / "x.jsonl", {"prompt": "p", "image": "a.png"}))
    assert source.load(0).images[0].getpixel((0, 0)) == (255, 0, 0)


def test_limit_takes_the_first_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", *({"prompt": str(i)} for i in range(5)))
    assert [t.prompt for t in jsonl(file, limit=2).texts] == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"image": "a.png"}', "'prompt' must be a text"),
        ('{"prompt": "p", "answer": 3}', "'answer' a text"),
        ('{"prompt": "p", "image": [1]}', "'image' must be a file name"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write_lines(tmp_path / "x.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(InputError, match=f"x.jsonl:2: .*{message}"):
        jsonl(file)


def test_unreadable_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl: cannot be read"):
        jsonl(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.jsonl: cannot be read"):
        jsonl(tmp_path / "binary.jsonl")
    with pytest.raises(InputError, match=r"empty\.jsonl: no examples"):
        jsonl(write_lines(tmp_path / "empty.jsonl"))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"no image",
        encoded("PNG")[:2000],
        encoded("JPEG")[:700],
        encoded("PNG")[:500] + b"x" + encoded("PNG")[500:],
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "damaged png"],
)
def test_image_that_cannot_be_decoded_is_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(contents)
    with pytest.raises(InputError, match=r"bad\.png: the image cannot be decoded") as error:
        load_image(tmp_path / "bad.png")
    assert "\n" not in str(error.value)


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png: the image cannot be decoded .*No such file"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_photographs_are_turned_upright_and_so_are_their_sizes(
    tmp_path: Path, kind: str, orientation: int | None
) -> None:
    image, file = Image.new("RGB", (4, 2)), tmp_path / f"a.{kind}"
    exif = image.getexif()
    if orientation is not None:
        exif[274] = orientation
    image.save(file, exif=exif)
    upright = load_image(file)
    assert upright.size == ((2, 4) if orientation in (5, 6, 7, 8) else (4, 2))
    assert image_size(file) == (upright.height, upright.width)


def test_the_size_of_a_photograph_is_read_without_decoding_it(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.effect_noise((64, 48), 50).save(file)
    file.write_bytes(file.read_bytes()[:-500])
    assert image_size(file) == (48, 64)
    with pytest.raises(InputError, match=r"a\.jpg: the image cannot be decoded"):
        load_image(file)
    file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.jpg: the image cannot be decoded"):
        image_size(file)


def test_toy_source_is_the_toy_samples() -> None:
    source = open_source(SourceSettings(toy=ToySource(n=5, seed=3, tasks=BIASED_TASKS)))
    for i, example in enumerate(toy_examples(5, 3, BIASED_TASKS)):
        loaded, text = source.load(i), source.texts[i]
        assert (loaded.example_id, loaded.prompt, loaded.answer) == (example.example_id, example.prompt, example.answer)
        assert loaded.images[0].tobytes() == example.images[0].tobytes()
        assert (text.example_id, text.prompt, text.answer) == (example.example_id, example.prompt, example.answer)
        assert text.n_images == text.prompt.count("<image>") == 1


def test_digest_depends_on_the_examples(tmp_path: Path) -> None:
    def toy(**settings: Any) -> str:
        return open_source(SourceSettings(toy=ToySource(**settings))).digest()

    assert toy(n=4, seed=1) == toy(n=4, seed=1)
    assert len({toy(n=4, seed=1), toy(n=5, seed=1), toy(n=4, seed=2), toy(n=4, seed=1, tasks=("odd",))}) == 4
    record = {"prompt": "p", "answer": "a", "image": "i.png"}
    a = jsonl(write_lines(tmp_path / "a.jsonl", record)).digest()
    assert a == jsonl(write_lines(tmp_path / "b.jsonl", {**record, "unused": 1})).digest()
    assert a != jsonl(write_lines(tmp_path / "c.jsonl", {**record, "image": "j.png"})).digest()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "exactly one of toy, jsonl, json, folder and dataset"),
        ({"toy": {"n": 1}, "jsonl": {"file": "x"}}, "exactly one of toy, jsonl, json, folder and dataset"),
        ({"toy": {"n": 0}}, r"toy\.n: "),
        ({"toy": {"n": 1, "seeds": 2}}, r"unknown key 'toy\.seeds'"),
        ({"jsonl": {"file": "x", "prompt_template": "no place"}}, r"prompt_template has no \{prompt\}"),
    ],
)
def test_wrong_settings_name_the_key(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(SourceSettings, tree, "x.yaml")
