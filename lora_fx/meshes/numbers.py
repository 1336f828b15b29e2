"""Whole numbers that are known on the meta device: positions, masks and token ids are computed beside, for real.

Forwards ask for them: whether a mask hides anything, whether positions begin again.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from lora_fx.bench.counters import operands
from lora_fx.models.torch_internals import pytree

_ATEN = torch.ops.aten
_MOST = 1 << 22
"""Numbers of a tensor that is computed beside."""


class KnownNumbers:
    """The values of tensors on the meta device that hold whole numbers or truth values, as far as they are known."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def know(self, tensor: Tensor, value: Tensor) -> None:
        """Note the value of a tensor."""
        if id(tensor) not in self._values:
            weakref.finalize(tensor, self._values.pop, id(tensor), None)
        self._values[id(tensor)] = value

    def answer(self, func: Any, args: Any) -> Any:
        """Return the number that an operator asks for; None where it asks for none, or it is not known."""
        if func is not _ATEN._local_scalar_dense.default or id(args[0]) not in self._values:
            return None
        return self._values[id(args[0])].item()

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Compute beside what an operator has made of numbers that are known."""
        made = operands((result,))
        if not any(id(tensor) in self._values for tensor in made) and any(map(_is_other, made)):
            return
        given = operands((*args, *kwargs.values()))
        if all(id(tensor) in self._values for tensor in given) and made and not any(map(_is_other, made)):
            try:
                args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: self._values[id(tensor)], (args, kwargs))
                values = func(*args, **(kwargs | ({"device": "cpu"} if "device" in kwargs else {})))
            except (RuntimeError, NotImplementedError):  # not on this device, not with these dtypes
                return
            for tensor, value in zip(made, operands((values,)), strict=True):
                self.know(tensor, value)
        elif any(id(tensor) in self._values for tensor in made):
            self._values.clear()  # changed in place by what is not known; views of it may be known too


def _is_other(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or not tensor.is_meta or tensor.numel() > _MOST
