"""Public names of `clt`, and the five lines from a model's name to a graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clt
from clt.capture.sources.toy import toy_examples
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

from .hub_stand_in import Blob, Repository, environment, hub_stand_in

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "examples" / "toy_vlm" / "checkpoints" / "base"

#: Code as a user writes it; the names are replaced.
ROAD = """
import clt
model = clt.ReplacementModel.from_pretrained({model!r}, transcoder={transcoder!r})
graph = model.attribute({prompt!r}, images={images!r})
graph.save({graph!r})
page = graph.show()
"""


def _run(code: str, **variables: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def toy_transcoder(toy_adapter: clt.ModelAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random transcoder of the toy model."""
    folder = tmp_path_factory.mktemp("toy") / "clt"
    _transcoder(toy_adapter).save_pretrained(folder)
    return folder


def _transcoder(adapter: clt.ModelAdapter) -> CrossLayerTranscoder:
    config = CLTConfig(n_features=24, k=3, n_layers=adapter.n_layers, d_model=adapter.d_model)
    scaling = Scaling.identity(adapter.n_layers, adapter.d_model)
    made = CrossLayerTranscoder(config, scaling, seed=1, provenance=Provenance(model=adapter.identity))
    with torch.no_grad():
        for W_SFD in made.W_dec.values():
            W_SFD.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the toy task."""
    path = tmp_path_factory.mktemp("picture") / "board.png"
    toy_examples(1, seed=9)[0].images[0].save(path)
    return path


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random text model with its tokenizer."""
    from .capture.tiny_models import make_adapter

    adapter, folder = make_adapter("qwen2"), tmp_path_factory.mktemp("text") / "model"
    adapter.model.save_pretrained(folder)
    adapter.tokenizer.save_pretrained(folder)
    return folder


def test_every_public_name_survives_the_import_of_every_sub_package() -> None:
    # A sub-package that is imported becomes an attribute of `clt`, and would hide a public name that is equal to it.
    folders = ("clt", "kernels", "capture", "attribution", "launch")
    files = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = [
        ".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files if "bench" not in str(file)
    ]
    names = [name if name.startswith("clt") else f"clt.{name}" for name in modules]
    code = f"""
import importlib, inspect, clt
for name in {names!r}:
    importlib.import_module(name)
for name in clt.__all__:
    value = getattr(clt, name)
    assert not inspect.ismodule(value) and value.__name__ == name, (name, value)
    assert name in dir(clt)
"""
    assert len(names) > 100
    _run(code)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'clt' has no attribute 'Grpah'"):
        clt.Grpah  # noqa: B018
    with pytest.raises(ImportError):
        exec("from clt import Grpah")


def test_public_names_are_those_of_the_type_checker_and_of_the_docs() -> None:
    source = (ROOT / "clt" / "__init__.py").read_text()
    page = (ROOT / "docs" / "python.md").read_text()
    for name in clt.__all__:
        assert f" as {name}\n" in source, name
        assert re.search(rf"\bclt\.{name}\b", page), name


def test_five_lines_explain_an_image_and_a_text(
    toy_transcoder: Path, board: Path, text_model: Path, tmp_path: Path
) -> None:
    text_transcoder = tmp_path / "text_clt"
    _transcoder(clt.ModelAdapter.from_pretrained(text_model)).save_pretrained(text_transcoder)
    cases = [
        (TOY, toy_transcoder, "Which color is the background?", [str(board)]),
        (text_model, text_transcoder, "the cat sat on a mat", []),
    ]
    code = ""
    for model, transcoder, prompt, images in cases:
        names = {"model": str(model), "transcoder": str(transcoder), "prompt": prompt, "images": images}
        code += ROAD.format(**names, graph=str(tmp_path / f"{model.name}.safetensors")) + "print(page)"
    pages = _run(code, BROWSER="true", DISPLAY="").strip().splitlines()[-len(cases) :]
    for (model, _, prompt, images), page in zip(cases, map(Path, pages), strict=True):
        assert page.name == "index.html" and "</html>" in page.read_text()
        graph = clt.Graph.load(tmp_path / f"{model.name}.safetensors")
        assert prompt in graph.prompt and graph.n_features > 0 and len(graph.images) == len(images)


def test_first_example_of_the_readme_runs_as_it_stands(toy_transcoder: Path, tmp_path: Path) -> None:
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) == 5
    # After `make demo` there is a trained transcoder.
    code = code.replace("runs/demo/clt", str(toy_transcoder)).replace("runs/demo", str(tmp_path))
    code = f"import os; os.chdir({str(ROOT)!r})\n{code}"
    _run(code, BROWSER="true", DISPLAY="")
    (target,) = clt.Graph.load(tmp_path / "board.safetensors").targets
    assert (target.label, target.kind) == ("red", "logit")


def test_five_lines_by_names_on_the_hub(
    toy_transcoder: Path, board: Path, tmp_path: Path, toy_adapter: clt.ModelAdapter
) -> None:
    with hub_stand_in() as hub:
        for name, folder in (("alice/toy-vlm", TOY), ("alice/toy-clt", toy_transcoder)):
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            repository = Repository(owner="alice", private=False)
            repository.add("main", {file: Blob(size=len(data), data=data) for file, data in files.items()})
            hub.repositories[f"model:{name}"] = repository
        names = {"model": "alice/toy-vlm", "transcoder": "alice/toy-clt", "images": [str(board)]}
        graph_file = tmp_path / "graph.safetensors"
        code = ROAD.format(**names, prompt="Which color is the background?", graph=str(graph_file))
        _run(code, **environment(hub, tmp_path), BROWSER="true", DISPLAY="")
    found = clt.Graph.load(graph_file)
    local = clt.ReplacementModel(toy_adapter, CrossLayerTranscoder.from_pretrained(toy_transcoder))
    expected = local.attribute("Which color is the background?", images=board)
    assert found.prompt == expected.prompt and torch.equal(found.edges, expected.edges)


def test_model_takes_text_files_pictures_and_prepared_inputs_alike(
    toy_adapter: clt.ModelAdapter, toy_transcoder: Path, board: Path
) -> None:
    model = clt.ReplacementModel.from_pretrained(toy_adapter, toy_transcoder)
    question = "Which color is the background?"
    inputs = model.prepare(question, board)
    seen = [
        model.features(question, images=images).dense()
        for images in (board, str(board), [str(board)], Image.open(board), [Image.open(board)])
    ]
    assert all(torch.equal(dense, model.features(inputs).dense()) for dense in seen)
    written = model.generate(question, 4, images=board)
    prepared = model.generate(inputs, 4)
    assert written == prepared and written.text == toy_adapter.tokenizer.decode(
        written.ids[0], skip_special_tokens=True
    )
    with pytest.raises(clt.CLTError, match="prepared inputs have their own images"):
        model.features(inputs, images=board)
    with pytest.raises(clt.CLTError, match=r"nowhere\.png"):
        model.features(question, images="nowhere.png")
    assert "toy_vlm" in repr(model) and "features=24" in repr(model)


def test_arguments_that_cannot_be_followed_are_refused(
    toy_adapter: clt.ModelAdapter, toy_transcoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load: Any = clt.ReplacementModel.from_pretrained
    for arguments in ({"dtype": "bfloat16"}, {"device": "cuda"}, {"revision": "v1"}):
        with pytest.raises(clt.CLTError, match="the model is loaded already; leave out device, dtype and revision"):
            load(toy_adapter, toy_transcoder, **arguments)
    transcoder = CrossLayerTranscoder.from_pretrained(toy_transcoder)
    for arguments in ({"lazy": True}, {"transcoder_revision": "v1"}):
        with pytest.raises(clt.CLTError, match="the transcoder is loaded already; leave out lazy"):
            load(toy_adapter, transcoder, **arguments)
    with pytest.raises(clt.CLTError, match=r"load that model, in the dtype of the capture, or train"):
        load(TOY, toy_transcoder, dtype="bfloat16", revision="v1")
    assert "revision=v1 is ignored" in caplog.text
    model = load(toy_adapter, transcoder)
    wrong: Any = (None, 3, ["one", "two"], b"bytes")
    for prompt in wrong:
        with pytest.raises(clt.CLTError, match=r"prompt is of type \w+; give one question as text"):
            model.features(prompt)
    with pytest.raises(clt.CLTError, match=r"max_new_tokens=0: must be at least 1"):
        model.generate("Which color?", 0)


def make_missing(folder: Path) -> Callable[[], object]:
    """A call with a missing model or transcoder."""
    return lambda: clt.ReplacementModel.from_pretrained(TOY, transcoder=folder)


def test_missing_model_or_transcoder_is_named(tmp_path: Path, toy_transcoder: Path) -> None:
    with pytest.raises(clt.CLTError, match="no_clt"):
        make_missing(tmp_path / "no_clt")()
    with pytest.raises(clt.CLTError, match="no_model"):
        clt.ReplacementModel.from_pretrained(tmp_path / "no_model", transcoder=toy_transcoder)
