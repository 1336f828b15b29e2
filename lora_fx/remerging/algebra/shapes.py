"""What is known of the shapes in a graph, from the metadata of its tracer, or from how a view is written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from lora_fx.remerging.algebra.operations import GraphCall

Shape = tuple[str, ...]


def shape_of(node: object) -> Shape | None:
    """Return the shape of a node's value, sizes as text, where its tracer wrote it down."""
    if not isinstance(node, fx.Node):
        return None
    if "tensor" in node.meta:  # our tracer
        return tuple(node.meta["tensor"][0])
    for key in ("val", "tensor_meta"):  # torch.export and make_fx; ShapeProp
        known = node.meta.get(key)
        if isinstance(known, (Tensor, TensorMetadata)):
            return tuple(str(size) for size in known.shape)
    return None


def sizes_of(call: GraphCall) -> list[Any]:
    """Return the sizes that a view is given, one by one."""
    given = call.get("size", call.get("shape", call.get("rest", ())))
    if isinstance(given, fx.Node):
        return [given]
    flat = [*given] if isinstance(given, (tuple, list)) else [given]
    return [*flat[0]] if len(flat) == 1 and isinstance(flat[0], (tuple, list)) else flat


def last_dimension(call: GraphCall) -> object:
    """Return the last size that a view is given: a number, "same" for the size of its own input; None if not known."""
    sizes = sizes_of(call)
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        leading = _leading(sizes[0])
        return None if leading is None else leading[1]
    if not sizes:
        return None
    last = sizes[-1]
    if isinstance(last, int) and last > 0:
        return last
    if isinstance(last, fx.Node) and _is_last_size(last, call.get("input")):
        return "same"
    return None


def _is_last_size(node: fx.Node, of: object) -> bool:
    """Whether the node is x.size(-1) or x.shape[-1]."""
    if node.op == "call_method" and node.target == "size":
        return node.args == (of, -1)
    if node.op == "call_function" and len(node.args) == 2 and node.args[1] == -1:
        return _is_shape(node.args[0], of)
    return False


def _is_shape(node: object, of: object | None = None) -> bool:
    if not isinstance(node, fx.Node) or (of is not None and node.args[:1] != (of,)):
        return False
    return (node.target == "size" and len(node.args) == 1) or (node.target is getattr and node.args[1] == "shape")


def _leading(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Return (x, n) of x.shape[:-1] + (n,)."""
    if len(node.args) != 2 or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], tuple):
        return None
    front, tail = node.args[0], node.args[1]
    if len(tail) != 1 or not isinstance(tail[0], int) or len(front.args) != 2 or front.args[1] != slice(None, -1, None):
        return None
    shape = front.args[0]
    if not _is_shape(shape):
        return None
    assert isinstance(shape, fx.Node)
    return shape.args[0], tail[0]  # type: ignore[return-value]


def rows_after(call: GraphCall, width: int, rows: object, is_input: Callable[[fx.Node], bool]) -> object:
    """Return the dimensions in front of the last one after a view that keeps the last one; None if it may not.

    Args:
        call: the view.
        width: columns of what is viewed.
        rows: its other dimensions.
        is_input: whether a node's rows are those of the input of everything.
    """
    shape, before = shape_of(call.node), shape_of(call.get("input"))
    if shape is not None:
        same = shape[-1:] == (str(width),) or (before is not None and shape[-1:] == before[-1:])
        return tuple(shape[:-1]) if same else None
    last, sizes = last_dimension(call), sizes_of(call)
    if last not in (width, "same"):
        return None
    if len(sizes) == 1:
        leading = _leading(sizes[0])
        return "rows of the input" if leading is not None and is_input(leading[0]) else None
    return ("flat", rows) if len(sizes) == 2 and sizes[0] == -1 else None


def dimension(call: GraphCall, value: object) -> int | None:
    """Return a dimension as a negative number: -1 for the last; None if it is not known."""
    if not isinstance(value, int):
        return None
    shape = shape_of(call.get("input"))
    return value if value < 0 else None if shape is None else value - len(shape)


def piece(call: GraphCall, whole: GraphCall, width: int) -> tuple[int, int] | None:
    """Return (start, stop) of the columns that a slice, narrow or item of chunk or split takes, if it takes columns."""
    if whole.op in ("chunk", "split"):
        return item(call, whole, width) if dimension(whole, whole.get("dim", 0)) == -1 else None
    if call.op == "getitem":
        return _indexed(call, width)
    if dimension(call, call.get("dim", 0)) != -1:
        return None
    return _range(slice_of(call), width)


def slice_of(call: GraphCall) -> slice:
    """Return the indices that a slice or narrow takes along its dimension."""
    start, stop = call.get("start", 0), call.get("end")
    if call.op == "narrow":
        length = call.get("length")
        stop = start + length if isinstance(start, int) and isinstance(length, int) else length
        stop = None if stop == 0 and length != 0 else stop  # the last ones: narrow(x, dim, -2, 2)
    return slice(start, stop, call.get("step", 1))


def bounds(index: slice, size: int) -> tuple[int, int] | None:
    """Return (start, stop) of a slice of a dimension; None if it leaves something out, or it is not known."""
    if not all(bound is None or isinstance(bound, int) for bound in (index.start, index.stop, index.step)):
        return None
    start, stop, step = index.indices(size)
    return (start, stop) if step == 1 else None


def _range(index: slice, width: int) -> tuple[int, int] | None:
    taken = bounds(index, width)
    return taken if taken is not None and taken[0] < taken[1] else None


def _indexed(call: GraphCall, width: int) -> tuple[int, int] | None:
    index = call.get("index")
    if not isinstance(index, tuple) or not index or not isinstance(index[-1], slice):
        return None
    front, shape = index[:-1], shape_of(call.get("input"))
    if any(part is not Ellipsis and part != slice(None, None, None) for part in front):
        return None
    if Ellipsis not in front and (shape is None or len(shape) != len(index)):
        return None
    return _range(index[-1], width)


def item(call: GraphCall, whole: GraphCall, size: int) -> tuple[int, int] | None:
    """Return (start, stop) of an item of chunk or split along a dimension of a size; None if it is not known.

    Args:
        call: takes the item.
        whole: the chunk or split.
        size: of the dimension that it splits.
    """
    sizes = whole.get("chunks") if whole.op == "chunk" else whole.get("split_size")
    if not isinstance(sizes, int):
        listed = isinstance(sizes, (tuple, list)) and all(isinstance(part, int) for part in sizes)
        if not listed or sum(sizes) != size:
            return None
    line, number = torch.empty(size, device="meta"), call.get("index")
    parts = line.chunk(sizes) if whole.op == "chunk" else torch.split(line, sizes)
    if not isinstance(number, int) or not -len(parts) <= number < len(parts):
        return None
    start = sum(len(part) for part in parts[: number % len(parts)])
    return start, start + len(parts[number])
