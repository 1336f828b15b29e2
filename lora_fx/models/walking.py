"""The modules, parameters and buffers of a model as lists, each made in one loop.

torch's own `named_modules` passes every module through a generator of each level above it; a model is walked through
some hundred times before its first step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Held = TypeVar("_Held", bound=Tensor)
_PLAIN = nn.Module.named_modules
_ALSO_PLAIN = nn.Module.modules
_PLAIN_SET = nn.Module.__setattr__
_OF_TRANSFORMERS = ("transformers.modeling_utils", "PreTrainedModel.train")
_EVAL_OF_TRANSFORMERS = ("transformers.modeling_utils", "PreTrainedModel.eval")
_USUAL: set[Any] = {_PLAIN}
_PARAMETERS = attrgetter("_parameters")
_DEEPEST = 200
"""How many levels of modules are passed without asking torch, whose limit is Python's."""


def as_usual(function: _Function) -> _Function:
    """Return the function itself, a `named_modules` that yields to all but torch's sharding what the class's would."""
    _USUAL.add(function)
    return function


def _is_usual(kind: type) -> bool:
    """Whether modules of a class are listed as torch lists them."""
    own = [base.__dict__["named_modules"] for base in kind.__mro__ if "named_modules" in base.__dict__]
    return _USUAL.issuperset(own)


def named_modules_of(model: nn.Module, beside: tuple[type[nn.Module], ...] = ()) -> list[tuple[str, nn.Module]]:
    """Return what `model.named_modules()` yields, in its order; classes that have a method of their own are asked.

    Children of the kinds `beside`, and all that is in them, may be left out.
    """
    found: list[tuple[str, nn.Module]] = []
    met: set[nn.Module] = set()
    usual: set[type] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in met:
            continue
        kind = type(module)
        if kind.named_modules is not _PLAIN and kind not in usual:
            if not _is_usual(kind):
                return list(model.named_modules())
            usual.add(kind)
        met.add(module)
        found.append((path, module))
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            for name, child in reversed(children.items()):
                if child is not None and not isinstance(child, beside):
                    waiting.append((prefix + name, child))
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what `model.modules()` yields, in its order."""
    found: list[nn.Module] = []
    met: set[nn.Module] = set()
    usual: set[type] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in met:
            continue
        kind = type(module)
        if (kind.named_modules is not _PLAIN or kind.modules is not _ALSO_PLAIN) and kind not in usual:
            if kind.modules is not _ALSO_PLAIN or not _is_usual(kind):
                return list(model.modules())
            usual.add(kind)
        met.add(module)
        found.append(module)
        if module._modules:
            waiting.extend(reversed(module._modules.values()))
    return found


def all_names_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `model.named_modules(remove_duplicate=False)` yields, in its order: each module by all its names."""
    found: list[tuple[str, nn.Module]] = []
    usual: set[type] = set()
    waiting = [("", model, 0)]
    while waiting:
        path, module, depth = waiting.pop()
        kind = type(module)
        if kind not in usual:
            if not _is_usual(kind):
                return list(model.named_modules(remove_duplicate=False))
            usual.add(kind)
        if depth > _DEEPEST:  # it may be in itself: torch's own way says so
            return list(model.named_modules(remove_duplicate=False))
        found.append((path, module))
        if module._modules:
            prefix = f"{path}." if path else ""
            for name, child in reversed(module._modules.items()):
                if child is not None:
                    waiting.append((prefix + name, child, depth + 1))
    return found


def all_parameters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what `model.named_parameters(remove_duplicate=False)` yields, in its order: each by all its names."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        return list(model.named_parameters(remove_duplicate=False))
    return _all_held(model, _PARAMETERS)


def all_buffers_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what `model.named_buffers(remove_duplicate=False)` yields, in its order: each by all its names."""
    if type(model).named_buffers is not nn.Module.named_buffers:
        return list(model.named_buffers(remove_duplicate=False))
    return _all_held(model, attrgetter("_buffers"))


def _all_held(model: nn.Module, held: Callable[[nn.Module], Mapping[str, _Held | None]]) -> list[tuple[str, _Held]]:
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in all_names_of(model)
        for name, tensor in held(module).items()
        if tensor is not None
    ]


def parameters_in(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that the modules hold, each once, in their order."""
    return list({id(p): p for module in modules for p in module._parameters.values() if p is not None}.values())


def buffers_in(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers that the modules hold, each once, in their order."""
    return list({id(b): b for module in modules for b in module._buffers.values() if b is not None}.values())


def named_buffers_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what `model.named_buffers()` yields, in its order."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in named_modules_of(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in found:
                found[id(buffer)] = (f"{path}.{name}" if path else name, buffer)
    return list(found.values())


def set_training(model: nn.Module, training: bool) -> None:
    """Do what `model.train(training)` does, in place; classes that have a method of their own are asked."""
    found: dict[int, nn.Module] = {}
    plain: set[type] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        kind = type(module)
        if kind not in plain:
            if not _trains_plainly(kind, module):
                model.train(training)
                return
            if kind.train is nn.Module.train:  # else it depends on the module
                plain.add(kind)
        if "train" in module.__dict__:
            model.train(training)
            return
        found[id(module)] = module
        for child in module._modules.values():
            if child is not None:
                waiting.append(child)
    give_modes([(module, training) for module in found.values()])


def set_eval(model: nn.Module) -> None:
    """Do what `model.eval()` does, in place; classes that have a method of their own are asked."""
    own: Any = type(model).eval
    known = own is nn.Module.eval or (own.__module__, own.__qualname__) == _EVAL_OF_TRANSFORMERS
    if known and "eval" not in model.__dict__:
        set_training(model, False)
    else:
        model.eval()


def give_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the training flag of each module, in place; classes that set attributes their own way do so."""
    for module, training in modes:
        if type(module).__setattr__ is _PLAIN_SET:
            module.__dict__["training"] = training
        else:
            module.training = training


def _trains_plainly(kind: Any, module: Any) -> bool:
    """Whether setting the mode of a module sets its flag and the mode of its children, and does nothing else."""
    plain = nn.Module
    if kind.children is not plain.children or kind.named_children is not plain.named_children:
        return False
    own = kind.train
    if own is plain.train:
        return True
    known = (own.__module__, own.__qualname__) == _OF_TRANSFORMERS  # 5.x: chooses its kernels anew, if it has any
    return known and getattr(module, "use_kernels", None) is False and _has_plain_base(kind)


def _has_plain_base(kind: type) -> bool:
    """Whether the first two classes that define `train` are one and `nn.Module`."""
    owners = [base for base in kind.__mro__ if "train" in vars(base)]
    return len(owners) == 2 and owners[1] is nn.Module


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices of the model's parameters."""
    return {parameter.device for parameter in parameters_in(modules_of(model))}


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Tensor | None]:
    """Return the parameter `weight` of each module, None of one that has none; asked without a line of Python each."""
    return map(dict.get, map(_PARAMETERS, modules), repeat("weight"))
