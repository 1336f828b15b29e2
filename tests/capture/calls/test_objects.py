"""Plain objects that hold tensors: all of them are found."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fx.capture.calls.objects import tensors_in


class MakesAttributes:
    """Its attributes are a new dict each time that they are asked for."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def __dict__(self):
        return {"tensor": self.tensor}


def test_tensors_are_found_in_objects_that_make_their_attributes():
    tensors = [torch.zeros(1) for _ in range(20)]
    tensors_found = tensors_in([*map(MakesAttributes, tensors)])
    assert [id(tensor) for tensor in tensors_found] == [id(tensor) for tensor in tensors]
