"""Allowed imports: between folders, between sub-packages, and of heavy libraries."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "clt", "capture", "attribution", "launch")
#: Public names of `clt`, above everything else.
ENTRANCE = ROOT / "clt" / "__init__.py"
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

#: Library -> files or folders that may import it.
IMPORTERS = {
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


#: Sub-package -> sub-packages that it imports, lazily or not, those in `LAZY` left out. `clt/__init__.py` is above all.
ARROWS = {
    "clt.attribution": """
        clt.attribution.evaluation clt.attribution.graphs clt.attribution.replacement clt.attribution.viewer
        clt.capture.models clt.capture.reading clt.capture.sources clt.evaluation clt.hub clt.transcoder""",
    "clt.attribution.evaluation": """
        clt.attribution.graphs clt.attribution.replacement clt.capture clt.capture.models clt.capture.reading
        clt.capture.sources clt.checkpoint clt.distributed clt.evaluation clt.kernels clt.training clt.transcoder""",
    "clt.attribution.features": """
        clt.attribution.graphs clt.attribution.replacement clt.capture.models clt.capture.sources clt.transcoder""",
    "clt.attribution.graphs": "clt.attribution.replacement clt.attribution.viewer clt.capture.models clt.transcoder",
    "clt.attribution.replacement": "clt.capture.models clt.capture.sources clt.transcoder",
    "clt.capture": """
        clt.capture.models clt.capture.reading clt.capture.sources clt.capture.storage clt.capture.store
        clt.capture.writing clt.transcoder""",
    "clt.capture.reading": "clt.capture.storage clt.capture.store",
    "clt.capture.sources": "clt.capture.models",
    "clt.capture.store": "clt.capture.storage",
    "clt.capture.upkeep": """
        clt.capture clt.capture.models clt.capture.reading clt.capture.storage clt.capture.store
        clt.capture.writing clt.transcoder""",
    "clt.capture.writing": "clt.capture.storage clt.capture.store",
    "clt.checkpoint": "clt.distributed clt.transcoder",
    "clt.convert": "clt.checkpoint clt.evaluation clt.kernels clt.transcoder",
    "clt.distributed": "clt.kernels clt.kernels.common clt.transcoder",
    "clt.evaluation": "clt.distributed clt.transcoder",
    "clt.hub": "clt.checkpoint clt.transcoder",
    "clt.kernels": "clt.kernels.common clt.kernels.gpu clt.kernels.pytorch",
    "clt.kernels.gpu": "clt.kernels.common clt.kernels.pytorch",
    "clt.kernels.pytorch": "clt.kernels.common",
    "clt.launch": """
        clt.attribution clt.attribution.evaluation clt.attribution.features clt.capture clt.capture.models
        clt.capture.reading clt.capture.sources clt.capture.writing clt.distributed clt.training clt.transcoder""",
    "clt.launch.bench.device": """
        clt.distributed clt.kernels clt.kernels.common clt.kernels.gpu clt.kernels.pytorch clt.launch.bench.common
        clt.training clt.transcoder""",
    "clt.launch.bench.kernels": "clt.kernels clt.kernels.gpu clt.launch.bench clt.launch.bench.common",
    "clt.launch.bench.store": """
        clt.capture clt.capture.models clt.capture.reading clt.capture.storage clt.capture.store
        clt.capture.writing clt.launch clt.launch.bench.common""",
    "clt.launch.bench.training": """
        clt.distributed clt.kernels clt.launch clt.launch.bench.common clt.planning clt.training clt.transcoder""",
    "clt.launch.commands": """
        clt.attribution clt.attribution.viewer clt.capture clt.capture.models clt.capture.reading
        clt.capture.store clt.capture.upkeep clt.checkpoint clt.convert clt.hub clt.launch clt.launch.bench
        clt.launch.bench.kernels clt.launch.bench.store clt.launch.bench.training clt.planning clt.training
        clt.transcoder""",
    "clt.planning": "clt.checkpoint clt.distributed clt.training clt.transcoder",
    "clt.training": "clt.checkpoint clt.distributed clt.evaluation clt.kernels clt.kernels.common clt.transcoder",
    "clt.transcoder": "clt.kernels",
}

#: The only imports against the arrows: methods that users expect on a class, imported when they are called.
LAZY = {
    ("clt.transcoder", "clt.hub"): "CrossLayerTranscoder.from_pretrained, save_pretrained and push_to_hub",
    ("clt.attribution.replacement", "clt.attribution.graphs"): "ReplacementModel.attribute",
}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module != "clt":
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
    if path == ENTRANCE:
        return  # The public names, loaded when they are used.
    own = ROOMS.index(path.relative_to(ROOT).parts[0])
    for module in _imports(path):
        room = _room(module)
        if room is not None:
            assert ROOMS.index(room) <= own, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_in_their_place_only(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    for module in _imports(path):
        for library, importers in IMPORTERS.items():
            if module == library or module.startswith(library + "."):
                assert relative.startswith(importers), f"{relative} imports {module}"


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "clt" else ("clt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_dotted(path): path for path in SOURCES}


def _package(module: str) -> str | None:
    """The folder of a module of ours; for a name defined in a module, the folder of that module; None for others."""
    while module and module not in MODULES and module not in FOLDERS:
        module = module.rpartition(".")[0]
    if module in FOLDERS:
        return module
    return module.rpartition(".")[0] or None


FOLDERS = {_dotted(path.parent) for path in SOURCES}


def _arrows() -> dict[tuple[str, str], list[str]]:
    """(importing folder, imported folder) -> the statements, `clt/__init__.py` left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in SOURCES:
        own = _dotted(path.parent)
        if path == ENTRANCE:
            continue
        for module in _imports(path):
            other = _package(module)
            if other is not None and other != own:
                found.setdefault((own, other), []).append(f"{path.relative_to(ROOT)}: {module}")
    return found


def test_arrows_between_sub_packages_are_those_of_the_table() -> None:
    # Everything below clt may use the records, errors and settings that lie in clt itself.
    found = {arrow: lines for arrow, lines in _arrows().items() if arrow[1] != "clt"}
    listed = {(own, other) for own, others in ARROWS.items() for other in others.split()} | set(LAZY)
    assert not set(found) - listed, {arrow: found[arrow] for arrow in set(found) - listed}
    assert not listed - set(found), "remove from the table what nobody imports"


def test_sub_packages_have_no_cycle() -> None:
    others = {own: {b for a, b in _arrows() if a == own and (a, b) not in LAZY} for own in FOLDERS}
    graphlib.TopologicalSorter(others).prepare()


def test_imports_against_the_arrows_are_lazy_and_in_one_module_each() -> None:
    assert len(LAZY) <= 2
    for arrow in LAZY:
        files = {line.partition(":")[0] for line in _arrows()[arrow]}
        assert len(files) == 1, files
        for node in _tree(ROOT / files.pop()).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                assert _package(node.module) != arrow[1], f"{arrow} is imported at module level"


def test_nobody_imports_from_the_front_door() -> None:
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "clt":
                names = {f"clt.{alias.name}" for alias in node.names}
                assert names <= set(MODULES) | FOLDERS, f"{path.relative_to(ROOT)} imports {names} from clt"


def test_no_folder_has_more_than_twelve_modules() -> None:
    for folder in {path.parent for path in SOURCES}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        if (ROOT / "launch" / "bench") not in [folder, *folder.parents]:
            assert len(modules) <= 12, f"{folder.relative_to(ROOT)}: {len(modules)} modules"


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
