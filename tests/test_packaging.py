"""One distribution, one import root: the wheel, the bare checkout, the name conflict with Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "clt", "capture", "attribution", "launch")


def _run(code: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of a wheel built from the tracked tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def _tracked() -> list[str]:
    """Source, metadata and asset files that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()


def test_kernels_has_no_init() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_has_one_top_level_name(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"clt"}


def test_wheel_holds_every_tracked_file_of_the_five_folders(wheel_names: set[str]) -> None:
    tracked = [name for name in _tracked() if name.split("/")[0] in FOLDERS]
    expected = {name if name.startswith("clt/") else f"clt/{name}" for name in tracked}
    assert expected <= wheel_names, sorted(expected - wheel_names)


def test_bare_checkout_finds_all_folders_without_installation(tmp_path: Path) -> None:
    for folder in (*FOLDERS, "pyproject.toml"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # -S -E hides site-packages and with them the installed project; the path of the third-party libraries is put back
    # behind the checkout.
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.meta_path = [f for f in sys.meta_path "
        "if 'editable' not in type(f).__module__ and 'editable' not in repr(f).lower()]; "
        "import clt.kernels.ops, clt.capture.sources.toy, clt.attribution.graphs.graph, clt.launch; "
        "print(clt.kernels.ops.__file__)"
    )
    assert _run(code, tmp_path).endswith("kernels/ops.py")


def test_huggingface_kernels_is_not_shadowed_by_ours(tmp_path: Path) -> None:
    library = tmp_path / "site" / "kernels"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("name = 'theirs'\n")
    code = "import kernels, clt.kernels.ops; print(kernels.name)"
    assert _run(code, ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path / 'site'}") == "theirs"


def test_version_of_the_distribution_stays_away_from_the_one_transformers_probes_for() -> None:
    from importlib.metadata import version

    assert not version("vlm-clt").startswith("0.18.")


@pytest.mark.parametrize("module", ["clt.launch.train", "clt.launch.capture"])
def test_entry_points_run_as_modules(module: str) -> None:
    # By path they run in tests/launch/test_job_arguments.py and, under torchrun, test_examples.py.
    command = [sys.executable, "-m", module, "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_constraints_leave_triton_to_torch() -> None:
    # A CUDA build of torch requires one exact Triton; any pin here would make it uninstallable.
    pinned = {re.split(r"[=<>~! ]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not pinned & {"torch", "triton"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in (project["dependencies"], *project["optional-dependencies"].values()):
        assert not any(name.startswith("triton") for name in wanted)


def _is_triton(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_only_triton_functions_go_without_types() -> None:
    functions = {
        "clt." + ".".join(path.relative_to(ROOT).with_suffix("").parts): [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        ]
        for path in (ROOT / "kernels").rglob("*.py")
    }
    with_triton = {name for name, inside in functions.items() if any(map(_is_triton, inside))}
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (exempt,) = [override["module"] for override in overrides if override.get("disallow_untyped_defs") is False]
    assert set(exempt) == with_triton
    for function in [function for inside in functions.values() for function in inside if not _is_triton(function)]:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [argument.arg for argument in arguments if argument.annotation is None]
        assert set(untyped) <= {"self", "cls"} and function.returns is not None, function.name
