"""Serves the page of a graph on 127.0.0.1.

The page is one self-contained file that a browser can open directly. On a remote machine, `page_server` serves it
through an ssh tunnel. It answers "/" with this one file and every other path with 404.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from clt.attribution.viewer.page import PAGE_NAME
from clt.errors import GraphError

#: Accepted Host headers: another name means that a page of another site sends the request (DNS rebinding).
_LOCAL_NAMES = ("127.0.0.1", "localhost")


def find_page(path: Path | str) -> Path:
    """Finds the page of a path.

    Args:
        path: the page, or the folder that contains it.

    Returns:
        Absolute path of the page.

    Raises:
        GraphError: there is no page.
    """
    path = Path(path)
    page = path / PAGE_NAME if path.is_dir() else path
    if not page.is_file() or page.suffix != ".html":
        raise GraphError(f"{page}: no such page; write one with `clt attribute`")
    return page.resolve()


def page_server(page: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of one page, bound to 127.0.0.1; `serve_forever` runs it, `server_address` holds its port.

    Args:
        page: the file to serve, read at every request.
        port: 0 for any free port.

    Returns:
        The server, listening.

    Raises:
        GraphError: the port is taken or not allowed.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in _LOCAL_NAMES or self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = page.read_bytes()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged; the command prints the address once."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise GraphError(f"port={port}: cannot listen on 127.0.0.1 ({error}); choose another port or 0") from None
