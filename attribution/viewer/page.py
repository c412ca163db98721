"""Renders and writes the page of a graph: document, style and scripts in one HTML file that needs no network.

The document is in a script element of type application/json, which browsers do not execute, with every `<`, `>` and `&`
written as a JSON escape, so that no text of a prompt can end the element. A content security policy allows only the one
script and the one style sheet, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from clt.attribution.viewer.document import GraphDocument
from clt.errors import GraphError

#: The two files of `write_export`.
DOCUMENT_NAME, PAGE_NAME = "graph.json", "index.html"

#: In the order of their dependencies.
SCRIPTS = ("model.js", "layout.js", "graph.js", "picture.js", "header.js", "details.js", "viewer.js")


def render_page(document: Mapping[str, Any]) -> str:
    """One self-contained page that shows a graph.

    Args:
        document: a graph document as plain JSON values; see `clt.attribution.viewer.document.GraphDocument`.

    Returns:
        HTML, ASCII only.
    """
    style = _asset("style.css")
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS) + "})();\n"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    parts = {
        "csp": policy,
        "title": html.escape(f"{document['metadata']['slug']}: attribution graph"),
        "style": style,
        "data": _inert_json(document),
        "script": script,
    }
    # One pass over the template: inserted text is not searched for placeholders.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def write_export(document: GraphDocument, folder: Path | str) -> Path:
    """Writes `graph.json` and the self-contained page `index.html`, each atomically.

    Args:
        document: contents of the page.
        folder: made when it does not exist.

    Returns:
        Path of the page.

    Raises:
        GraphError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / DOCUMENT_NAME, document.to_json())
        _write_whole(folder / PAGE_NAME, render_page(document.to_tree()))
    except OSError as error:
        raise GraphError(f"{folder}: cannot write the page ({error.strerror}); choose another folder") from None
    return folder / PAGE_NAME


def _asset(name: str) -> str:
    return (files("clt.attribution.viewer") / name).read_text(encoding="ascii")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("ascii")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _inert_json(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_whole(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        # mkstemp makes the file private; other results are readable by all.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
