"""What a statement costs: its parameters, and its floating-point operations with weights.

Operations are counted for one row of input (a token, a position of an image), a multiplication with its addition as
two; products of activations with each other (attention's scores) are not counted, lookups are free.
"""

import math
from collections.abc import Iterable

from torch import Tensor, fx, nn

from lora_fx.adapters.attach import CHILDREN, HOME
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.adapters.rawweight.products import COPIES, VIEWS, name_of
from lora_fx.graphdiff.graphs import Weight
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.layers import kind_of

_PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "rmatmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot", "bilinear",
     "conv1d", "conv2d", "conv3d", "convolution", "grouped_mm", "_grouped_mm", "multi_head_attention_forward",
     "_native_multi_head_attention"}
)  # fmt: skip


def weights_in(module: nn.Module) -> dict[str, Weight]:
    """Return the facts of every parameter of a module, by name; one that has several names is there under each."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: Weight(tuple(weight.shape), name_of_dtype(weight.dtype)) for name, weight in named}


def totals(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Return how many elements parameters have, and the bytes that they take."""
    sizes = [(parameter.numel(), parameter.numel() * parameter.element_size()) for parameter in parameters]
    return sum(number for number, _ in sizes), sum(size for _, size in sizes)


def called_flops(module: nn.Module, spec: AdapterSpec | None) -> int:
    """Return the operations of calling a module, with the adapter of that spec if it has one."""
    kind = kind_of(module)
    if kind is not None:
        base = 0 if kind.op == "embedding" else 2 * math.prod(kind.shape)
        return base + adapter_flops(spec)
    return sum(2 * weight.numel() for name, weight in module.named_parameters() if weight.dim() > 1 and _is_base(name))


def _is_base(name: str) -> bool:
    return not any(part in CHILDREN or part.endswith(HOME) for part in name.split("."))


def adapter_flops(spec: AdapterSpec | None) -> int:
    """Return the operations of a low-rank product, 2 r (m + n): those of x Aᵀ and of its product with Bᵀ."""
    if spec is None:
        return 0
    rows, columns = spec.site.features
    return 2 * spec.rank * (rows if spec.site.op == "embedding" else rows + columns)


def parameter_at(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter of a dotted name; None if the name is that of a buffer or of another attribute."""
    owner, _, last = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(last)


def product_flops(node: fx.Node, module: nn.Module, spec: AdapterSpec | None) -> int:
    """Return the operations of a function that takes weights: none unless it is a product.

    Args:
        node: of a graph over the module.
        module: that owns the weights.
        spec: of the adapter that the node shows.
    """
    if name_of(node.target) not in _PRODUCTS:
        return adapter_flops(spec) if spec is not None and spec.site.op == "embedding" else 0
    weights = _weights_seen(node, module)
    banked = "conv" not in name_of(node.target)  # a row meets one member of a bank
    shapes = (weight.shape[-2:] if banked else weight.shape for weight in weights.values() if weight.dim() > 1)
    return sum(2 * shape.numel() for shape in shapes) + (adapter_flops(spec) if weights else 0)


def _weights_seen(node: fx.Node, module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a node takes, through views and casts of them."""
    weights: dict[str, Tensor] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source.op == "get_attr":
            parameter = parameter_at(module, str(source.target))
            if parameter is not None:
                weights[str(source.target)] = parameter
        elif source.op != "call_module" and name_of(source.target) in VIEWS | COPIES:
            waiting += source.all_input_nodes[:1]
    return weights
