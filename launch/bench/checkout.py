"""Loads the comparisons with other projects from benchmarks/, a folder of the checkout that is not in the wheel."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from clt.errors import ConfigError

#: Root of the checkout; in an installed wheel, the package's own folder, which has no benchmarks/.
CHECKOUT = Path(__file__).resolve().parents[2]


def load_benchmarks(module: str = "benchmarks", checkout: Path = CHECKOUT) -> ModuleType:
    """Imports a module of benchmarks/ without putting the root, whose kernels/ would be found too, on the path.

    Args:
        module: dotted name, `benchmarks` or below it.
        checkout: folder that has benchmarks/.

    Returns:
        The module; from then on plain imports of `benchmarks` work too.

    Raises:
        ConfigError: the folder is not there, as in an installed wheel.
    """
    if "benchmarks" not in sys.modules:
        file = checkout / "benchmarks" / "__init__.py"
        if not file.is_file():
            raise ConfigError(f"{file.parent}: not found; this comparison needs a checkout of vlm-clt, not the wheel")
        spec = spec_from_file_location("benchmarks", file, submodule_search_locations=[str(file.parent)])
        assert spec is not None and spec.loader is not None
        package = sys.modules["benchmarks"] = module_from_spec(spec)
        spec.loader.exec_module(package)
    return import_module(module)
