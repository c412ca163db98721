"""Every third-party package that the project imports, lazily or not, is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("clt", "capture", "attribution", "kernels", "launch")
#: Comes with torch: a CUDA build requires one exact Triton, so pyproject.toml must not name it.
FROM_TORCH = {"triton"}


def _normalised(name: str) -> str:
    """Name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported() -> dict[str, str]:
    """Third-party top-level module -> a file that imports it."""
    found: dict[str, str] = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, *FROM_TORCH, "clt"}}


def _declared() -> set[str]:
    """Distributions of the dependencies and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    return {_normalised(re.split(r"[\[\s<>=!~;]", name)[0]) for name in wanted}


IMPORTED = _imported()


@pytest.mark.parametrize("module", sorted(IMPORTED))
def test_an_imported_package_is_declared(module: str) -> None:
    # A package that is not installed here counts under the name by which it is imported.
    distributions = {_normalised(name) for name in packages_distributions().get(module, [module])}
    assert distributions & _declared(), f"{IMPORTED[module]} imports {module}; declare {' or '.join(distributions)}"


def test_the_search_finds_imports_inside_functions() -> None:
    assert {"torch", "pydantic", "httpx2", "deepspeed", "pyarrow"} <= set(IMPORTED)
