"""`Graph.show`: the page in a browser, in a notebook, or only on disk."""

import logging
import sys
from types import SimpleNamespace

import pytest

from clt.errors import GraphError


@pytest.fixture
def graph(make_graph):
    return make_graph(n_features=15)


@pytest.fixture
def opened(monkeypatch):
    """Arguments of `webbrowser.open`; no test opens a real browser."""
    calls = []
    monkeypatch.setattr("webbrowser.open", lambda url: calls.append(url) or True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "IPython", None)
    return calls


def test_without_a_screen_the_path_is_logged(graph, opened, tmp_path, caplog):
    page = graph.show(tmp_path / "page", max_nodes=5)
    assert page == (tmp_path / "page" / "index.html").resolve() and page.is_file()
    assert not opened
    assert [(record.levelno, str(page) in record.message) for record in caplog.records] == [(logging.WARNING, True)]


def test_with_a_screen_the_browser_opens_a_temporary_page(graph, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    page = graph.show()
    assert opened == [page.as_uri()]
    assert tmp_path in page.parents


def test_in_a_notebook_the_page_is_shown_inside_of_it(graph, opened, monkeypatch, tmp_path):
    shown = []
    display = SimpleNamespace(HTML=lambda text: text, display=shown.append)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    page = graph.show(tmp_path)
    [frame] = shown
    assert frame.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;') and frame.count('"') == 6
    assert page.is_file() and not opened


def test_a_threshold_out_of_range_is_refused(graph, opened, tmp_path):
    with pytest.raises(GraphError, match="node_threshold"):
        graph.show(tmp_path, node_threshold=0)


def test_repr_has_prompt_and_model_of_a_graph(graph):
    n_rows = len(graph.rows_to_node)
    assert repr(graph) == (
        "Graph(prompt='USER: <image>', model='toy', n_features=15, n_errors=225, n_tokens=75, n_targets=2, "
        f"n_rows={n_rows})"
    )
