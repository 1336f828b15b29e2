"""What a statement costs: its parameters, and its floating-point operations with weights.

Operations are counted for one row of input (a token, a position of an image), a multiplication with its addition as
two; products of activations with each other (attention's scores) are not counted, lookups are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, fx, nn

from lora_fx.adapters.attach import CHILDREN, HOME
from lora_fx.adapters.rawweight.products import COPIES, VIEWS, name_of
from lora_fx.adapters.spec import AdapterSpec
from lora_fx.graphdiff.graphs import Weight
from lora_fx.models.layers import kind_of

_PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "rmatmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot", "bilinear",
     "conv1d", "conv2d", "conv3d", "convolution", "grouped_mm", "_grouped_mm", "multi_head_attention_forward",
     "_native_multi_head_attention"}
)  # fmt: skip


def weights_in(module: nn.Module) -> dict[str, Weight]:
    """Return the facts of every parameter of a module, by name; one that has several names is there under each."""
    return {name: weight_of(each) for name, each in module.named_parameters(remove_duplicate=False)}


def weight_of(tensor: Tensor) -> Weight:
    return Weight(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def called_flops(module: nn.Module, spec: AdapterSpec | None) -> int:
    """Return the operations of calling a module, with its adapter if it has one."""
    kind = kind_of(module)
    if kind is not None:
        base = 0 if kind.op == "embedding" else 2 * math.prod(kind.shape)
        return base + adapter_flops(spec)
    return sum(2 * each.numel() for name, each in module.named_parameters() if each.dim() > 1 and _is_base(name))


def _is_base(name: str) -> bool:
    return not any(part in CHILDREN or part.endswith(HOME) for part in name.split("."))


def adapter_flops(spec: AdapterSpec | None) -> int:
    """Return the operations of a low-rank product."""
    if spec is None:
        return 0
    _, (rows, columns) = spec.matrices
    return 2 * spec.rank * (rows if spec.op == "embedding" else rows + columns)


def product_flops(node: fx.Node, module: nn.Module, spec: AdapterSpec | None) -> int:
    """Return the operations of a function that takes weights: none unless it is a product."""
    if name_of(node.target) not in _PRODUCTS:
        return adapter_flops(spec) if spec is not None and spec.op == "embedding" else 0
    weights = dict(_weights_seen(node, module))
    banked = "conv" not in name_of(node.target)  # a row meets one member of a bank
    matrices = sum(
        2 * (each.shape[-2:] if banked else each.shape).numel() for each in weights.values() if each.dim() > 1
    )
    return matrices + (adapter_flops(spec) if weights else 0)


def _weights_seen(node: fx.Node, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that a node takes, through views and casts of them."""
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each.op == "get_attr":
            owner, _, last = str(each.target).rpartition(".")
            parameter = getattr(module.get_submodule(owner), "_parameters", {}).get(last)
            if parameter is not None:
                yield str(each.target), parameter
        elif each.op != "call_module" and (name_of(each.target) in VIEWS or name_of(each.target) in COPIES):
            waiting += each.all_input_nodes[:1]
