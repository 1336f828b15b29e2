"""What is done with parameters alone in a graph, as far as the result is still a sum of products of them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.remerging.algebra.affine import linear_parameters
from lora_fx.remerging.algebra.chains import Factor, Matrix, MatrixChain, matrix, product, side_by_side, simplified
from lora_fx.remerging.algebra.operations import IDENTITY, GraphCall, NotLinear
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.shapes import bounds, item, sizes_of, slice_of

Operation = Callable[[GraphReading, GraphCall], Matrix | None]
"""Returns the constant, or None if it is not a sum of products."""


def _transpose(read: GraphReading, call: GraphCall) -> Matrix | None:
    value = read.matrix_of(call)
    dims = {dim % 2 for dim in (call.get("dim0", 0), call.get("dim1", 1)) if isinstance(dim, int)}
    return value.transposed() if value.is_plain and dims == {0, 1} else None


def _permute(read: GraphReading, call: GraphCall) -> Matrix | None:
    value, dims = read.matrix_of(call), [*call.get("dims", call.get("rest", ()))]
    dims = [*dims[0]] if len(dims) == 1 else dims
    return value.transposed() if value.is_plain and dims in ([1, 0], [-1, -2], [-1, 0], [1, -2]) else None


def _product(read: GraphReading, call: GraphCall) -> Matrix | None:
    return _multiplied(read.matrix_of(call), read.matrix_of(call, "other"))


def _multiplied(left: Matrix, right: Matrix) -> Matrix | None:
    if not (left.is_plain and right.is_plain) or left.shape[1] != right.shape[0]:
        return None
    return Matrix(product(left.chains, right.chains), (left.shape[0], right.shape[1]))


def _linear(read: GraphReading, call: GraphCall) -> Matrix | None:
    """A linear on a parameter: F.linear(A.T, B) and modules called on one."""
    weight, bias = linear_parameters(read, call)
    return _multiplied(read.matrix_of(call), weight) if bias is None else None


def _add(read: GraphReading, call: GraphCall) -> Matrix | None:
    one, other = read.matrix_of(call), read.matrix_of(call, "other")
    number = read.number(call.get("alpha", 1), call) * (-1.0 if call.op == "sub" else 1.0)
    if one.shape != other.shape:
        raise NotLinear(call.node, f"its shape broadcasts: {other.shape} is added to {one.shape}")
    return Matrix(simplified((*one.chains, *other.scaled(number).chains)), one.shape)


def _scale(read: GraphReading, call: GraphCall) -> Matrix | None:
    """A number times a constant; or a parameter times a fixed tensor of its shape (a dropout's mask of ones)."""
    left, right = "input", "other"
    if call.op == "mul" and (not isinstance(call.get(left), fx.Node) or math.prod(read.matrix_of(call).shape) == 1):
        left, right = right, left
    if not isinstance(call.get(left), fx.Node):
        return None
    value, factor = read.matrix_of(call, left), call.get(right)
    if isinstance(factor, fx.Node):
        other = read.matrix_of(call, right)
        if math.prod(other.shape) > 1:
            return _masked(read, call, value, other)
    number = read.number(factor, call)
    return value.scaled(1 / number if call.op == "div" else number)


def _masked(read: GraphReading, call: GraphCall, value: Matrix, mask: Matrix) -> Matrix | None:
    """Return a parameter times a tensor that is not trained, element by element."""
    if value.single is None or mask.single is None or call.op != "mul":
        raise NotLinear(call.node, "two parameters are multiplied element by element")
    if any(isinstance(read.tensors[name], torch.nn.Parameter) for name in mask.names):
        raise NotLinear(call.node, f"the scaling is a trained tensor ({', '.join(sorted(mask.names))})")
    result = value.single.tensor.detach() * mask.single.tensor.detach()
    return matrix(result, value.names | mask.names) if result.shape == value.shape else None


def _view(read: GraphReading, call: GraphCall) -> Matrix | None:
    """A view of one factor to any shape, of others to one that lies in memory as they do (a convolution's weight)."""
    value, sizes = read.matrix_of(call), [_size(read, size) for size in sizes_of(call)]
    sizes = [*sizes[0]] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
    shape = _inferred(sizes, value.shape)
    if shape is None or shape == value.shape:
        return None if shape is None else value
    if value.single is not None:
        return matrix(value.single.tensor.reshape(shape), value.names)
    return Matrix(value.chains, shape) if value.fits(shape) else None


def _size(read: GraphReading, value: object) -> Any:
    """Return a size that is asked of a parameter."""
    if not isinstance(value, fx.Node):
        return value
    arguments = [_size(read, argument) for argument in value.args[1:]]
    first = value.args[0]
    if isinstance(first, fx.Node) and (value.target in ("size", getattr)):
        shape = read.constant(first)
        sizes = shape.shape if shape is not None else None
        return sizes if sizes is None or value.target is getattr or not arguments else sizes[arguments[0]]
    own = _size(read, first)
    return value.target(own, *arguments) if callable(value.target) and own is not None else None


def _inferred(sizes: list[Any], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if not all(isinstance(size, int) for size in sizes):
        return None
    total, known = math.prod(shape), math.prod(size for size in sizes if size != -1)
    return tuple(total // known if size == -1 else size for size in sizes)


def _unsqueeze(read: GraphReading, call: GraphCall) -> Matrix | None:
    single = read.matrix_of(call).single
    return None if single is None else matrix(single.tensor.unsqueeze(call.arguments["dim"]), single.names)


def _squeeze(read: GraphReading, call: GraphCall) -> Matrix | None:
    value, dim = read.matrix_of(call), call.get("dim", 0)
    if value.single is not None:
        return matrix(value.single.tensor.squeeze(dim), value.names)
    shape = value.shape[1:]
    return Matrix(value.chains, shape) if dim == 0 and value.shape[0] == 1 and value.fits(shape) else None


def _flatten(read: GraphReading, call: GraphCall) -> Matrix | None:
    single, dims = read.matrix_of(call).single, (call.get("start_dim", 0), call.get("end_dim", -1))
    return None if single is None else matrix(single.tensor.flatten(*dims), single.names)


def _piece(read: GraphReading, call: GraphCall) -> Matrix | None:
    """Rows or columns of a constant: one slice."""
    whole = read.whole_of(call)
    value, dim = read.matrix_of(whole), whole.get("dim", 0)
    if whole is not call:
        taken = item(call, whole, value.shape[dim])
    elif call.op == "getitem":
        index = call.get("index")
        parts = index if isinstance(index, tuple) else (index,)
        wanted = [(dim, part) for dim, part in enumerate(parts) if part != slice(None, None, None)]
        if not wanted:
            return value
        if len(wanted) > 1 or not isinstance(wanted[0][1], slice):
            return None
        dim, part = wanted[0]
        taken = bounds(part, value.shape[dim])
    else:
        taken = bounds(slice_of(call), value.shape[dim])
    if taken is None or not value.is_plain:
        return None
    return value.columns(*taken) if dim % 2 == 1 else value.transposed().columns(*taken).transposed()


def _concatenate(read: GraphReading, call: GraphCall) -> Matrix | None:
    values = []
    for node in call.get("tensors") or call.get("input"):
        value = read.constant(read.latest(node, call.node))
        assert value is not None
        if not value.is_plain:
            return None
        values.append(value)
    if call.get("dim", 0) % 2 == 1:
        return side_by_side(values)
    return side_by_side([value.transposed() for value in values]).transposed()


def _grouped(read: GraphReading, call: GraphCall) -> Matrix | None:
    """conv1d of A [1, r, in] with B [out, r / groups, 1]: B A, with B block by block on the diagonal."""
    a, b = read.matrix_of(call).single, read.matrix_of(call, "weight").single
    if a is None or b is None or a.tensor.dim() != 3 or a.tensor.shape[0] != 1 or b.tensor.shape[-1] != 1:
        return None
    if call.get("bias") is not None or any(call.get(name, one) not in (one, (one,), [one]) for name, one in _PLAIN):
        return None
    groups = call.get("groups", 1)
    blocks = b.tensor.detach().squeeze(-1).chunk(groups)
    left: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    right = a.tensor.squeeze(0)
    if left.shape[1] != right.shape[0]:
        return None
    factors = (Factor(left, b.names), Factor(right, a.names))
    return Matrix((MatrixChain(1.0, factors),), (1, left.shape[0], right.shape[1]))


_PLAIN = (("stride", 1), ("padding", 0), ("dilation", 1))


def _zeros(read: GraphReading, call: GraphCall) -> Matrix | None:
    sizes = sizes_of(call) if call.op != "zeros_like" else list(read.matrix_of(call).shape)
    shape = tuple(_size(read, size) for size in sizes)
    return Matrix((), shape) if all(isinstance(size, int) for size in shape) else None


def _set_rows(read: GraphReading, call: GraphCall) -> Matrix | None:
    """zeros[mask] = B A: the rows of B spread over more rows."""
    index, given = call.node.args[1], call.node.args[2]
    index = index[0] if isinstance(index, (tuple, list)) and len(index) == 1 else index
    zeros = read.constant(read.given(call))
    if zeros is None or zeros.chains or not isinstance(index, fx.Node) or not isinstance(given, fx.Node):
        return None
    mask, value = read.constant(read.latest(index, call.node)), read.constant(read.latest(given, call.node))
    if mask is None or mask.single is None or value is None or mask.single.tensor.dtype != torch.bool:
        return None
    rows = torch.arange(zeros.shape[0], device=mask.single.tensor.device)[mask.single.tensor]
    if len(rows) != value.shape[0] or not value.is_plain:
        return None
    return Matrix(tuple(_spread(chain, rows, zeros.shape[0]) for chain in value.chains), zeros.shape)


def _spread(chain: MatrixChain, rows: Tensor, total: int) -> MatrixChain:
    first, *others = chain.factors
    spread = first.tensor.new_zeros((total, first.tensor.shape[1])).index_copy(0, rows, first.tensor.detach())
    return MatrixChain(chain.coefficient, (Factor(spread, first.names), *others))


CONSTANT_OPERATIONS: dict[str, Operation] = {
    IDENTITY: GraphReading.matrix_of,
    "transpose": _transpose,
    "permute": _permute,
    "matmul": _product,
    "linear": _linear,
    "add": _add,
    "sub": _add,
    "mul": _scale,
    "div": _scale,
    "neg": lambda read, call: read.matrix_of(call).scaled(-1.0),
    "view": _view,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "flatten": _flatten,
    "getitem": _piece,
    "slice": _piece,
    "narrow": _piece,
    "cat": _concatenate,
    "conv": _grouped,
    "new_zeros": _zeros,
    "zeros_like": _zeros,
    "setitem": _set_rows,
}
"""What keeps a constant a sum of products; `chunk` and `split` are read with their items."""
