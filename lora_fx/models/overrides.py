"""What stands on an instance in the place of its class's methods: replaced forwards, accelerate's hooks, closures.

`copy.deepcopy` takes functions as they are: a closure over a layer, copied with a model, goes on calling the layer of
the model that it was copied from.  And a wrapper around `Linear.forward` keeps that function, whatever class the layer
gets later.  Here both are put right on a copy; what cannot be is refused by name.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.walking import modules_of, named_modules_of

FOLLOWS = "_lora_fx_follows"
"""Attribute of a function that stands for the forward of a module's class, whichever that is."""
_MOST_ITEMS = 1_000
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OLD = "_old_forward"
"""Where accelerate's hooks keep the forward that they run around."""
_TORCH = "torch.distributed.tensor."
"""What the modules of hooks begin with that torch's parallel styles register."""
_TRANSFORMERS = "transformers.distributed."
"""What the modules of forwards begin with that transformers' parallel styles put on instances."""
_ORIGINAL, _STYLE = "original_forward", "self"
"""Variables in which such a forward keeps the one that it runs around, and its style."""


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that accelerate (1.x, `add_hook_to_module`) has put on the module."""
    hook = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", (hook,))) if hook is not None and _OLD in vars(module) else []


def replaced_forward(module: nn.Module) -> Any:
    """Return what stands in the place of the forward of the module's class, below accelerate's hooks; None if nothing.

    accelerate's hooks run around a forward, and do nothing to what it computes; nor does transformers' tensor
    parallelism, which places what goes in and comes out.
    """
    own = vars(module)
    forward = own.get(_OLD) if accelerate_hooks(module) else own.get("forward")
    cells = variables_of_parallel(forward)
    forward = cells[_ORIGINAL].cell_contents if cells else forward
    is_class_forward = isinstance(forward, MethodType) and forward.__self__ is module and _is_of_class(forward, module)
    return None if is_class_forward else forward


def _is_of_class(forward: MethodType, module: nn.Module) -> bool:
    kind: Any = type(module)
    return follows_class(forward.__func__) or any(
        forward.__func__ is vars(base).get("forward") for base in kind.__mro__
    )


def follows_class(function: Any) -> bool:
    """Whether a function stands for the forward of a module's class."""
    return getattr(function, FOLLOWS, False) is True


def follow_class(model: nn.Module) -> None:
    """Let what accelerate and transformers put around a forward run that of the class a module has then, in place."""
    for module in modules_of(model):
        cells = variables_of_parallel(vars(module).get("forward"))
        if not (cells or accelerate_hooks(module)) or replaced_forward(module) is not None:
            continue
        kind: Any = type(module)
        forward = MethodType(_class_forward(kind), module)
        if cells:
            cells[_ORIGINAL].cell_contents = forward
        else:
            vars(module)[_OLD] = forward


@functools.cache
def _class_forward(kind: Any) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    setattr(forward, FOLLOWS, True)
    return forward


def parallel_style(module: nn.Module) -> str:
    """Return the style of transformers' tensor parallelism (5.23, `tp_plan`) around a forward; empty if none."""
    forward = vars(module).get("forward")
    if not _is_of_parallel(forward):
        return ""
    cells = variables_of_parallel(forward)
    return type(cells[_STYLE].cell_contents).__name__ if _STYLE in cells else "unknown"


def _is_of_parallel(forward: object) -> bool:
    return str(getattr(forward, "__module__", "")).startswith(_TRANSFORMERS)


def variables_of_parallel(forward: Any) -> dict[str, CellType]:
    """Return the variables of a forward of transformers' tensor parallelism that runs another; none of all others."""
    if not isinstance(forward, FunctionType) or not _is_of_parallel(forward):
        return {}
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells if _ORIGINAL in cells else {}


def parallel_styles(model: nn.Module) -> dict[str, str]:
    """Return the styles of transformers' tensor parallelism in a model, by the paths of the modules."""
    if not [module for module in modules_of(model) if "forward" in module.__dict__]:
        return {}
    replaced = [(path, module) for path, module in named_modules_of(model) if "forward" in vars(module)]
    return {path: style for path, module in replaced if (style := parallel_style(module))}


def unknown_parallel(model: nn.Module) -> list[str]:
    """Return the paths of modules with a forward of transformers' parallelism that is not known to run another."""
    found = ((path, vars(module).get("forward")) for path, module in named_modules_of(model))
    return [path for path, forward in found if _is_of_parallel(forward) and not variables_of_parallel(forward)]


def without_parallel(model: nn.Module) -> None:
    """Take off what tensor parallelism has put around modules, torch's hooks and transformers' forwards, in place."""
    for module in modules_of(model):
        if parallel_style(module):
            del vars(module)["forward"]
        hooks: tuple[dict[int, Any], ...] = (module._forward_hooks, module._forward_pre_hooks)
        for table in hooks:
            for key in [key for key, hook in table.items() if str(getattr(hook, "__module__", "")).startswith(_TORCH)]:
                del table[key]


def with_class_forwards(model: nn.Module) -> None:
    """Put the forward of the module's class wherever a function stands for it, in place: nothing of ours is left."""
    for module in modules_of(model):
        _rebind_all(module, Rebinding({}, type(module).forward))


def rebind(twin: nn.Module, copies: Mapping[int, object]) -> None:
    """Let what stands on the instances of a copied model call the copies, in place.

    Args:
        twin: the copy of a model.
        copies: for each module of the model, by identity, its copy: the memo of `copy.deepcopy`.

    Raises:
        RefusedError: naming the functions that reach the model by a global variable.
    """
    own = {*map(id, modules_of(twin))}
    modules = {key: module for key, module in copies.items() if id(module) in own}
    problems: list[tuple[str, str]] = []
    for path, module in named_modules_of(twin):
        rebinding = Rebinding(modules, None)
        _rebind_all(module, rebinding)
        problems += [(f"{path}.{name}".lstrip("."), reason) for name, reason in rebinding.problems]
    if problems:
        raise RefusedError(
            "functions on instances of the model reach it by a global variable: a copy would call the original",
            problems,
            "let them take the module as an argument or from a closure, or put them on after lora_fx.apply",
        )


def _rebind_all(module: nn.Module, rebinding: "Rebinding") -> None:
    tables = [vars(module)] + [table for name in _HOOK_TABLES if (table := vars(module).get(name))]
    for table in tables:
        for name, value in list(table.items()):
            if callable(value) and not isinstance(value, (nn.Module, Tensor, type)):
                table[name] = rebinding.of(value, str(name))


class Rebinding:
    """Makes functions, methods, partials and callable objects again, over the modules of a copy."""

    def __init__(self, modules: Mapping[int, object], class_forward: Any) -> None:
        """With `class_forward`, that takes the place of each function that stands for it."""
        self.modules = modules
        self.class_forward = class_forward
        self.problems: list[tuple[str, str]] = []
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []

    def of(self, value: Any, name: str) -> Any:
        """Return the value over the copies; the value itself where nothing in it reaches the model."""
        return self._again(value, self._reaching(value, name))

    def _is_replaced(self, value: Any) -> bool:
        return id(value) in self.modules or (
            self.class_forward is not None and isinstance(value, FunctionType) and follows_class(value)
        )

    def _reaching(self, value: Any, name: str) -> set[int]:
        """Return by identity which of the value and of what it holds must be made again: all that leads to a module."""
        holders: dict[int, set[int]] = {id(value): set()}
        waiting, holding = [value], list[int]()
        while waiting:
            whole = waiting.pop()
            self._kept.append(whole)
            holding += [id(whole)] if self._is_replaced(whole) else []
            if isinstance(whole, FunctionType):
                self._look_at_globals(whole, name)
            for part in _parts(whole):
                waiting += [] if id(part) in holders else [part]
                holders.setdefault(id(part), set()).add(id(whole))
        reached: set[int] = set()
        while holding:  # closures may hold each other: what holds one of them is found after all of them
            part = holding.pop()
            holding += () if part in reached else holders[part]
            reached.add(part)
        return reached

    def _look_at_globals(self, function: FunctionType, name: str) -> None:
        for variable in function.__code__.co_names:
            if id(function.__globals__.get(variable)) in self.modules:
                self.problems.append((name, f"{function.__qualname__} reads the global variable {variable}"))

    def _again(self, value: Any, reached: Collection[int]) -> Any:
        if id(value) not in reached:
            return value
        if id(value) in self.modules:
            return self.modules[id(value)]
        if self._is_replaced(value):
            return self.class_forward
        if id(value) not in self._made:
            self._make(value, lambda part: self._again(part, reached))
        return self._made[id(value)]

    def _make(self, value: Any, again: Callable[[Any], Any]) -> None:
        made: Any
        if isinstance(value, MethodType):
            made = self._made[id(value)] = MethodType(again(value.__func__), again(value.__self__))
        elif isinstance(value, functools.partial):
            arguments = (again(argument) for argument in value.args)
            named = {key: again(argument) for key, argument in value.keywords.items()}
            made = self._made[id(value)] = functools.partial(again(value.func), *arguments, **named)
            vars(made).update({key: again(part) for key, part in vars(value).items()})
        elif isinstance(value, FunctionType):
            cells = tuple(CellType() for _ in value.__closure__ or ())
            made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
            self._made[id(value)] = made
            for cell, old in zip(cells, value.__closure__ or (), strict=True):
                for content in _contents(old):
                    cell.cell_contents = again(content)
            made.__defaults__ = None if value.__defaults__ is None else tuple(map(again, value.__defaults__))
            made.__kwdefaults__ = value.__kwdefaults__ and {k: again(v) for k, v in value.__kwdefaults__.items()}
            made.__qualname__, made.__doc__, made.__module__ = value.__qualname__, value.__doc__, value.__module__
            vars(made).update({key: again(part) for key, part in vars(value).items()})
        elif type(value) is tuple:
            self._made[id(value)] = tuple(map(again, value))
        elif type(value) is list:
            made = self._made[id(value)] = []
            made.extend(map(again, value))
        elif type(value) is dict:
            made = self._made[id(value)] = {}
            made.update((key, again(part)) for key, part in value.items())
        else:
            made = self._made[id(value)] = object.__new__(type(value))
            vars(made).update({key: again(part) for key, part in vars(value).items()})


def _contents(cell: CellType) -> Iterator[Any]:
    """Yield what a cell of a closure holds; nothing if it is empty yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a function, method, partial, container or callable object holds."""
    if isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values(), *vars(value).values())
    elif isinstance(value, FunctionType):
        yield from (content for cell in value.__closure__ or () for content in _contents(cell))
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
    elif type(value) in (list, tuple, dict) and len(value) <= _MOST_ITEMS:  # a longer one is data
        yield from value.values() if type(value) is dict else value
    elif callable(value) and not isinstance(value, (nn.Module, Tensor, type)):
        yield from getattr(value, "__dict__", {}).values()
