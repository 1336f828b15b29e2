"""Layers of which each process computes a part: ColwiseParallel and RowwiseParallel, torch's and transformers'.

What is sent is sent by hooks, or by another forward, around such a layer.  A graph calls no layer, and sends itself:

    split along its outputs    x is whole, and y a part; gradients of x are parts of a sum, and added up
    split along its inputs     x is a part, and y a part of a sum, and added up; nothing is sent in the backward pass
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_fx.models.overrides import parallel_style, replaced_forward, variables_of_parallel
from lora_fx.models.shards import is_sharded, local_part
from lora_fx.models.torch_internals import without_modes
from lora_fx.models.walking import modules_of

PART = "lora_fx_part"
"""Attribute of a layer that holds one process's part of its weight as a plain tensor: the LayerPart."""
_TABLES = ("_forward_pre_hooks", "_forward_hooks")
HOOKS = (*_TABLES, "_backward_hooks", "_backward_pre_hooks")
_HOMES = ("torch.distributed.tensor.parallel.style", "transformers.distributed.tensor_parallel")
"""Modules of the styles that are known."""
_WAYS = {
    ("ColwiseParallel", "Replicate()", "Shard(dim=-1)"): True,
    ("RowwiseParallel", "Shard(dim=-1)", "Replicate()"): False,
}
"""Whether a layer is split along its outputs, by its style and by how its inputs and outputs are placed."""


@dataclass(frozen=True, slots=True)
class LayerPart:
    """How a layer is split."""

    along_outputs: bool
    mesh: Any
    around: tuple[Any, ...]
    """What stands around the layer, makes DTensors of its inputs and tensors of its outputs, and sends."""
    sends: bool = True
    """False in copies that run in this process alone, to compare a graph with its forward: none of them sends."""

    def __deepcopy__(self, _memo: object) -> "LayerPart":
        return self  # it holds process groups, of which there are no copies


def part_of_layer(layer: nn.Module) -> LayerPart | None:
    """Return how torch's or transformers' styles split a linear; None if in a way that is not known here.

    Hooks of the user's, which one process alone may have, are no part of that.
    """
    around = _around(layer)
    told = _told_by_hooks(*around) if len(around) == 2 else _told_by_forward(layer)
    along_outputs = None if told is None else _WAYS.get(told[:3])
    if told is None or along_outputs is None or told[3].ndim != 1:
        return None
    part = LayerPart(along_outputs, told[3], around)
    return part if is_split_so(layer, part) else None


def has_style(module: nn.Module) -> bool:
    """Whether hooks of torch's parallel styles, or a forward of transformers', stand around a module."""
    return bool(parallel_style(module)) or any(map(_variables, _around(module)))


def has_own_hooks(layer: nn.Module) -> bool:
    """Whether hooks stand around a layer, or a module in it, that are not of torch's parallel styles."""
    return any(not _variables(hook) for module in modules_of(layer) for hook in _hooks(module))


def is_split_so(layer: nn.Module, part: LayerPart) -> bool:
    """Whether a layer is split now as it was when that was found out."""
    weight: Any = layer._parameters.get("weight")
    around = _around(layer)
    if len(around) != len(part.around) or not all(map(operator.is_, around, part.around)) or not is_sharded(weight):
        return False
    dim = 0 if part.along_outputs else 1
    placement, *others = weight.placements
    along = type(placement).__name__ == "Shard" and placement.dim % 2 == dim
    return not others and along and bool(weight.device_mesh == part.mesh)


def _around(layer: nn.Module) -> tuple[Any, ...]:
    """Return what parallel styles have put around a module's forward, and what is in its place."""
    own = vars(layer)
    return (*filter(_variables, _hooks(layer)), *(own[name] for name in ("forward", "_hf_hook") if name in own))


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in HOOKS for hook in vars(module)[name].values()]


def _told_by_forward(layer: nn.Module) -> tuple[str, str, str, Any] | None:
    """Return (style, inputs, outputs, mesh) of transformers' forward around that of the layer's class."""
    variables = variables_of_parallel(vars(layer).get("forward"))
    if not {*variables} >= {"self", "mesh"} or len(_around(layer)) != 1 or replaced_forward(layer) is not None:
        return None
    style = variables["self"].cell_contents
    own = vars(style)
    if type(style).__module__ not in _HOMES or own.get("use_local_output") is not True:
        return None
    layouts = (repr(own.get("input_layouts")), repr(own.get("output_layouts")))
    return (type(style).__name__, *layouts, variables["mesh"].cell_contents)


def _told_by_hooks(before: Any, after: Any) -> tuple[str, str, str, Any] | None:
    """Return the same of the hooks that torch's `distribute_module` has registered before and after a forward."""
    first, last = _variables(before), _variables(after)
    style, given = _bound(first.get("input_fn"), "_prepare_input_fn")
    same, told = _bound(last.get("output_fn"), "_prepare_output_fn")
    mesh = first.get("device_mesh")
    if style != same or len(given) != 2 or len(told) != 2 or mesh is None or mesh is not last.get("device_mesh"):
        return None
    (layouts, wanted), (outputs, is_local) = given, told
    if layouts != wanted or len(layouts) != 1 or len(outputs) != 1 or is_local is not True:
        return None
    return style, repr(layouts[0]), repr(outputs[0]), mesh


def _variables(hook: Any) -> Mapping[str, Any]:
    """Return what a hook of torch's `distribute_module` holds; nothing of any other."""
    if not isinstance(hook, FunctionType) or not hook.__module__.startswith("torch.distributed.tensor"):
        return {}
    cells = zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _bound(function: Any, name: str) -> tuple[str, tuple[Any, ...]]:
    """Return (name of the style, what it was told) of a partial of a style's method; ("", ()) of all else."""
    method = getattr(function, "func", None)
    home, _, own = str(getattr(method, "__qualname__", "")).rpartition(".")
    known = getattr(method, "__module__", "") in _HOMES and own == name
    return (home, tuple(function.args)) if known and not function.keywords else ("", ())


# -- what is sent


def into_parts(x: Tensor, layer: Any) -> Tensor:
    """Return the input of a layer that is split along its outputs: x itself, whose gradients are added up."""
    part: LayerPart = vars(layer)[PART]
    if not (part.sends and torch.is_grad_enabled() and x.requires_grad):
        return x
    into: Callable[..., Tensor] = _Into.apply
    return into(x, part.mesh.get_group())


def from_parts(y: Tensor, layer: Any) -> Tensor:
    """Return the output of a layer that is split along its inputs, of which every process has a part of the sum."""
    part: LayerPart = vars(layer)[PART]
    if not part.sends:
        return y
    total: Callable[..., Tensor] = _Total.apply
    return total(y, part.mesh.get_group())


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Into.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


def all_same(mesh: Any, number: int) -> bool:
    """Return whether all processes of a mesh give the same number.  Collective; modes that record see none of it."""
    if mesh.size() == 1:
        return True
    with without_modes():
        ends = torch.tensor([number, -number], dtype=torch.int64, device=mesh.device_type)
        dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=mesh.get_group())
        least, most = ends.tolist()
    return bool(least == -most)


# -- a block on one process's part of its weights


def on_parts_of(module: nn.Module, parts: Mapping[str, LayerPart], alone: bool) -> nn.Module:
    """Return a module like this one in which split layers hold plain tensors, the parts that this process has.

    What holds none of them is the module's own.  Gradients of the parts reach the module's parameters, unless it is to
    run `alone`: then its parameters are its own, and it sends nothing.
    """
    inside = {path[:end] for path in parts for end, letter in enumerate(path + ".") if letter == "."}
    return _shell(module, "", parts, inside, alone)


def _shell(module: nn.Module, path: str, parts: Mapping[str, LayerPart], inside: set[str], alone: bool) -> nn.Module:
    made: nn.Module = object.__new__(type(module))
    own = vars(module).copy()
    prefix = f"{path}." if path else ""
    children = own["_modules"] = module._modules.copy()
    for name, child in children.items():
        if child is not None and f"{prefix}{name}" in inside:
            children[name] = _shell(child, f"{prefix}{name}", parts, inside, alone)
    if path in parts:
        _fill_layer(own, parts[path], alone)
    vars(made).update(own)
    return made


def _fill_layer(own: dict[str, Any], part: LayerPart, alone: bool) -> None:
    own |= {name: type(own[name])() for name in _TABLES}
    own.pop("forward", None)
    own[PART] = replace(part, sends=not alone)
    own["_parameters"] = _local(own["_parameters"], alone)
    bias = own["_parameters"].get("bias")
    if bias is not None and not part.along_outputs and not alone and part.mesh.get_local_rank() > 0:
        own["_parameters"]["bias"] = torch.zeros_like(bias)  # what is added up has it once
    for name, holder in own["_modules"].items():
        if name in ("lora_A", "lora_B"):
            own["_modules"][name] = _copy_of(holder, {n: _factor(one, alone) for n, one in holder._modules.items()})


def _factor(factor: nn.Module, alone: bool) -> nn.Module:
    made = _copy_of(factor, factor._modules)
    vars(made)["_parameters"] = _local(factor._parameters, alone)
    vars(made)["_buffers"] = _local(factor._buffers, alone)
    return made


def _copy_of(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    made: nn.Module = object.__new__(type(module))
    vars(made).update(vars(module) | {"_modules": dict(children)})
    return made


def _local(table: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    return {name: None if tensor is None else local_part(tensor, alone) for name, tensor in table.items()}
