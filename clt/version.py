"""Code version written into files: the package's version, and the git commit of a checkout."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def code_version() -> str:
    """Version of this package, such as "0.1.0", or "0.1.0+g1a2b3c4d5e6f" in a git checkout ("-dirty" when changed)."""
    try:
        release = version("vlm-clt")
    except PackageNotFoundError:
        # Imported from a checkout that is not installed.
        release = "0"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return release
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{release}+g{described.stdout.strip()}" if described.returncode == 0 else release
