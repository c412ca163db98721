"""`clt view`: finds the page and serves only that file, only to this machine."""

import http.client
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from clt.attribution.viewer.server import find_page, page_server
from clt.errors import GraphError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "graph.json").write_text("{}")
    server = page_server(find_page(tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server: ThreadingHTTPServer, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest("GET", path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_server_gives_the_page_on_the_local_address_only(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/") == (200, b"<p>page</p>")
    assert ask(server, "/", host="localhost:8000")[0] == 200


@pytest.mark.parametrize(
    "path", ["/graph.json", "/../../../../etc/hostname", "//etc/hostname", "/index.html/../graph.json"]
)
def test_server_has_no_other_file(server: ThreadingHTTPServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_server_refuses_a_browser_that_was_sent_by_another_name(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/", host="attacker.example:8000")[0] == 404


def test_taken_port_is_one_line_that_names_it(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(GraphError, match=f"port={port}: cannot listen") as caught:
        page_server(tmp_path / "index.html", port)
    assert "\n" not in str(caught.value)


def test_page_is_found_by_its_folder_and_by_itself(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    with pytest.raises(GraphError, match="no such page"):
        find_page(tmp_path)
    page.write_text("")
    assert find_page(tmp_path) == find_page(page) == page.resolve()


def test_only_pages_are_shown(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("")
    with pytest.raises(GraphError, match="no such page"):
        find_page(tmp_path / "secret.txt")
