"""What a capture's run has changed: on the private copy of the module, or outside of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lora_fx.capture.calls.arguments import is_constant
from lora_fx.capture.calls.objects import Pairs, differ_anywhere, is_plain_object
from lora_fx.capture.reads.frozen import UNCHANGING
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
                if name not in old or name not in new or old[name] is not new[name]:
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
            if differ(value, given[name]):
                return f"{path}.{name}".lstrip(".")
    return None


def differ(copy: Any, original: Any) -> bool:
    """Whether a copy differs from its original; tensors are taken to be equal unless one is a fake."""
    return differ_anywhere(copy, original, _pairs)


def _pairs(mine: Any, given: Any) -> Pairs | None:
    """Return the parts that have yet to be compared, or None if the two differ already."""
    if plain_class(mine) is not plain_class(given):
        return None
    if isinstance(mine, Tensor):
        return None if isinstance(mine, FakeTensor) else []
    if isinstance(mine, nn.Module):
        return []  # its own attributes are compared where it is
    if is_constant(mine) or isinstance(mine, (set, frozenset)):
        return [] if mine == given or mine != mine else None
    if isinstance(mine, (list, tuple)):
        return list(zip(mine, given, strict=True)) if len(mine) == len(given) else None
    if isinstance(mine, dict):
        if list(map(_key, mine)) != list(map(_key, given)):
            return None
        return list(zip(dict.values(mine), dict.values(given), strict=True))
    if isinstance(mine, functools.partial):
        return [(mine.args, given.args), (mine.keywords, given.keywords)]
    return [(attributes_of(mine), attributes_of(given))] if is_plain_object(mine) else []


def _key(key: Any) -> Any:
    """Return what stands for a key: an object as a key has been copied."""
    return key if is_constant(key) else type(key)


class Undo:
    """The contents of a value and of the containers in it, kept so that they can be put back."""

    def __init__(self, value: Any) -> None:
        self._kept = [(container, _contents(container)) for container in _containers(value)]

    def __call__(self) -> None:
        for container, contents in self._kept:
            if isinstance(container, list):
                container[:] = contents
            elif isinstance(container, dict):
                dict.clear(container)
                dict.update(container, contents)
            else:
                container.clear()
                container.update(contents)


def _contents(container: Any) -> Any:
    return dict(dict.items(container)) if isinstance(container, dict) else list(container)


def _containers(value: Any) -> Iterator[Any]:
    """Yield the lists, dicts and sets in a value, those with an object's attributes too."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, (Tensor, nn.Module, *UNCHANGING)):
            continue
        seen.add(id(part))
        if isinstance(part, (list, dict, set)):
            yield part
        if isinstance(part, dict):
            waiting.extend(dict.values(part))
        elif isinstance(part, (list, tuple)):
            waiting.extend(part)
        elif is_plain_object(part):
            waiting.append(vars(part))
