"""Renders a graph document, the page's style and its scripts as one HTML file that needs no network.

The document is in a script element of type application/json, which browsers do not execute, with every `<`, `>` and `&`
written as a JSON escape, so that no text of a prompt can end the element. A content security policy allows only the one
script and the one style sheet, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

#: The two files of a graph that `clt.attribution.graphs.export` writes.
DOCUMENT_NAME, PAGE_NAME = "graph.json", "index.html"

#: In the order of their dependencies.
SCRIPTS = ("model.js", "layout.js", "graph.js", "picture.js", "header.js", "details.js", "viewer.js")


def render_page(document: Mapping[str, Any]) -> str:
    """One self-contained page that shows a graph.

    Args:
        document: a graph document as plain JSON values; see `clt.attribution.graphs.export.GraphDocument`.

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


def _asset(name: str) -> str:
    return (files("clt.attribution.viewer") / name).read_text(encoding="ascii")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("ascii")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _inert_json(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
