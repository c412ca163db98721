"""The page of a graph: self-contained, inert to hostile text, and drawn without an error by a real browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clt.attribution.graphs.export import graph_document
from clt.attribution.graphs.graph import Graph
from clt.attribution.graphs.scores import prune
from clt.attribution.viewer.document import GraphDocument
from clt.attribution.viewer.page import render_page, write_export

HOSTILE = "</script><img src=x onerror=\"document.body.dataset.hacked='yes'\"><!--<script>&amp;\u2028'\\"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not drawn in this run")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,800",
    "--virtual-time-budget=5000",
)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text inside of each script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))
        self.inside = tag in {"script", "style"}
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.starts if name == tag]


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    elements.close()
    return elements


@pytest.fixture(scope="module")
def document(make_graph: Callable[..., Graph]) -> GraphDocument:
    graph = make_graph()
    return graph_document(graph, prune(graph))


@pytest.fixture(scope="module")
def hostile(make_graph: Callable[..., Graph]) -> GraphDocument:
    """A graph in which every text attempts an injection."""
    graph = make_graph(words=(HOSTILE, *["<image>"] * 4, HOSTILE, "{{script}}"), prompt=HOSTILE, n_features=20)
    labels = {(layer, feature): HOSTILE for layer in range(3) for feature in range(7)}
    return graph_document(graph, prune(graph), slug=HOSTILE, feature_labels=labels)


def test_hostile_text_stays_inside_the_data_element(hostile: GraphDocument) -> None:
    page = render_page(hostile.to_tree())
    elements = parse(page)
    scripts = elements.attributes("script")
    assert [script.get("type") for script in scripts] == ["application/json", None]
    assert not elements.attributes("img")
    assert not [name for _, attributes in elements.starts for name in attributes if name.startswith("on")]
    data = elements.texts[1]
    assert json.loads(data) == hostile.to_tree()
    assert not set("<>&") & set(data)
    assert page.replace(data, "").count("onerror") == 1, "the title alone may show the slug"
    assert "<img" not in page


def test_page_runs_its_own_script_and_no_other(document: GraphDocument, hostile: GraphDocument) -> None:
    for page in (render_page(document.to_tree()), render_page(hostile.to_tree())):
        elements = parse(page)
        policy = next(meta["content"] for meta in elements.attributes("meta") if "http-equiv" in meta)
        assert policy is not None
        style, _, script = elements.texts
        for directive, source in (("script-src", script), ("style-src", style)):
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{directive} 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy


def test_page_makes_no_network_requests(document: GraphDocument) -> None:
    page = render_page(document.to_tree())
    elements = parse(page)
    style, _, script = elements.texts
    for _, attributes in elements.starts:
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(attributes)
    assert not re.search(r"https?:|//[a-z]+\.|\bfetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", script)
    assert not re.search(r"url\(|@import|https?:", style)
    for image in document.metadata.images:
        assert image.data_uri.startswith("data:image/png;base64,")


def test_page_is_plain_ascii_and_has_the_data_once(document: GraphDocument) -> None:
    page = render_page(document.to_tree())
    assert page.isascii()
    assert not re.search(r"\{\{\w+\}\}", page)
    assert page.count('id="graph-data"') == 1


def load(page: Path, profile: Path, fragment: str = "") -> Elements:
    """Start tags of the page after its script ran."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return parse(done.stdout)


def classes(elements: Elements, tag: str) -> list[set[str]]:
    return [set((attributes.get("class") or "").split()) for attributes in elements.attributes(tag)]


@needs_browser
def test_browser_draws_every_node_without_an_error(document: GraphDocument, tmp_path: Path) -> None:
    elements = load(write_export(document, tmp_path / "page"), tmp_path / "profile")
    [body] = elements.attributes("body")
    assert "data-error" not in body
    assert body["data-ready"] == "true"
    drawn = {
        attributes["data-id"]
        for attributes in elements.attributes("g")
        if "node" in (attributes.get("class") or "").split()
    }
    assert drawn == {node.node_id for node in document.nodes}
    assert sum("patch" in names for names in classes(elements, "g")) == 64


@needs_browser
def test_browser_opens_the_node_that_the_address_names(document: GraphDocument, tmp_path: Path) -> None:
    page = write_export(document, tmp_path / "page")
    node = max((node for node in document.nodes if node.kind == "feature"), key=lambda node: node.path_share)
    elements = load(page, tmp_path / "profile", f"#node={node.node_id}")
    [body] = elements.attributes("body")
    assert "data-error" not in body
    selected = [g["data-id"] for g in elements.attributes("g") if "selected" in (g.get("class") or "").split()]
    assert selected == [node.node_id]
    listed = [
        button["data-id"]
        for button in elements.attributes("button")
        if button.get("class") is None and "data-id" in button
    ]
    inputs = [link for link in document.links if link.target == node.node_id]
    strongest = max(inputs, key=lambda link: abs(link.weight))
    assert listed[0] == strongest.source


@needs_browser
def test_browser_runs_no_code_of_a_hostile_prompt(hostile: GraphDocument, tmp_path: Path) -> None:
    elements = load(write_export(hostile, tmp_path / "page"), tmp_path / "profile")
    [body] = elements.attributes("body")
    assert body["data-ready"] == "true"
    assert "data-error" not in body
    assert "data-hacked" not in body
    assert not elements.attributes("img")


@needs_browser
def test_browser_draws_a_prompt_without_an_image(make_graph: Callable[..., Graph], tmp_path: Path) -> None:
    graph = make_graph(words=("<s>", "two", "and", "two"), n_features=15)
    document = graph_document(graph, prune(graph))
    elements = load(write_export(document, tmp_path / "page"), tmp_path / "profile")
    [body] = elements.attributes("body")
    assert "data-error" not in body
    assert body["data-nodes"] == str(len(document.nodes))
