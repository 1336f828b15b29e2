"""Factors of several adapters as one tensor, for batched products; kept from batch to batch while they are current.

Whether they are is not told by versions alone: what writes to `.data`, as averages of weights do, counts none.  So the
values are compared, which reads them and makes nothing: once in a context of `lora_fx.rows`, and, of factors that are
trained, once in each call of the model.  In between versions are asked.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.models.together import all_equal

MOST_KEPT = 4
"""Of how many choices of adapters a model keeps stacked factors: each is a second copy of their values."""


class Plain(NamedTuple):
    """The factors of an adapter that are multiplied by, and nothing else happens."""

    A: Tensor
    """[r, in]."""
    B: Tensor
    """[out, r]."""
    scaling: float


class Stacked(NamedTuple):
    """Factors of several adapters, filled up with zeros to one rank."""

    A: Tensor
    """[adapters, r, in]."""
    B: Tensor
    """[adapters, out, r]."""
    scaling: Tensor | float
    """[adapters, 1, 1], or one for all."""


def stacked(names: Sequence[str | None], factors: Mapping[str, Plain]) -> Stacked:
    """Return the factors of adapters in the order of the names; of None they are zeros."""
    rank = max(one.A.shape[0] for one in factors.values())
    like = next(iter(factors.values()))
    nothing = Plain(like.A.new_zeros(rank, like.A.shape[1]), like.B.new_zeros(like.B.shape[0], rank), like.scaling)
    each = [nothing if name is None else factors[name] for name in names]
    lacking = [rank - one.A.shape[0] for one in each]
    A = [F.pad(one.A, (0, 0, 0, more)) if more else one.A for one, more in zip(each, lacking, strict=True)]
    B = [F.pad(one.B, (0, more)) if more else one.B for one, more in zip(each, lacking, strict=True)]
    scalings = [one.scaling for one in each]
    alike = len(set(scalings)) == 1
    scaling = scalings[0] if alike else like.A.new_tensor(scalings).view(-1, 1, 1)
    return Stacked(torch.stack(A), torch.stack(B), scaling)


def _tensors(factors: Mapping[str, Plain]) -> list[Tensor]:
    return [tensor for one in factors.values() for tensor in (one.A, one.B)]


def can_be_kept(factors: Mapping[str, Plain]) -> bool:
    """Whether what is made of factors may serve again: autograd need not see how, and they tell of what is written."""
    tensors = _tensors(factors)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    return not any(one.is_inference() or not one.is_leaf for one in tensors)


@dataclass(frozen=True, slots=True)
class _KeptStack:
    """Stacked factors, and what they were made of."""

    names: tuple[str | None, ...]
    sources: list[Tensor]
    versions: list[int]
    places: list[int]
    scalings: list[float]
    shown: list[Tensor]
    """What each source was, as views of the stacked factors."""
    result: Stacked

    @staticmethod
    def of(names: tuple[str | None, ...], factors: Mapping[str, Plain], sources: list[Tensor]) -> "_KeptStack":
        """Return the factors stacked, with all that is asked of them later."""
        result = stacked(names, factors)
        numbers = [(names.index(name), one.A.shape[0]) for name, one in factors.items()]
        shown = [view for i, r in numbers for view in (result.A[i, :r], result.B[i, :, :r])]
        scalings = [one.scaling for one in factors.values()]
        return _KeptStack(names, sources, [one._version for one in sources], _places(sources), scalings, shown, result)

    def is_of(self, names: tuple[str | None, ...], factors: Mapping[str, Plain], sources: Sequence[Tensor]) -> bool:
        """Whether it was made of these very tensors, as far as they tell what was done to them."""
        return (
            self.names == names
            and len(self.sources) == len(sources)
            and all(one is other for one, other in zip(self.sources, sources, strict=True))
            and self.is_in_place
            and self.scalings == [one.scaling for one in factors.values()]
            and not (self.result.A.is_inference() and not torch.is_inference_mode_enabled())
        )

    @property
    def is_in_place(self) -> bool:
        """Whether the tensors are where they were, and tell of no change."""
        return self.versions == [one._version for one in self.sources] and self.places == _places(self.sources)

    @property
    def is_trained(self) -> bool:
        return any(one.requires_grad for one in self.sources)


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [one.data_ptr() for one in tensors]


class StackedFactors:
    """Stacked factors of a model's layers, for one choice of adapters."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[nn.Module, _KeptStack] = WeakKeyDictionary()
        self._changing = threading.Lock()

    def of(self, layer: nn.Module, names: tuple[str | None, ...], factors: Mapping[str, Plain]) -> Stacked:
        """Return the factors of a layer, as they were kept or made now; the names say in which order."""
        sources = _tensors(factors)
        made = self._made.get(layer)
        if made is None or not made.is_of(names, factors, sources):
            with torch.no_grad():
                made = _KeptStack.of(names, factors, sources)
            with self._changing:  # another thread may go through them
                self._made[layer] = made
        return made.result

    def compare(self, trained_alone: bool = False) -> None:
        """Forget what is no longer what it was made of, by its values; with `trained_alone`, of trained factors."""
        with self._changing:
            all_made = list(self._made.items())
        kept = [(layer, made) for layer, made in all_made if made.is_trained or not trained_alone]
        asked = [(layer, made) for layer, made in kept if made.is_in_place]
        equal = all_equal([(made.shown, [one.detach() for one in made.sources]) for _, made in asked])
        current = {id(made) for (_, made), is_equal in zip(asked, equal, strict=True) if is_equal}
        with self._changing:
            for layer, made in kept:
                if id(made) not in current and self._made.get(layer) is made:
                    del self._made[layer]


_KEPT: WeakKeyDictionary[nn.Module, dict[tuple[str | None, ...], StackedFactors]] = WeakKeyDictionary()
"""Not on the models themselves: copies and files of a model have nothing of it."""
_KEEPING = threading.Lock()


def kept_for(model: nn.Module, names: Sequence[str | None]) -> StackedFactors:
    """Return the stacked factors that a model keeps for a batch of these adapters, one or None for each row."""
    choice = tuple(dict.fromkeys(names))
    with _KEEPING:
        choices = _KEPT.setdefault(model, {})
        found = choices.pop(choice, None) or StackedFactors()
        choices[choice] = found  # the one that was used last
        while len(choices) > MOST_KEPT:
            del choices[next(iter(choices))]
    return found


def forget_kept(model: nn.Module) -> None:
    """Let a model keep no stacked factors: adapters are gone."""
    with _KEEPING:
        _KEPT.pop(model, None)
