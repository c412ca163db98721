"""Maps five folders of the checkout to one import root: folder kernels/ is imported as clt.kernels, and so on.

Sub-packages and the files beside their modules are found, so that a new one needs no entry. kernels/ has no
__init__.py on purpose: a folder without one is a namespace package, so `import kernels` (which transformers probes)
finds the Hugging Face library of that name when it is installed. tests/test_packaging.py tests all of this.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {"clt": "clt"} | {f"clt.{name}": name for name in ("kernels", "capture", "attribution", "launch")}


def sub_packages(package: str, folder: str) -> list[str]:
    """The package of a folder and of every folder below it."""
    return [package, *(f"{package}.{name}" for name in find_namespace_packages(folder, exclude=["*__pycache__*"]))]


setup(
    packages=[name for package, folder in FOLDERS.items() for name in sub_packages(package, folder)],
    package_dir=FOLDERS,
    package_data={"": ["py.typed", "*.json", "*.html", "*.css", "*.js", "*.sh"]},
)
