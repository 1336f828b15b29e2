"""What comes with the package and is no code: rule files, explanations of errors."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def packaged(in_wheel: str, in_checkout: str) -> Path:
    """Return a file or folder where it is: in the package of a wheel, or beside it in a checkout."""
    installed = _PACKAGE / in_wheel
    beside = _PACKAGE.parent / in_checkout
    return beside if beside.exists() and not installed.exists() else installed
