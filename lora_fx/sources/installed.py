"""Which version of the package is installed."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the version of lora_fx."""
    try:
        return version("lora-fx")
    except PackageNotFoundError:  # a checkout on sys.path that was never installed
        return "unknown"
