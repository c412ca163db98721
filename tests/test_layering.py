"""Who may import whom: kernels <- clt <- capture <- attribution <- launch, and one door for each heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "clt", "capture", "attribution", "launch")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

#: Library -> files or folders that may import it.
DOORS = {
    "deepspeed": ("clt/training/deepspeed_engine.py",),
    "triton": ("kernels/",),
    "zarr": ("capture/reading/activation_store.py", "launch/bench/store/peers.py"),
    "numcodecs": ("capture/store/shard.py",),
    "awscrt": ("clt/checksum.py",),
    "obstore": ("capture/storage/object_store.py",),
    "zarrs": ("launch/bench/store/peers.py",),
    "tensorstore": ("launch/bench/store/peers.py",),
    "h5py": ("launch/bench/store/peers.py",),
    "transformers": ("capture/", "attribution/"),
    "tensorboard": ("clt/training/metrics.py",),
    "torch.utils.tensorboard": ("clt/training/metrics.py",),
    "huggingface_hub": ("clt/hub/transfer.py",),
    "typer": ("launch/",),
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(module: str) -> str | None:
    """The room a module of ours belongs to, None for others."""
    if module != "clt" and not module.startswith("clt."):
        return None
    second = module.split(".")[1] if "." in module else ""
    return second if second in ROOMS else "clt"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = ROOMS.index(path.relative_to(ROOT).parts[0])
    for module in _imports(path):
        room = _room(module)
        if room is not None:
            assert ROOMS.index(room) <= own, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_have_one_door(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    for module in _imports(path):
        for library, doors in DOORS.items():
            if module == library or module.startswith(library + "."):
                assert relative.startswith(doors), f"{relative} imports {module}"


@pytest.mark.parametrize("room", ["capture", "attribution", "launch"])
def test_room_init_is_a_docstring_and_nothing_else(room: str) -> None:
    body = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def test_no_launch_file_shadows_an_importable_module() -> None:
    names = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    third_party = {"torch", "zarr", "typer", "deepspeed", "transformers", "numpy", "yaml", "pydantic", "tqdm", "triton"}
    assert not names & (set(sys.stdlib_module_names) | third_party)


def test_importing_clt_loads_no_torch() -> None:
    code = "import sys, clt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0
