"""Modules whose class is swapped."""

from __future__ import annotations

import copy
import functools
import pickle
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn

from lora_fx.models.swap import Swapped, original_class, swap, swapped_class, unswap

Item = TypeVar("Item")


class Doubling(Swapped, nn.Module):
    def forward(self, *args):
        return 2 * super().forward(*args)


class Reduced(nn.Linear):
    """A class that pickles in a way of its own."""

    def __reduce_ex__(self, protocol):
        return (Reduced, (self.in_features, self.out_features), self.__dict__)


class Interface(ABC):
    @abstractmethod
    def named(self): ...


class WithInterface(Interface, nn.Linear):
    """A class whose first base is abstract, which Python lays out in memory in another way."""

    def named(self):
        return "linear"


class WithItems(Generic[Item], nn.Linear):
    """A class whose first base is generic."""


KINDS = [nn.Linear, Reduced, WithInterface, WithItems]


@pytest.mark.parametrize("make", [functools.partial(kind, 2, 2) for kind in KINDS])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_swapped_module_keeps_class_name_and_survives_copies(make, duplicate):
    module = make()
    x, original = torch.randn(3, 2), type(module)
    expected = 2 * module(x)
    swap(module, Doubling)
    other = duplicate(module)
    for model in (module, other):
        assert torch.equal(model(x), expected)
        assert isinstance(model, original)
        assert type(model).__name__ == original.__name__
        assert original_class(model) is original
    assert type(other) is type(module) is swapped_class(original, Doubling)
    unswap(module)
    assert type(module) is original
