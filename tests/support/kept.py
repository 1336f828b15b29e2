"""What many tests need alike is made once in a process, and each of them gets a copy of its own.

Copies of an adapted model run the graphs of the model that they are copies of, with what has been proven of them.  So of
many tests of one model the first captures and proves; a test of capturing itself makes its model by itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
_KEPT: dict[Hashable, Any] = {}


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Let a function make one thing for the same arguments, whatever is drawn for it: nobody may change it."""

    @functools.wraps(make)
    def made(*args: Any, **settings: Any) -> Made:
        key = (make, _hashable(args), _hashable(settings))
        if key not in _KEPT:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _KEPT[key] = make(*args, **settings)
        return _KEPT[key]  # type: ignore[no-any-return]

    return made


def copy_of(make: Callable[..., Made], *args: Any, **settings: Any) -> Made:
    """Return a copy of what a function makes of these arguments, once; random numbers of the caller stay as they are.

    Tensors among them count by their values, modules by which one it is: it must not change.
    """
    return copy.deepcopy(kept(make)(*args, **settings))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, tuple(value.flatten().tolist()))
    if isinstance(value, dict):
        return tuple((name, _hashable(inner)) for name, inner in value.items())
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_hashable, value))
    return value  # type: ignore[no-any-return]
