"""What a capture's run has changed: on the private copy of the module, or outside of it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_fx.capture.calls.objects import objects_differ
from lora_fx.capture.tracing.copies import attributes_of, plain_class
from lora_fx.models.torch_internals import FakeTensor

Tables = dict[str, tuple[dict[str, Any], ...]]
_TABLES = ("_parameters", "_buffers", "_modules")


def tables_of(module: nn.Module) -> Tables:
    """Return what is registered on each module, by its path."""
    return {path: tuple(dict(vars(child)[table]) for table in _TABLES) for path, child in module.named_modules()}


def changed_registration(module: nn.Module, before: Tables, paths: Iterable[str]) -> str | None:
    """Return a parameter, buffer or submodule that has been added, replaced or deleted since, or None."""
    for path in paths:
        child = module.get_submodule(path)
        for table, old in zip(_TABLES, before[path], strict=True):
            new = vars(child)[table]
            for name in old.keys() | new.keys():
                if old.get(name, ...) is not new.get(name, ...):
                    return f"{path}.{name}".lstrip(".")
    return None


def changed_attribute(copy: nn.Module, original: nn.Module, paths: Iterable[str]) -> str | None:
    """Return a plain attribute, of modules of the copy, that is not what it is on the original, or None."""
    for path in paths:
        mine, given = attributes_of(copy.get_submodule(path)), attributes_of(original.get_submodule(path))
        if mine.keys() != given.keys():
            names = mine.keys() ^ given.keys()
            return f"{path}.{min(names)}".lstrip(".")
        for name, value in mine.items():
            # tensors are taken to be equal unless one is a fake
            if objects_differ(
                value, given[name], lambda one, _: isinstance(one, FakeTensor), plain_class, attributes_of
            ):
                return f"{path}.{name}".lstrip(".")
    return None
