"""Which targets there are: ours, one file each, and those that other packages offer as entry points."""

import importlib
from importlib.metadata import EntryPoint, entry_points

from lora_fx.errors import ExportError
from lora_fx.exporters.target import Target
from lora_fx.text import listing, nearest

GROUP = "lora_fx.targets"
"""Group of entry points; each names a `Target`: `mine = "my_package.my_target:TARGET"`."""
BUILT_IN = ("merged", "peft", "vllm", "onnx", "gguf", "gguf_q4_0", "diffusers", "kohya", "mlx", "pt2", "executorch")


def names() -> list[str]:
    """Return the names of all targets, ours first; nothing is imported."""
    return [*BUILT_IN, *(name for name in _foreign() if name not in BUILT_IN)]


def targets() -> dict[str, Target]:
    """Return all targets by name; each is imported, what it writes with is not."""
    return {name: target_named(name) for name in names()}


def target_named(name: str) -> Target:
    """Return the target of that name.

    Raises:
        ExportError: there is none, or what has the name is not a target.
    """
    if name in BUILT_IN:
        own: Target = importlib.import_module(f"lora_fx.exporters.{name}").TARGET
        return own
    foreign = _foreign()
    if name not in foreign:
        like = nearest(name, names())
        advice = f"did you mean {listing(like)}?" if like else f"the targets are {listing(names(), 20)}"
        raise ExportError(name, "there is no such target", advice=advice)
    return _loaded(name, foreign[name])


def _foreign() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _loaded(name: str, entry: EntryPoint) -> Target:
    try:
        target = entry.load()
    except Exception as error:
        raise ExportError(name, f"cannot be loaded from {entry.value}", [(type(error).__name__, str(error))]) from error
    if not isinstance(target, Target):
        raise ExportError(name, f"{entry.value} is of type {type(target).__name__}, not a Target")
    return target
