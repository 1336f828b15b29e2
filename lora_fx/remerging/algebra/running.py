"""Runs a part of a graph on made-up inputs: the check that what was read is what is computed."""

import functools
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lora_fx.models.tensors import attribute_at
from lora_fx.remerging.algebra.convolutions import Patches
from lora_fx.remerging.algebra.folds import LoraFold
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.shapes import shape_of

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest value: some hundred roundings in the wide dtypes, a few in the half ones."""


def _executed(read: GraphReading, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Return the value of a node, given those of others; statements that write in place write to copies.

    Raises:
        Exception: whatever the graph's operations raise, KeyError for an input that is not given.
    """
    if node not in known:
        known[node] = _computed(read, node, known)
    return known[node]


def _computed(read: GraphReading, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute_at(read.root, str(node.target))
    if node.op == "placeholder":
        raise KeyError(node.name)
    args: Any = map_arg(node.args, lambda source: _executed(read, read.latest(source, node), known))
    kwargs: Any = map_arg(node.kwargs, lambda source: _executed(read, read.latest(source, node), known))
    if read.calls[node].in_place:
        args = (args[0].clone(), *args[1:])
    if node.op == "call_module":
        return read.root.get_submodule(str(node.target))(*args, **kwargs)
    function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    result = function(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return args[0] if result is None else result


def made_up(fold: LoraFold, like: Tensor) -> Tensor:
    """Return random values of the shape of a fold's x as far as it is known, without torch's generator."""
    if isinstance(fold.rows, Patches):
        return made_up_rows((2, fold.rows.channels(fold.width)), fold.rows.span, like)
    shape = shape_of(fold.x)
    sizes: dict[str, int] = {}
    front = ("2", "3") if shape is None else shape[:-1]
    numbers = [int(size) if size.isdecimal() else sizes.setdefault(size, 2 + len(sizes)) for size in front]
    return made_up_rows(tuple(numbers), (fold.width,), like)


def close(computed: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results are equal but for roundings in the dtype; False where the expected one is not finite."""
    tolerance = TOLERANCES.get(dtype, 1e-5)
    if computed.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return bool((computed.double() - expected.double()).abs().le(tolerance * scale).all())


def problem_with(read: GraphReading, fold: LoraFold) -> str | None:
    """Return why a product must not be folded although its structure is right, or None: it is run and compared."""
    weight = read.tensors[fold.part.name]
    if weight.is_meta or fold.delta is None or fold.x is None:
        return None
    x = made_up(fold, weight)
    try:
        with torch.no_grad():
            delta = _executed(read, fold.delta, {fold.x: x})
    except Exception:  # it needs more than x (a size of another input): the structure has to do
        return None
    product = functools.reduce(torch.add, (chain.delta().double() for chain in fold.chains))
    bias = torch.zeros(len(product), dtype=torch.float64, device=product.device)
    for row in fold.constants:
        bias = bias + row.delta().double().flatten()
    if isinstance(fold.rows, Patches):
        expected = fold.rows.applied(x.double(), product.view(weight.shape), bias)
    else:
        expected = x.double() @ product.t() + bias
    if not close(delta.double() * fold.number, expected, delta.dtype):
        return "running it gives something else than its structure says"
    if torch.promote_types(delta.dtype, weight.dtype) != weight.dtype and not _is_cast(read, fold):
        return f"the sum is {delta.dtype}, the linear alone would be {weight.dtype}"
    return None


def _is_cast(read: GraphReading, fold: LoraFold) -> bool:
    """Whether the sum is cast, whatever its dtype."""
    node = fold.reader
    assert node is not None
    while True:
        readers = read.readers(node)
        if readers and all(map(_casts, readers)):
            return True
        if len(readers) != 1 or readers[0] not in read.calls or read.calls[readers[0]].op not in ("add", "sub"):
            return False
        node = readers[0]


def _casts(node: fx.Node) -> bool:
    return str(node.target) in ("to", "type", "type_as", "float", "half", "bfloat16", "double") or "_to_copy" in str(
        node.target
    )


def finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor has NaN or infinite values; on the meta device there are none."""
    return all(tensor.is_meta or bool(torch.isfinite(tensor).all()) for tensor in tensors)


def made_up_rows(rows: tuple[int, ...], columns: tuple[int, ...], like: Tensor) -> Tensor:
    """Return random values of the dtype and on the device of another tensor."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((*rows, *columns), generator=generator, dtype=torch.float64)
    return values.to(like.device, like.dtype)
