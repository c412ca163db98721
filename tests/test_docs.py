"""Links, file paths and dotted names in the documentation exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: CHANGELOG.md keeps the old names of old entries.
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/**/*.md", "tests/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)
FOLDERS = ("kernels", "clt", "capture", "attribution", "launch", "tests", "docs", "configs", "examples", "benchmarks")
KEYS = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))


def _code(text: str) -> list[str]:
    """Inline code and the lines of code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*inline, *(line for block in blocks for line in block.splitlines())]


def _defined(name: str) -> bool:
    """True if a dotted name is a module of the repository, or a word in one."""
    parts = name.split(".")[1:]
    path = ROOT if parts[0] in FOLDERS and parts[0] != "clt" else ROOT / "clt"
    for n, part in enumerate(parts):
        if (path / part).is_dir():
            path = path / part
            continue
        is_module = (path / f"{part}.py").is_file()
        source = path / (f"{part}.py" if is_module else "__init__.py")
        words = set(re.findall(r"\w+", source.read_text())) if source.is_file() else set()
        # Attributes of a class that a package exports are not looked up.
        return words.issuperset(parts[n + 1 :] if is_module else parts[n : n + 1])
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text()
    missing = [
        link
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        if "://" not in link and not (page.parent / link).exists()
    ]
    for code in _code(text):
        paths = re.findall(rf"(?<![\w/.<{{-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", code)
        missing += [
            path for path in paths if not any(ROOT.glob(path.rstrip("/."))) and not (page.parent / path).exists()
        ]
        names = [name for name in re.findall(r"(?<![\w/.])clt(?:\.\w+)+", code) if not name.endswith((".json", ".md"))]
        missing += [name for name in names if name not in KEYS and not _defined(name)]
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {missing}"
