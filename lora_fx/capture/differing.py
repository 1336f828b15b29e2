"""Two captures of identical blocks that differ only in the layer's number → where that number stands.

A decoder layer reads `self.layer_idx` to find its part of a KV cache, so the graph of layer 0 does not fit layer 1.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.capture.calls.arguments import Leaf
from lora_fx.capture.captured import Captured
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.inputs import Input, ObjectInput, TensorInput

_INDEX = re.compile(r"(?<=\[)(\d+)(?=\])|\b(\d+)(?= (?:not )?in )")


class _Different(Exception):
    """The captures differ in something else."""


def differing_numbers(one: Captured, other: Captured) -> frozenset[AttributePath]:
    """Return the places of the integers in which two captures differ; none if they differ in anything else.

    Args:
        one: the capture of a block that read an integer of its own, 0 for `self.layer_idx`.
        other: the capture of an identical block with another one, 1.

    Returns:
        Places whose integers are used as indices: in the two

            keys = past_key_values.layers[0].keys        keys = past_key_values.layers[1].keys
            update(x, 0)                                 update(x, 1)

        texts of accesses and guards differ in an index alone, and arguments in the graph in the integer itself.  A
        difference of any other kind, such as a factor that is 0.5 and 0.7, gives none.
    """
    places = _differing_integers(one, other)
    if not places or one.parameters or other.parameters:
        return frozenset()
    mine, others = one.dependencies.read, other.dependencies.read
    same = _SameButFor(frozenset((mine[place], others[place]) for place in places))
    try:
        _require(_facts(one, places) == _facts(other, places))
        same.graph(one.graph, other.graph)
        for a, b in _pairs(one.inputs, other.inputs):
            same.input(a, b)
        for (a, b), (c, d) in _pairs(one.same, other.same):
            same.text(a, c)
            same.text(b, d)
        for a, b in _pairs(one.constants, other.constants):
            same.leaf(a, b)
        for a, b in _pairs(one.structure, other.structure):
            same.text(a.expression, b.expression)
    except _Different:
        return frozenset()
    return frozenset(places)


def _differing_integers(one: Captured, other: Captured) -> list[AttributePath]:
    reads, others = one.dependencies.read, other.dependencies.read
    if reads.keys() != others.keys():
        return []
    places = [place for place, value in reads.items() if value != others[place]]
    return places if all(type(reads[place]) is int and type(others[place]) is int for place in places) else []


def _facts(captured: Captured, places: Sequence[AttributePath]) -> tuple[Any, ...]:
    relied = captured.dependencies
    reads = {place: value for place, value in relied.read.items() if place not in places}
    flags = (relied.asks_requires_grad, relied.asks_layout, relied.asks_grad_mode)
    names = (list(relied.absent), relied.inlined, relied.retreats, flags)
    return (captured.tensors, captured.size_guards, captured.ambient, captured.owned, reads, names)


@dataclass(frozen=True, slots=True)
class _SameButFor:
    """Raises _Different where two parts of captures differ in more than these pairs of integers, used as indices."""

    numbers: frozenset[tuple[int, int]]

    def text(self, one: str, other: str) -> None:
        if one == other:
            return
        mine, others = list(_INDEX.finditer(one)), list(_INDEX.finditer(other))
        _require(len(mine) == len(others) and _INDEX.sub("#", one) == _INDEX.sub("#", other))
        for a, b in zip(mine, others, strict=True):
            _require(a[0] == b[0] or (int(a[0]), int(b[0])) in self.numbers)

    def input(self, one: Input, other: Input) -> None:
        _require(type(one) is type(other))
        self.text(one.access, other.access)
        if isinstance(one, TensorInput) and isinstance(other, TensorInput):
            _require((one.dtype, one.device, len(one.shape)) == (other.dtype, other.device, len(other.shape)))
            _require([s is None for s in one.symbols] == [s is None for s in other.symbols])
        elif not isinstance(one, ObjectInput):
            _require(one.symbol is not None or one == other)  # type: ignore[union-attr]

    def leaf(self, one: Leaf, other: Leaf) -> None:
        _require(type(one.value) is type(other.value) and (one.value is other.value or one.value == other.value))
        self.text(one.access, other.access)

    def graph(self, one: fx.Graph, other: fx.Graph) -> None:
        partner: dict[fx.Node, fx.Node] = {}
        for a, b in _pairs(list(one.nodes), list(other.nodes)):
            _require(a.op == b.op and (a.op == "placeholder" or a.target == b.target))
            partner[a] = b
            if a.op != "placeholder":
                self._value(a.args, b.args, partner)
                self._value(a.kwargs, b.kwargs, partner)

    def _value(self, one: Any, other: Any, partner: Mapping[fx.Node, fx.Node]) -> None:
        """Compare an argument; where it is an integer, it may be the one in which the blocks differ."""
        if isinstance(one, fx.Node):
            _require(partner.get(one) is other)
            return
        _require(type(one) is type(other))
        if isinstance(one, (tuple, list)):
            for a, b in _pairs(one, other):
                self._value(a, b, partner)
        elif isinstance(one, dict):
            _require(list(one) == list(other))
            for key in one:
                self._value(one[key], other[key], partner)
        elif isinstance(one, slice):
            self._value((one.start, one.stop, one.step), (other.start, other.stop, other.step), partner)
        else:
            _require(one is other or one == other or (type(one) is int and (one, other) in self.numbers))


def _pairs(one: Sequence[Any], other: Sequence[Any]) -> list[tuple[Any, Any]]:
    _require(len(one) == len(other))
    return list(zip(one, other, strict=True))


def _require(condition: bool) -> None:
    if not condition:
        raise _Different
