"""Which code is nobody's forward: torch and what torch runs on, the standard library, this package."""

import functools
import sys
import sysconfig
from pathlib import Path

_PACKAGES = frozenset({"torch", "lora_fx", "sympy", "mpmath", "numpy", "networkx", "typing_extensions", "einops"})
_HERE = str(Path(__file__).resolve().parents[2]) + "/"
_STANDARD_LIBRARY = (sysconfig.get_path("stdlib") + "/", "<frozen")
_PACKAGE_FOLDER = "-packages/"


def is_library_module(name: str) -> bool:
    """Whether the module of this dotted name belongs to a package whose own state a forward is not watched for."""
    package = name.split(".")[0]
    return package in _PACKAGES or package in sys.stdlib_module_names


@functools.lru_cache(maxsize=4096)
def is_library_file(file: str) -> bool:
    """Whether code from the file is one of these libraries'."""
    if _PACKAGE_FOLDER in file:
        return file.rsplit(_PACKAGE_FOLDER, 1)[1].split("/")[0].removesuffix(".py") in _PACKAGES
    return file.startswith(_HERE) or is_standard_library(file)


def is_standard_library(file: str) -> bool:
    """Whether the file is Python's own: what torch calls on the way; a forward's own use is seen where it names it."""
    return file.startswith(_STANDARD_LIBRARY) and _PACKAGE_FOLDER not in file
