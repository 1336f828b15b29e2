"""Who else reads a weight, a factor, or a value on the way: folding must change nothing but the sum."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import networkx as nx
from torch import fx

from lora_fx.models.tensors import attribute_at
from lora_fx.remerging.algebra.folds import LoraFold
from lora_fx.remerging.algebra.operations import NotLinear, parameters_read
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.shapes import piece

Check = Callable[[GraphReading, LoraFold, "Others"], str | None]
"""Returns why a fold must not be done, or None."""


class Others:
    """All folds that are still to be done, seen together."""

    def __init__(self, read: GraphReading, folds: list[LoraFold]) -> None:
        self.cones: frozenset[fx.Node] = frozenset().union(*(fold.cone for fold in folds))
        self.addends = {(fold.delta, fold.reader) for fold in folds}
        self.by_use: defaultdict[fx.Node, set[object]] = defaultdict(set)
        for fold in folds:
            self.by_use[fold.use].add(fold.signature)


def checked(read: GraphReading, folds: list[LoraFold], left: dict[str, str]) -> list[LoraFold]:
    """Return the folds that change nothing else.

    Args:
        read: the graph.
        folds: all that are to be done together: one that falls out may spoil others, so all are asked until none does.
        left: (path → reason), to which the others are added.
    """
    while True:
        others = Others(read, folds)
        bad: dict[str, str] = {}
        for fold in folds:
            for check in CHECKS:
                reason = check(read, fold, others)
                if reason is not None:
                    bad.setdefault(fold.path, reason)
        if not bad:
            return folds
        left.update(bad)
        folds = [fold for fold in folds if fold.path not in bad]


def stored_as(read: GraphReading, fold: LoraFold) -> set[str]:
    """Return the names under which the linear reads its weight and, if the product brings one along, its bias."""
    bias = set()
    if fold.bias is not None and fold.constants:
        bias = set(_names_in(read, fold.base, read.tensors[fold.bias.name]))
    return names_of_weight(read, fold) | bias


def names_of_weight(read: GraphReading, fold: LoraFold) -> set[str]:
    """Return the names under which the linear of a fold reads its weight: tied weights have several."""
    return set(_names_in(read, fold.base, read.tensors[fold.part.name]))


def _names_in(read: GraphReading, nodes: frozenset[fx.Node], tensor: object) -> Iterator[str]:
    for node in nodes:
        if node.op == "get_attr" and attribute_at(read.root, str(node.target)) is tensor:
            yield str(node.target)
        elif node.op == "call_module":
            module = read.root.get_submodule(str(node.target))
            yield from (f"{node.target}.{name}" for name, own in parameters_read(module) if own is tensor)


def _readers_of(read: GraphReading, names: set[str]) -> Iterator[fx.Node]:
    """Yield what reads stored tensors of these names to do more than make another constant."""
    for node in read.graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            yield from _beyond_constants(read, node)
        elif node.op == "call_module":
            module = read.root.get_submodule(str(node.target))
            if any(f"{node.target}.{name}" in names for name, _ in parameters_read(module)):
                yield node


def _beyond_constants(read: GraphReading, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a constant and are not constants; and the constants that those read."""

    def is_constant(other: fx.Node) -> bool:
        return other is node or (other.op != "output" and read.is_constant(other))

    constants = nx.subgraph_view(read.flow, filter_node=is_constant, filter_edge=lambda a, b: read.times_read(a, b) > 0)
    for constant in (node, *nx.descendants(constants, node)):
        beyond = [reader for reader in read.readers(constant) if not is_constant(reader)]
        if beyond and constant is not node:
            yield constant
        yield from beyond


# -- the checks


def _weight_is_its_own(read: GraphReading, fold: LoraFold, others: Others) -> str | None:
    """The weight has no reader but linears that get the same product."""
    mine = others.by_use[fold.use]
    for reader in _readers_of(read, stored_as(read, fold)):
        is_folded = reader in others.by_use
        if reader in others.cones or (is_folded and (reader in fold.base or others.by_use[reader] == mine)):
            continue
        if fold.delta is None and fold.use in reader.all_input_nodes:
            continue
        if is_folded:
            return "its weight is used several times, and not each time with the same product"
        if reader not in fold.base:
            return f"its weight is read elsewhere too ({reader.name}), and must not change"
    return None


def _value_is_its_own(read: GraphReading, fold: LoraFold, others: Others) -> str | None:
    """What the linear gives has no reader but the sum; or only readers of other columns."""
    if fold.delta is None:
        return None
    node, end = fold.use, fold.end
    while node is not end:
        readers = read.readers(node)
        ahead = [reader for reader in readers if reader in fold.base or reader is end]
        for reader in readers:
            once = reader in ahead and read.times_read(node, reader) == 1
            if not once and not _other_columns(read, reader, fold):
                return f"the linear's output is used without the product too ({reader.name})"
        if end in ahead or not ahead:
            return None
        node = ahead[0]
    return None


def _other_columns(read: GraphReading, node: fx.Node, fold: LoraFold) -> bool:
    """Whether the node takes only such columns of the linear's output as the product is not added to."""
    call = read.calls.get(node)
    if call is None:
        return False
    if call.op in ("chunk", "split"):
        return all(_other_columns(read, reader, fold) for reader in read.readers(node))
    taken = piece(call, read.whole_of(call), read.tensors[fold.part.name].shape[0 if fold.part.transposed else 1])
    return taken is not None and (taken[1] <= fold.part.start or fold.part.stop <= taken[0])


def _factors_are_their_own(read: GraphReading, fold: LoraFold, others: Others) -> str | None:
    """No factor is read by anything but products that are folded."""
    names = {name for name in fold.factors if read.tensors[name].dim() > 1}
    for node in read.graph.nodes:
        stored = attribute_at(read.root, str(node.target)) if node.op == "get_attr" else None
        if stored is not None and read.names.get(id(stored), str(node.target)) in names:
            outside = [reader for reader in read.readers(node) if reader not in others.cones]
        elif node.op == "call_module" and node not in others.cones:
            inside = parameters_read(read.root.get_submodule(str(node.target)))
            outside = [node] if any(read.names.get(id(tensor)) in names for _, tensor in inside) else []
        else:
            continue
        if outside:
            return f"a factor is used elsewhere too ({outside[0].name})"
    return None


def _values_stay_inside(read: GraphReading, fold: LoraFold, others: Others) -> str | None:
    """No value between the input and the sum, from the first factor on, is read by anything else."""
    for node in fold.cone:
        for reader in read.readers(node):
            if reader in others.cones or (node, reader) in others.addends:
                continue
            if (fold.delta is None and node is fold.use) or not _has_factor(read, node, fold):
                continue
            return f"a value of the product is used elsewhere too ({reader.name})"
    return None


def _has_factor(read: GraphReading, node: fx.Node, fold: LoraFold) -> bool:
    if read.is_constant(node):
        return False
    assert fold.x is not None
    try:
        value = read.affine(node, fold.x, fold.width)
    except NotLinear:  # chunk and split give several values
        call = read.calls.get(node)
        return call is not None and call.op in ("chunk", "split") and _has_factor(read, read.given(call), fold)
    return any(chain.factors for chain in value.linear)


CHECKS: tuple[Check, ...] = (_weight_is_its_own, _value_is_its_own, _factors_are_their_own, _values_stay_inside)
