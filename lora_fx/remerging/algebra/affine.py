"""What is done with values that depend on an input, as far as they stay affine in it: one function an operation."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import fx, nn

from lora_fx.remerging.algebra.chains import Affine, Matrix, WeightPart, matrix
from lora_fx.remerging.algebra.convolutions import Patches, in_groups, patches_of
from lora_fx.remerging.algebra.operations import IDENTITY, GraphCall, NotLinear, stores_transposed
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.shapes import piece, rows_after, shape_of

Operation = Callable[[GraphReading, GraphCall, fx.Node, int], Affine]


def linear_parameters(read: GraphReading, call: GraphCall) -> tuple[Matrix, Matrix | None]:
    """Return what a linear multiplies its rows with, [in, out], and the row that it adds, [1, out], if any.

    Raises:
        NotLinear: they depend on the input, or are not a matrix and a row.
    """
    if call.op == "conv":
        return _convolution_parameters(read, call)[:2]
    if call.op == "linear" and call.module is not None:
        return _module_parameters(read, call, call.module)
    if call.op == "linear":
        bias = call.get("bias")
        return _plain(read.matrix_of(call, "weight"), call).transposed(), (
            None if bias is None else _row(read.matrix_of(call, "bias"), call)
        )
    if call.op == "addmm":
        if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
            raise NotLinear(call.node, "addmm with beta or alpha")
        return _plain(read.matrix_of(call, "mat2"), call), _row(read.matrix_of(call, "input"), call)
    return _plain(read.matrix_of(call, "other"), call), None


def _module_parameters(read: GraphReading, call: GraphCall, module: nn.Module) -> tuple[Matrix, Matrix | None]:
    path = str(call.node.target)
    weight = read.leaf(f"{path}.weight", call.node)
    bias = None if module._parameters.get("bias") is None else _row(read.leaf(f"{path}.bias", call.node), call)
    return weight if stores_transposed(module) else weight.transposed(), bias


def _convolution_parameters(read: GraphReading, call: GraphCall) -> tuple[Matrix, Matrix | None, Patches]:
    """Return what a convolution multiplies its patches with, [in · k, out], the row that it adds, and what it sees."""
    weight, module, bias = convolution_weight(read, call), call.module, None
    flat = weight.flattened() if len(weight.shape) > 2 else None
    if flat is None:
        raise NotLinear(call.node, f"conv by a tensor of shape {weight.shape}")
    if module is not None and module._parameters.get("bias") is not None:
        bias = _row(read.leaf(f"{call.node.target}.bias", call.node), call)
    elif call.get("bias") is not None:
        bias = _row(read.matrix_of(call, "bias"), call)
    return flat.transposed(), bias, patches_of(call, weight.shape[2:])


def convolution_weight(read: GraphReading, call: GraphCall) -> Matrix:
    """Return the weight of a convolution, [out, in / groups, kernel…]; NotLinear is raised if it is not a constant."""
    return read.matrix_of(call, "weight") if call.module is None else read.leaf(f"{call.node.target}.weight", call.node)


def input_of(read: GraphReading, call: GraphCall) -> fx.Node:
    """Return the value that a linear or convolution sees, before casts and views."""
    given = read.given(call, "mat1" if call.op == "addmm" else "input")
    return read.source(given, (IDENTITY,)) if call.op == "conv" else read.source(given)


def _plain(value: Matrix, call: GraphCall) -> Matrix:
    if not value.is_plain:
        raise NotLinear(call.node, f"{call.op} by a tensor of shape {value.shape}")
    return value


def _row(value: Matrix, call: GraphCall) -> Matrix:
    single = value.single
    if single is None or single.tensor.dim() != 1:
        raise NotLinear(call.node, f"{call.op} adds a tensor of shape {value.shape}")
    row = single.tensor.unsqueeze(0)
    return matrix(row, single.names, WeightPart(next(iter(single.names)), False, 0, row.shape[1]))


def _linear(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    weight, bias = linear_parameters(read, call)
    left = read.argument(call, x, width, "mat1" if call.op == "addmm" else "input")
    if left.width != weight.shape[0]:
        raise NotLinear(call.node, f"{call.op} of {left.width} columns by {weight.shape[0]} rows")
    result = left.times(weight)
    return result if bias is None else result.shifted(bias)


def _convolution(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    """Return a convolution of x; one with a kernel of 1 of another's result; or, after such a one, of any kernel."""
    weight, bias, patches = _convolution_parameters(read, call)
    if input_of(read, call) is x:
        value = Affine.identity(weight.shape[0], patches)
    else:
        value = read.argument(call, x, width)
        rows = value.rows
        if isinstance(rows, Patches) and max(rows.groups, patches.groups) > 1:
            raise NotLinear(call.node, in_groups(max(rows.groups, patches.groups)))
        if isinstance(rows, Patches) and rows.is_pointwise and not value.constant:
            value = replace(value.at_each_of(patches.positions), rows=patches)
        elif not isinstance(rows, Patches) or not patches.is_pointwise:
            raise NotLinear(call.node, "none of its convolutions has a kernel of 1 and no strides")
    if value.width != weight.shape[0]:
        raise NotLinear(call.node, f"conv of {value.width} columns by {weight.shape[0]} rows")
    result = value.times(weight)
    return result if bias is None else result.shifted(bias)


def addends(read: GraphReading, call: GraphCall) -> Iterator[tuple[fx.Node, float]]:
    """Yield what a sum adds up, with the number that each is multiplied by.

    Raises:
        NotLinear: something in it is not a value of the graph.
    """
    sign = -1.0 if call.op == "sub" else 1.0
    yield read.given(call), 1.0
    yield read.given(call, "other"), sign * read.number(call.get("alpha", 1), call)


def _add(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    total: Affine | None = None
    rows = []
    for node, number in addends(read, call):
        constant = read.constant(node)
        if constant is not None:
            rows.append(_row(constant, call).scaled(number))
            continue
        value = read.affine(node, x, width).scaled(number)
        if total is not None and (total.width, total.rows) != (value.width, value.rows):
            raise NotLinear(call.node, broadcasts(total, value))
        total = value if total is None else total.plus(value)
    assert total is not None
    if rows and isinstance(total.rows, Patches):
        raise NotLinear(call.node, "a row is added to what a convolution gives")
    for row in rows:
        if row.shape[1] != total.width:
            raise NotLinear(call.node, f"a row of {row.shape[1]} columns is added to {total.width}")
        total = total.shifted(row)
    return total


def broadcasts(one: Affine, other: Affine) -> str:
    """Return the reason why two values cannot be one linear's."""
    if isinstance(one.rows, Patches) and isinstance(other.rows, Patches) and one.rows != other.rows:
        return one.rows.difference(other.rows)
    if one.width != other.width:
        return f"its shape broadcasts: {other.width} columns are added to {one.width}"
    return "its shape broadcasts, or its rows are other rows"


def _multiply(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    left, right = call.get("input"), call.get("other")
    if not isinstance(left, fx.Node) or read.is_constant(read.latest(left, call.node)):
        if call.op == "div":
            raise NotLinear(call.node, "it is divided by")
        left, right = right, left
    number = read.number(right, call)
    return read.affine(read.latest(left, call.node), x, width).scaled(1 / number if call.op == "div" else number)


def _view(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    value = read.argument(call, x, width)
    rows = rows_after(call, value.width, value.rows, lambda node: read.source(node) is x)
    if rows is None:
        raise NotLinear(call.node, "a view, and it is not known whether it keeps the last dimension")
    return Affine(value.linear, value.constant, value.width, rows)


def _piece(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    """Return columns of a value: slice, narrow, or an item of chunk or split."""
    whole = read.whole_of(call)
    value = read.argument(whole, x, width)
    taken = piece(call, whole, value.width)
    if taken is None:
        raise NotLinear(call.node, f"{call.op} takes something else than columns")
    return value.columns(*taken)


def _concatenate(read: GraphReading, call: GraphCall, x: fx.Node, width: int) -> Affine:
    nodes = call.get("tensors") or call.get("input")
    shape = shape_of(call.node)
    if call.get("dim", 0) != -1 and (shape is None or call.get("dim", 0) != len(shape) - 1):
        raise NotLinear(call.node, "cat, and not of columns")
    values = [read.affine(read.latest(node, call.node), x, width) for node in nodes]
    total, start = sum(value.width for value in values), 0
    result = Affine((), (), total, values[0].rows)
    for value in values:
        if value.rows != result.rows or isinstance(value.rows, Patches):
            raise NotLinear(call.node, broadcasts(result, value))
        result = result.plus(value.placed(start, total))
        start += value.width
    return result


AFFINE_OPERATIONS: dict[str, Operation] = {
    "conv": _convolution,
    "linear": _linear,
    "matmul": _linear,
    "addmm": _linear,
    "add": _add,
    "sub": _add,
    "mul": _multiply,
    "div": _multiply,
    "neg": lambda read, call, x, width: read.argument(call, x, width).scaled(-1.0),
    IDENTITY: GraphReading.argument,
    "view": _view,
    "getitem": _piece,
    "slice": _piece,
    "narrow": _piece,
    "cat": _concatenate,
}
"""What keeps a value affine in the input; anything else is a reason."""
