"""Along which dimension of a tensor the tokens lie whose rows it holds: where a choice among them can be made later.

The batch is the first dimension of all these tensors.  The tokens of a query move to another dimension where heads are
split off, and stay there through scores and softmax; what cannot be followed has no dimension, and is computed for all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from lora_fx.passes.pack import FIXED, ROWS, Reading
from lora_fx.passes.pointwise import operation
from lora_fx.passes.rowwise import (
    ATTENTION,
    ENTRY_BY_ENTRY,
    SPLITS,
    argument,
    is_dropout,
    is_known_module,
)

_KEEPS_SHAPE = frozenset({"softmax", "log_softmax"})
_ALONG = frozenset({"mean", "sum", "amax", "amin", "var", "norm", "logsumexp"})
_REPEATS = frozenset({"view", "reshape", "expand"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})


def token_axes(reading: Reading, repeats: bool = False) -> dict[fx.Node, int]:
    """Return the dimension of the tokens for each node of a graph that holds rows, as far as it can be followed.

    Args:
        reading: of the graph.
        repeats: whether to follow what repeats keys for groups of heads, through expansions and changes of shape.
    """
    axes: dict[fx.Node, int] = {}
    for node, state in reading.state.items():
        if node.op == "output" or state == FIXED:
            continue
        axis = 1 if state == ROWS else _axis(node, reading, axes)
        if axis is None and repeats and operation(node) in _REPEATS and node.all_input_nodes[0] in axes:
            axis = _unmoved(node, reading, axes[node.all_input_nodes[0]])
        if axis is not None and (operation(node) in SPLITS or _has_tokens(node, axis, reading)):
            axes[node] = axis
    return axes


def _unmoved(node: fx.Node, reading: Reading, axis: int) -> int | None:
    """Return where tokens are after a change of shape that leaves the batch, the tokens and all behind them."""
    before, after = reading.shape(node.all_input_nodes[0]) or (), reading.shape(node) or ()
    place = axis + len(after) - len(before)
    keeps = place > 0 and before[axis:] == after[place:] and before[:1] == after[:1] == reading.lead[:1]
    return place if keeps and (operation(node) != "expand" or place == axis) else None


def _has_tokens(node: fx.Node, axis: int, reading: Reading) -> bool:
    shape = reading.shape(node)
    return shape is not None and axis < len(shape) and (shape[0], shape[axis]) == reading.lead


def aligned(axis: int, dims: int, others: int) -> int:
    """Return which dimension of an operand of so many dimensions broadcasts along that of a result; < 0: none."""
    return axis - dims + others


def _axis(node: fx.Node, reading: Reading, axes: Mapping[fx.Node, int]) -> int | None:
    """Return the dimension of the tokens of a result, from those of its operands."""
    name = operation(node)
    read = [source for source in node.all_input_nodes if reading.state[source] != FIXED]
    first = node.args[0] if node.args else None
    if name in ("matmul", "bmm", ATTENTION):
        return _of_query(node, first, reading, axes)
    if any(source not in axes for source in read):
        return None
    if name in ENTRY_BY_ENTRY or name == "cat" or is_dropout(node, reading.graph_module):
        return _of_entries(node, name, read, reading, axes)
    if first is not read[0] or len(read) > 1:
        return None
    axis, dims = axes[read[0]], len(reading.shape(read[0]) or ())
    if operation(read[0]) in SPLITS and name == "getitem":
        lost = operation(read[0]) == "unbind" and _dim(read[0], 1, _rank_before(read[0], reading)) < axis
        return axis - lost
    if is_known_module(node, reading.graph_module):
        module = reading.graph_module.get_submodule(str(node.target))
        return axis if not isinstance(module, nn.Softmax) or _is_other(module.dim, axis, dims) else None
    return _of_one(node, name, axis, dims, reading)


def _rank_before(split: fx.Node, reading: Reading) -> int:
    return len(reading.shape(split.all_input_nodes[0]) or ())


def _dim(node: fx.Node, index: int, dims: int) -> int:
    dim = argument(node, index, "dim", 0)
    return dim + dims if dim < 0 else int(dim)


def _of_query(node: fx.Node, first: Any, reading: Reading, axes: Mapping[fx.Node, int]) -> int | None:
    """Of a product of rows, or attention of queries: the rows of the result are those of the first operand."""
    dims = len(reading.shape(first) or ()) if isinstance(first, fx.Node) else 0
    if dims < 3 or axes.get(first) != dims - 2:
        return None
    result = len(reading.shape(node) or ())
    return dims - 2 if result == dims else None


def _of_entries(
    node: fx.Node, name: str, read: Iterable[fx.Node], reading: Reading, axes: Mapping[fx.Node, int]
) -> int | None:
    dims = len(reading.shape(node) or ())
    found = {axes[source] + dims - len(reading.shape(source) or ()) for source in read}
    if len(found) != 1:
        return None
    axis = found.pop()
    if name == "cat" and not _is_other(argument(node, 1, "dim", 0), axis, dims):
        return None
    for source in node.all_input_nodes:
        shape = reading.shape(source)
        if reading.state[source] == FIXED and shape:
            place = aligned(axis, dims, len(shape))
            if place >= 0 and shape[place] not in ("1", reading.lead[1]):
                return None
    return axis


def _of_one(node: fx.Node, name: str, axis: int, dims: int, reading: Reading) -> int | None:
    """Of what is made of one tensor of rows by a change of its shape, or along other dimensions."""
    if name in _RESHAPES:
        same = reading.shape(node) == reading.shape(node.all_input_nodes[0])
        return axis if same or (axis == 1 and reading.leads(node)) else None
    if name in _KEEPS_SHAPE or (name in _ALONG and (argument(node, 2, "keepdim") is True)):
        return axis if _are_others(argument(node, 1, "dim"), axis, dims) else None
    if name in ("layer_norm", "rms_norm"):
        return axis if axis < dims - 1 and len(reading.shape(node) or ()) == dims else None
    if name in ("transpose", "swapaxes"):
        return _swapped(axis, node.args[1:3], dims)
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        places = [dim + dims if dim < 0 else dim for dim in order if type(dim) is int]
        return places.index(axis) if len(places) == dims and places[0] == 0 else None
    if name in SPLITS:
        dim = argument(node, 1 if name == "unbind" else 2, "dim", 0)
        return axis if _is_other(dim, axis, dims) else None
    if name == "getitem":
        return _indexed(node.args[1], axis, dims)
    if name in ("unsqueeze", "squeeze"):
        return _squeezed(name, argument(node, 1, "dim"), axis, dims)
    return None


def _squeezed(name: str, dim: Any, axis: int, dims: int) -> int | None:
    if type(dim) is not int:
        return None
    place = dim + dims + (name == "unsqueeze") if dim < 0 else dim
    if place == 0 or (name == "squeeze" and place == axis):
        return None
    if name == "unsqueeze":
        return axis + (place <= axis)
    return axis - (place < axis)


def _swapped(axis: int, pair: Any, dims: int) -> int | None:
    places = [dim + dims if dim < 0 else dim for dim in pair if type(dim) is int]
    if len(places) != 2 or 0 in places:
        return None
    return {places[0]: places[1], places[1]: places[0]}.get(axis, axis)


def _is_other(dim: Any, axis: int, dims: int) -> bool:
    """Whether a dimension is neither the batch nor the tokens."""
    return type(dim) is int and (dim + dims if dim < 0 else dim) not in (0, axis)


def _are_others(along: Any, axis: int, dims: int) -> bool:
    each = along if isinstance(along, (tuple, list)) else (along,)
    return bool(each) and all(_is_other(dim, axis, dims) for dim in each)


def _indexed(index: Any, axis: int, dims: int) -> int | None:
    """Return where the tokens are after an index that leaves batch and tokens alone."""
    each = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in each):
        return None
    if not any(item is Ellipsis for item in each):
        each.append(Ellipsis)
    at = next(number for number, item in enumerate(each) if item is Ellipsis)
    missing = dims - sum(item is not None and item is not Ellipsis for item in each)
    each[at : at + 1] = [slice(None)] * missing
    place = new = 0
    for item in each:
        if item is None:
            if place == 0:
                return None
            new += 1
            continue
        if place in (0, axis) and item != slice(None):
            return None
        if place == axis:
            return new
        new += type(item) is slice
        place += 1
    return None
