"""Two captures of identical blocks that differ only in the layer's number → one with the number as a parameter.

A decoder layer reads `self.layer_idx` to find its part of a KV cache, so the graph of layer 0 does not fit layer 1.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from lora_fx.capture.calls.arguments import GuardCheck, Leaf
from lora_fx.capture.captured import Captured
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.inputs import Input, NumberInput, ObjectInput, TensorInput

_INDEX = re.compile(r"(?<=\[)(\d+)(?=\])|\b(\d+)(?= (?:not )?in )")


class _Different(Exception):
    """The captures differ in something else."""


def generalise(one: Captured, other: Captured) -> Captured | None:
    """Return a capture that stands for both; None if they differ in more than an integer that is used as an index.

    Args:
        one: the capture of a block that read an integer of its own, 0 for `self.layer_idx`.
        other: the capture of an identical block with another one, 1.

    Returns:
        `one` with the integer as a parameter; it has yet to be proven for each value.  In the two

            keys = past_key_values.layers[0].keys        keys = past_key_values.layers[1].keys
            update(x, 0)                                 update(x, 1)

        texts of accesses and guards differ in an index alone, and become `past_key_values.layers[«layer_idx»].keys`,
        which a guard fills in from the module at every call; in the graph the number becomes one more input,
        `update(x, layer_idx)`.  A difference of any other kind, such as a factor that is 0.5 and 0.7, gives None.
    """
    places = _differing_integers(one, other)
    if not places or one.parameters or other.parameters:
        return None
    mine, others = one.dependencies.read, other.dependencies.read
    unify = _Unify({(mine[place], others[place]): place for place in reversed(places)})
    try:
        _require(_facts(one, places) == _facts(other, places))
        graph, used = unify.graph(one.graph, other.graph)
        inputs = tuple(unify.input(a, b) for a, b in _pairs(one.inputs, other.inputs))
        return replace(
            one,
            graph=graph,
            inputs=(*inputs, *(NumberInput(f"«{place}»", str(place), 0, None) for place in used)),
            same=tuple((unify(a, c), unify(b, d)) for (a, b), (c, d) in _pairs(one.same, other.same)),
            constants=tuple(unify.leaf(a, b) for a, b in _pairs(one.constants, other.constants)),
            structure=tuple(unify.check(a, b) for a, b in _pairs(one.structure, other.structure)),
            dependencies=replace(one.dependencies, read={p: v for p, v in mine.items() if p not in places}),
            parameters=tuple(places),
        )
    except _Different:
        return None


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
class _Unify:
    """Writes one text for two that differ in indices only."""

    places: dict[tuple[int, int], AttributePath]

    def __call__(self, one: str, other: str) -> str:
        if one == other:
            return one
        mine, others = list(_INDEX.finditer(one)), list(_INDEX.finditer(other))
        _require(len(mine) == len(others) and _INDEX.sub("#", one) == _INDEX.sub("#", other))
        for a, b in reversed(list(zip(mine, others, strict=True))):
            if a[0] != b[0]:
                place = self.places.get((int(a[0]), int(b[0])))
                _require(place is not None)
                one = f"{one[: a.start()]}«{place}»{one[a.end() :]}"
        return one

    def input(self, one: Input, other: Input) -> Input:
        _require(type(one) is type(other))
        unified = replace(one, access=self(one.access, other.access))
        if isinstance(one, TensorInput) and isinstance(other, TensorInput):
            _require((one.dtype, one.device, len(one.shape)) == (other.dtype, other.device, len(other.shape)))
            _require([s is None for s in one.symbols] == [s is None for s in other.symbols])
        elif not isinstance(one, ObjectInput):
            _require(one.symbol is not None or one == other)  # type: ignore[union-attr]
        return unified

    def leaf(self, one: Leaf, other: Leaf) -> Leaf:
        _require(type(one.value) is type(other.value) and (one.value is other.value or one.value == other.value))
        return replace(one, access=self(one.access, other.access))

    def check(self, one: GuardCheck, other: GuardCheck) -> GuardCheck:
        return replace(one, expression=self(one.expression, other.expression))

    def graph(self, one: fx.Graph, other: fx.Graph) -> tuple[fx.Graph, list[AttributePath]]:
        """Return a graph for both, and the places whose integers are inputs of it, after the others."""
        unified = copy.deepcopy(one)
        partner: dict[fx.Node, fx.Node] = {}
        used: dict[AttributePath, fx.Node] = {}
        for a, b in _pairs(list(unified.nodes), list(other.nodes)):
            _require(a.op == b.op and (a.op == "placeholder" or a.target == b.target))
            partner[a] = b
            if a.op != "placeholder":
                a.args = self._value(unified, a.args, b.args, partner, used)
                a.kwargs = self._value(unified, a.kwargs, b.kwargs, partner, used)
        return unified, list(used)

    def _value(
        self, graph: fx.Graph, one: Any, other: Any, partner: dict[fx.Node, fx.Node], used: dict[AttributePath, fx.Node]
    ) -> Any:
        """Return an argument for both, with the node of an input where they differ in an integer of the module."""
        if isinstance(one, fx.Node):
            _require(partner.get(one) is other)
            return one
        _require(type(one) is type(other))
        if isinstance(one, (tuple, list)):
            return type(one)([self._value(graph, a, b, partner, used) for a, b in _pairs(one, other)])
        if isinstance(one, dict):
            _require(list(one) == list(other))
            return {key: self._value(graph, one[key], other[key], partner, used) for key in one}
        if isinstance(one, slice):
            ends, others = ((part.start, part.stop, part.step) for part in (one, other))
            return slice(*self._value(graph, ends, others, partner, used))
        if one is other or one == other:
            return one
        place = self.places.get((one, other)) if type(one) is int else None
        _require(place is not None)
        assert place is not None
        if place not in used:
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first):
                used[place] = graph.placeholder(place.attributes[-1])
        return used[place]


def _pairs(one: Sequence[Any], other: Sequence[Any]) -> list[tuple[Any, Any]]:
    _require(len(one) == len(other))
    return list(zip(one, other, strict=True))


def _require(condition: bool) -> None:
    if not condition:
        raise _Different
