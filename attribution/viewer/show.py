"""Shows a graph to the person who runs a script or a notebook."""

from __future__ import annotations

import html
import logging
import os
import sys
import tempfile
import webbrowser
from pathlib import Path

from clt.attribution.viewer.document import GraphDocument
from clt.attribution.viewer.page import write_export

log = logging.getLogger(__name__)

#: Height in pixels of the page inside a notebook.
_FRAME_HEIGHT = 820


def show(document: GraphDocument, folder: Path | str | None = None) -> Path:
    """Writes the page of a graph and opens it: inside a notebook, else in a browser where there is one."""
    page = write_export(document, tempfile.mkdtemp(prefix="clt-graph-") if folder is None else folder).resolve()
    if _in_notebook():
        _display(page)
    elif _has_screen() and webbrowser.open(page.as_uri()):
        log.info("page=%s opened in the browser", page)
    else:
        log.warning("page=%s; no browser here: open the file elsewhere, or serve it with `clt view %s`", page, page)
    return page


def _in_notebook() -> bool:
    """True if a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _display(page: Path) -> None:
    """Shows the page in the notebook, from its text: a notebook server serves no file outside of its own folder."""
    from IPython.display import HTML, display

    source = html.escape(page.read_text(encoding="ascii"))
    style = f"width:100%;height:{_FRAME_HEIGHT}px;border:1px solid #d5dbe3"
    display(HTML(f'<iframe srcdoc="{source}" style="{style}" title="Attribution graph"></iframe>'))


def _has_screen() -> bool:
    """True if a graphical browser can be opened: without one Python would start a text browser in the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
